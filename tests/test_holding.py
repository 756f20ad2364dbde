"""Promise: one run or command at a time; whoever waits or is refused is told for whom."""

import fcntl
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import time
from contextlib import chdir
from multiprocessing.queues import SimpleQueue
from typing import TextIO

import dagster as dg
import pytest
from conftest import quick_settings

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.locks import note_holder, taken_alone
from diffusemix_pipeline.orchestration import holding
from diffusemix_pipeline.orchestration.holding import held_for_run, without_runs
from diffusemix_pipeline.orchestration.launch import prepare_instance, run_here
from diffusemix_pipeline.orchestration.lost_runs import PROCESS_TAG
from diffusemix_pipeline.processes import this_process
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.project import Project

FORK = multiprocessing.get_context("fork")
LOG = logging.getLogger(__name__)
HOLDS = """
import fcntl, sys, time
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_SH)
print(flush=True)
time.sleep(60)
"""


@pytest.fixture
def instance(project, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", str(project.root))
    prepare_instance(project)
    project.state.mkdir(exist_ok=True)
    with chdir(project.root), dg.DagsterInstance.get() as instance:
        yield instance


def started(instance: dg.DagsterInstance, tags: dict[str, str]) -> dg.DagsterRun:
    return instance.add_run(
        dg.DagsterRun(job_name="diffusemix", status=dg.DagsterRunStatus.STARTED, tags=tags)
    )


def noted(project: Project, run: dg.DagsterRun) -> None:
    """Leave the lock as a run's step leaves it that has ended."""
    with project.run_lock.open("a+") as lock:
        note_holder(lock, f"run {run.run_id}")


def test_a_run_that_may_hang_is_named_with_what_ends_it(project):
    project.state.mkdir()
    command = [sys.executable, "-c", HOLDS, str(project.run_lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"\n"
        with (
            pytest.raises(UserError, match=f"if it hangs, `kill -9 {other.pid}` ends it"),
            without_runs(project),
        ):
            pytest.fail("somebody is at work")
        other.kill()
    with without_runs(project):
        pass


def test_a_run_holds_the_project_between_two_of_its_steps(instance, project):
    other = started(instance, {PROCESS_TAG: this_process()})
    noted(project, other)
    told = rf"Another is at work in \S+: run {other.run_id} on \S+.* `kill -9 {os.getpid()}` ends"
    with pytest.raises(UserError, match=told), without_runs(project):
        pytest.fail("a run is at work")
    with pytest.raises(UserError, match=told):
        run_here(project, quick_settings(), silent)
    step = held_for_run(project, "another", "multiprocess", instance, LOG)
    with pytest.raises(dg.Failure, match=told), step:
        pytest.fail("a run is at work")
    instance.report_run_failed(other)
    with without_runs(project):
        pass


@pytest.mark.parametrize("process", ["another-host 1 1", f"{os.uname().nodename} 1 9999999"])
def test_a_run_that_is_not_known_to_live_holds_nothing(instance, project, process):
    noted(project, started(instance, {PROCESS_TAG: process}))
    with without_runs(project), pytest.raises(BlockingIOError), project.run_lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with held_for_run(project, "another", "multiprocess", instance, LOG):
        assert project.run_lock.read_text().startswith("run another\n")


def step_of(
    project: Project, run_id: str, told: SimpleQueue, inherited: TextIO | None = None
) -> None:
    """Hold the project for a moment, as a step of a run does."""
    if inherited:
        inherited.close()  # or this process would hold its lock, too
    with dg.DagsterInstance.from_config(str(project.root)) as instance:
        try:
            with held_for_run(project, run_id, "multiprocess", instance, LOG):
                time.sleep(0.3)
            told.put("held")
        except dg.Failure as failure:
            told.put(str(failure.description))


def test_steps_that_wait_together_for_a_command_all_go_on(instance, project, monkeypatch):
    monkeypatch.setattr(holding, "_MOMENT_SECONDS", 3)
    run = started(instance, {PROCESS_TAG: this_process()})
    for last in (False, False, False, True):
        told = FORK.SimpleQueue()
        with project.run_lock.open("a+") as lock:
            assert taken_alone(lock)
            note_holder(lock, "process 4711")
            of_run = (project, run.run_id, told, lock)
            steps = [FORK.Process(target=step_of, args=of_run) for _ in range(4)]
            for step in steps:
                step.start()
            time.sleep(5 if last else 0.1)  # longer than it takes steps to agree
        assert [told.get() for _ in steps] == ["held"] * 4
        for step in steps:
            step.join()


def test_a_damaged_lock_names_nobody(project):
    project.state.mkdir()
    project.run_lock.write_bytes(b"\x93junk\xff")
    with without_runs(project):
        assert project.run_lock.read_text().startswith("process ")


def test_a_project_whose_runs_nobody_can_tell_of_is_not_taken(instance, project):
    noted(project, started(instance, {PROCESS_TAG: this_process()}))
    (project.root / "dagster.yaml").write_text("storage: 1")
    with pytest.raises(UserError, match=r"Mend dagster\.yaml"), without_runs(project):
        pytest.fail("a run may be at work")


def test_of_two_runs_that_start_at_once_one_is_refused(instance, project):
    told = FORK.SimpleQueue()
    both = [started(instance, {PROCESS_TAG: this_process()}).run_id for _ in range(2)]
    steps = [FORK.Process(target=step_of, args=(project, run, told)) for run in both]
    for step in steps:
        step.start()
    said = sorted(told.get() for _ in steps)
    assert said[1] == "held"
    assert re.match(rf"Another is at work in {project.root}: run ({both[0]}|{both[1]}) on", said[0])
