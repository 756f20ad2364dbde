"""Whether a process that wrote its name down is still alive, after a restart of the machine too."""

import os
import socket

import psutil

_CLOCK_STEP_SECONDS = 60  # by how much a clock may have been set since


def this_process() -> str:
    """Return what this process is known by: host, number, and seconds from boot to its start."""
    return f"{socket.gethostname()} {os.getpid()} {_started_after_boot(os.getpid()):.1f}"


def is_of_this_host(process: str) -> bool:
    """Tell whether the name is of a process of this machine, or of a container with its name."""
    return process.partition(" ")[0] == socket.gethostname()


def is_gone(process: str) -> bool:
    """Tell whether a process of this machine has ended; one of another machine is left alone.

    A number may have gone to another process since, so when it started counts: from the boot, as
    clocks may be set.
    """
    if not is_of_this_host(process):
        return False
    _, pid, started = process.split()
    try:
        return abs(_started_after_boot(int(pid)) - float(started)) > 2
    except psutil.NoSuchProcess:
        return True


def lived_at(pid: int, moment: float) -> bool:
    """Tell whether a process with this number lives that had started at a moment of the epoch."""
    try:
        return psutil.Process(pid).create_time() < moment + _CLOCK_STEP_SECONDS
    except psutil.NoSuchProcess:
        return False


def _started_after_boot(pid: int) -> float:
    return psutil.Process(pid).create_time() - psutil.boot_time()
