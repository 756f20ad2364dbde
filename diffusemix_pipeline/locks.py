"""Who is at work in a project: locks on its files, which the system gives back when a process dies.

What belongs here: taking them, and telling who has one. What does not: how long a run holds what,
which is Dagster's side of it (`orchestration/holding.py`).
"""

import fcntl
import logging
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import psutil

from diffusemix_pipeline.devices import choose_device, count_gpus
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.project import Project

_LOOK_AGAIN_SECONDS = 1.0
_log = logging.getLogger(__name__)


def note_holder(lock: TextIO, name: str) -> None:
    """Write into a lock that was taken who holds it, for whoever finds it taken."""
    lock.truncate(0)
    lock.write(f"{name}\n{socket.gethostname()}, since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    lock.flush()


def holder(lock: TextIO) -> tuple[str, str]:
    """Return the name of who holds a lock, or held it last, and where and since when."""
    lock.seek(0)
    name, _, where = lock.read().partition("\n")
    return name, where


def at_work(project: Project, lock: TextIO, process: int | None = None) -> str:
    """Say who holds the project; `process` is its own, where it is between two steps."""
    name, where = holder(lock)
    end = _how_to_end([process] if process else holders(project.run_lock))
    return f"Another is at work in {project.root}: {name} on {where}. {end}"


@contextmanager
def using_edits(project: Project) -> Iterator[None]:
    """Let nobody remove edits meanwhile; waits, and says so, while somebody does."""
    with opened(project.edits_lock) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            warnings.warn("The edit store is being verified or pruned: waiting.", stacklevel=3)
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextmanager
def alone_with_edits(project: Project) -> Iterator[None]:
    """Let nobody use the edit store meanwhile; UserError where somebody does."""
    with opened(project.edits_lock) as lock:
        if not taken_alone(lock):
            raise UserError(
                f"Edits are being made or used in {project.root}. Wait for that to end."
            )
        yield


@contextmanager
def own_device(project: Project, device: str) -> Iterator[str]:
    """Give a device for oneself alone where the machine has several GPUs and none is named.

    Steps that run at once, processes of their own, each get another; waits while none is free. Any
    other device is given as it is.
    """
    chosen = choose_device(device)
    gpus = count_gpus() if chosen == "cuda" else 0
    if gpus < 2:
        yield chosen
        return
    locks_here = project.state / "devices" / socket.gethostname()  # others share the folder
    with ExitStack() as stack:
        locks = [
            stack.enter_context(opened(locks_here / f"cuda-{number}.lock"))
            for number in range(gpus)
        ]
        told = False
        while (
            free := next((n for n, lock in enumerate(locks) if taken_alone(lock)), None)
        ) is None:
            if not told:
                _log.warning(
                    "All %d GPUs are taken, by the locks in %s: waiting for one. The pool gpu "
                    "needs no more slots than there are GPUs.",
                    gpus,
                    locks_here,
                )
            told = True
            time.sleep(_LOOK_AGAIN_SECONDS)
        yield f"cuda:{free}"


def opened(lock: Path) -> TextIO:
    """Open a lock file, made where it is missing; `flock` takes it, closing gives it back."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    # NFS shares a lock with readers alone. Whatever a damaged one holds is no name.
    return lock.open("a+", encoding="utf-8", errors="replace")


def taken_alone(lock: TextIO) -> bool:
    """Take the lock for oneself alone, if nobody holds it; closing the file gives it back."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _how_to_end(processes: list[int]) -> str:
    """Return what to do about the run that these processes of this machine are, as a sentence."""
    if not processes:  # it is of another machine
        return "Wait for it to end."
    found = " ".join(map(str, processes))
    return f"Wait for it to end; if it hangs, `kill -9 {found}` ends it, and the next run goes on."


def holders(*files: Path) -> list[int]:
    """Return the processes of this machine, but for this one, that have one of the files open."""
    paths, found = {str(file.resolve()) for file in files}, set[int]()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's, or gone by now
            if paths & {file.path for file in process.open_files()}:
                found.add(process.pid)
    return sorted(found - {os.getpid()})
