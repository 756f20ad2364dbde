"""Who holds a project: a run, from its first step to its last, or a command that changes data."""

import fcntl
import logging
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from typing import TextIO

import dagster as dg

from diffusemix_pipeline.errors import UserError, of_the_machine
from diffusemix_pipeline.files import clear_aside
from diffusemix_pipeline.locks import at_work, holder, note_holder, opened, taken_alone
from diffusemix_pipeline.orchestration.lost_runs import end_lost_runs, living_process
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Executor

_RUN = "run "
_DYING_SECONDS = 6  # in which a process that was killed gives up what it held: torch's readers
_MOMENT_SECONDS = 10  # in which steps that start at once agree who notes their run


@contextmanager
def without_runs(project: Project) -> Iterator[None]:
    """Let no run be at work meanwhile; UserError where one is, be it between two of its steps."""
    with opened(project.run_lock) as lock:
        until = time.monotonic() + _DYING_SECONDS
        while not (taken := taken_alone(lock)) and time.monotonic() < until:
            time.sleep(0.1)
        # What hangs may hold Dagster's database, too: it is asked last.
        process = _between_steps(project, lock) if taken else None
        if not taken or process:
            raise UserError(at_work(project, lock, process))
        note_holder(lock, f"process {os.getpid()}")
        yield


@contextmanager
def held_for_run(
    project: Project,
    run_id: str,
    executor: Executor,
    instance: dg.DagsterInstance,
    log: logging.Logger,
) -> Iterator[None]:
    """Share the project with the other steps of a run; dg.Failure where another is at work.

    Waits, and says so, while a command holds it alone.
    """
    name = _RUN + run_id
    project.state.mkdir(parents=True, exist_ok=True)
    with opened(project.run_lock) as lock:
        until = None
        while not _shared(lock, name, log):
            until = until or time.monotonic() + _MOMENT_SECONDS
            if taken_alone(lock):
                if process := _living_process(instance, lock, executor):
                    raise dg.Failure(at_work(project, lock, process), allow_retries=False)
                note_holder(lock, name)
                clear_aside(project.aside, project.stages)  # of what killed runs left there
                end_lost_runs(instance, on_server=False)
            elif time.monotonic() > until:
                raise dg.Failure(at_work(project, lock), allow_retries=False)
            else:  # steps that start at once try it in turn
                fcntl.flock(lock, fcntl.LOCK_UN)  # which NFS would not have taken away
                time.sleep(random.uniform(0, 0.1))
        yield


def _shared(lock: TextIO, name: str, log: logging.Logger) -> bool:
    """Share the lock with others; say whether it is held in this name."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        held_by, where = holder(lock)
        if held_by and not held_by.startswith(_RUN):
            log.warning("Waiting for %s on %s, which holds the project.", held_by, where)
        fcntl.flock(lock, fcntl.LOCK_SH)
    return holder(lock)[0] == name


def _between_steps(project: Project, lock: TextIO) -> int | None:
    """Return the process of the run that is noted, if it goes on; UserError where none can say."""
    from diffusemix_pipeline.preflight import check_databases

    name = holder(lock)[0]
    if not name.startswith(_RUN) or not (project.root / "dagster.yaml").exists():
        return None
    check_databases(project)
    try:
        with chdir(project.root), dg.DagsterInstance.from_config(str(project.root)) as instance:
            return _living_process(instance, lock, "in_process")
    except Exception as error:  # PostgreSQL's, alembic's, of Dagster's configuration
        if of_the_machine(f"{type(error).__name__}: {error}"):
            raise
        raise UserError(
            f"Dagster cannot be asked whether {name} is at work in {project.root}: {error} Mend "
            "dagster.yaml, or start the database that it names, and try again."
        ) from error


def _living_process(instance: dg.DagsterInstance, lock: TextIO, executor: Executor) -> int | None:
    """Return the process of the run that is noted, if it is known to live."""
    name, where = holder(lock)
    # A cluster's steps are on other machines than the process of their run.
    here = where.startswith(f"{socket.gethostname()},") and executor != "ray"
    if not name.startswith(_RUN):
        return None
    return living_process(instance, name.removeprefix(_RUN), here=here)
