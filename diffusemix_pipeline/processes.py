"""Whether a process that wrote its name down is still alive, after a restart of the machine too."""

import os
import socket

import psutil


def this_process() -> str:
    """Return what this process is known by: host, number, and when it started."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def is_gone(process: str) -> bool:
    """Tell whether a process of this machine has ended; one of another machine is left alone."""
    host, _, rest = process.partition(" ")
    if host != socket.gethostname():
        return False
    pid, started = rest.split()
    # Clocks may have been set by a little.
    return not started_between(int(pid), float(started) - 5, float(started) + 5)


def started_between(pid: int, earliest: float, latest: float) -> bool:
    """Tell whether a process with this number lives that started then, in seconds of the epoch.

    A number may have gone to another process since.
    """
    try:
        return earliest <= psutil.Process(pid).create_time() <= latest
    except psutil.NoSuchProcess:
        return False
