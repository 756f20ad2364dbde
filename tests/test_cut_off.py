"""Promises 2 and 3: whatever kills a run, shards it or runs its steps, the bytes are the same."""

import multiprocessing
import os
import random
import re
import shutil
import signal
from collections import Counter
from contextlib import chdir
from itertools import pairwise
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from threading import Timer

import dagster as dg
import pytest
from conftest import ASSETS, quick_settings, tiny_editor, wait_for

from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.locks import taken_alone
from diffusemix_pipeline.orchestration.launch import prepare_instance, run_here
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings

pytestmark = pytest.mark.slow
BATCH = 2
# A stage, what it says while it is at work, and what it makes.
PHASES = {
    "raw": ["Checking images", "Copying images"],
    "generated": [
        "Training fold teacher",
        "Editing a pilot",
        "Editing images",
        "Judging edits",
        "Linking edits",
    ],
    "hybrid": ["Mixing hybrid images"],
    "augmented": ["Making fractals", "Mixing augmented images", "Pinning data/ with DVC"],
    "training": ["Training vanilla", "Training diffusemix"],
    "report": ["Evaluating images", "AutoAttack"],
}
MADE = {
    "raw": ["data/raw"],
    "generated": [".diffusemix/gate", "data/generated"],
    "hybrid": ["data/hybrid"],
    "augmented": ["data/augmented", "data.dvc"],
    "training": [".diffusemix/checkpoints"],
    "report": [".diffusemix/evidence", "outputs/report"],
}
KILLS = 20
STOPPED = "Stopped before its end: run again, which goes on where it was."
# A run is a process of its own, forked where everything that it imports is there already.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "diffusemix_pipeline.editing.instruct_pix2pix",
        "diffusemix_pipeline.orchestration.learning",
        "diffusemix_pipeline.training.loop",
        "mlflow",
    ]
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_editor(tmp_path_factory.mktemp("editor"))


@pytest.fixture(scope="module")
def undisturbed(weights, tmp_path_factory) -> dict[str, bytes]:
    """What one run that nothing disturbs makes."""
    project = Project(tmp_path_factory.mktemp("undisturbed"))
    outcome = run_here(project, wanted(weights), silent)
    assert outcome.success, outcome.problems
    return made(project)


def wanted(weights: Path, *overrides: str) -> Settings:
    return quick_settings(
        f"editing.editor={weights}",
        f"editing.batch_size={BATCH}",
        "editing.copies=2",
        "training.steps=8",
        # Teachers of eight steps know nothing, but let some edits through.
        "editing.gate.enabled=true",
        "editing.gate.folds=2",
        "editing.gate.max_change=1",
        "editing.gate.false_reject_rate=0.25",
        *overrides,
    )


def made(project: Project) -> dict[str, bytes]:
    """Return the bytes of everything that a run makes for keeps, checkpoints among it."""
    tops = [project.data, project.checkpoints]
    files = [path for top in tops for path in sorted(top.rglob("*")) if path.is_file()]
    files.append(project.root / "data.dvc")
    return {path.relative_to(project.root).as_posix(): path.read_bytes() for path in files}


@pytest.mark.timeout(3600)
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_bytes(undisturbed, weights, tmp_path):
    project, rng = Project(tmp_path), random.Random(0)
    stages = sorted((list(PHASES) * 4)[:KILLS], key=list(PHASES).index)
    assert min(Counter(stages).values()) >= 3
    for stage in stages:
        stored = len(list(EditStore(project.edits)))
        told = killed_in_flight(stage, project, weights, rng)
        kept = len(list(EditStore(project.edits))) - stored
        assert kept >= edits_told(told)
    assert run_here(project, wanted(weights), silent).success
    assert made(project) == undisturbed


def edits_told(told: list[tuple[str, int, int]]) -> int:
    """Return how many edits a run said that it had made."""
    done = [done for description, done, _ in told if description.startswith("Editing")]
    return sum(now - before for before, now in pairwise([0, *done]) if now > before)


def killed_in_flight(
    stage: str, project: Project, weights: Path, rng: random.Random
) -> list[tuple[str, int, int]]:
    """Start a run and kill -9 it at a random moment of a stage; return all progress that it told.

    The last thing told is of this stage and not the end of it: work was in flight.
    """
    phases = tuple(PHASES[stage][rng.randrange(len(PHASES[stage])) :])
    log = project.root / "told.log"
    for _ in range(5):
        pinning = phases[0].startswith("Pinning")
        share, seconds = (
            rng.uniform(0, 0.4 if pinning else 0.8),
            rng.uniform(0, 0.5 if pinning else 0.003),
        )
        log.write_text("")
        run = FORKED.Process(
            target=run_until_killed, args=(project, wanted(weights), phases, share, seconds, log)
        )
        run.start()
        run.join()
        assert run.exitcode == -signal.SIGKILL, log.read_text()
        lines = (line.rsplit("|") for line in log.read_text().splitlines())
        told = [(description, int(done), int(total)) for description, done, total in lines]
        last, done, total = told[-1]
        if done < total and last.startswith(phases):
            return told
        # A kill that came too late is none: let the stage work again.
        for path in [
            *(project.root / name for name in MADE[stage]),
            *project.aside.glob("*.begun"),
        ]:
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    pytest.fail(f"no kill hit {stage} at work; the last came after {told[-1]}")


def run_until_killed(
    project: Project,
    settings: Settings,
    phases: tuple[str, ...],
    share: float,
    seconds: float,
    log: Path,
) -> None:
    """Run, and kill this process so many seconds after a share of one of the phases is done."""
    told = os.open(log, os.O_WRONLY | os.O_APPEND)

    def tell(description: str, done: int, total: int) -> None:
        os.write(told, f"{description}|{done}|{total}\n".encode())
        if description.startswith(phases) and done >= int(share * total):
            Timer(seconds, os.kill, [os.getpid(), signal.SIGKILL]).start()

    run_here(project, settings, tell)


def test_shards_give_the_same_bytes(undisturbed, weights, tmp_path):
    project = Project(tmp_path)
    assert run_here(project, wanted(weights, "editing.shards=3"), silent).success
    assert made(project) == undisturbed


def test_the_multiprocess_executor_gives_the_same_bytes(undisturbed, weights, tmp_path):
    project = Project(tmp_path)
    prepare_instance(project)
    with dg.DagsterInstance.get() as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 2)
    asked = wanted(weights, "editing.shards=3", "executor=multiprocess")
    outcome = run_here(project, asked, silent)
    assert outcome.success, outcome.problems
    assert sorted(outcome.metadata) == sorted(ASSETS)
    assert made(project) == undisturbed
    with chdir(project.root), dg.DagsterInstance.get() as instance:
        steps = {event.step_key: event.pid for event in events_of(instance, outcome.run_id)}
    assert len(set(steps.values())) == len(steps) > 7, "a process a step"


@pytest.mark.timeout(1800)
def test_steps_end_with_their_run_that_is_killed(undisturbed, weights, tmp_path):
    """Or they would hold the project, for hours perhaps, and the next run could not start."""
    project, asked = Project(tmp_path), wanted(weights, "executor=multiprocess")
    run = FORKED.Process(target=run_here, args=(project, asked, silent))
    run.start()
    wait_for(lambda: len(list(EditStore(project.edits))) > BATCH or not run.is_alive())
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    with project.run_lock.open("a+") as lock:
        wait_for(lambda: taken_alone(lock))
    stored = set(EditStore(project.edits))
    outcome = run_here(project, asked, silent)
    assert outcome.success, outcome.problems
    assert stored < set(EditStore(project.edits)), "it was killed at work"
    assert made(project) == undisturbed


@pytest.mark.timeout(1800)
def test_of_two_runs_at_once_one_is_told_who_is_at_work(undisturbed, weights, tmp_path):
    project, told = Project(tmp_path), FORKED.SimpleQueue()
    both = [
        FORKED.Process(target=run_and_tell, args=(project, wanted(weights), told)) for _ in range(2)
    ]
    for run in both:
        run.start()
    found = sorted(told.get() for _ in both)
    for run in both:
        run.join()
    assert found[0] == ""
    assert re.match(rf"Another is at work in {project.root}: (run|process) \S+ on ", found[1])
    assert made(project) == undisturbed


def run_and_tell(
    project: Project, settings: Settings, told: SimpleQueue, progress: Progress = silent
) -> None:
    try:
        told.put("".join(run_here(project, settings, progress).problems))
    except UserError as refused:
        told.put(str(refused))
    except BaseException as error:  # or the test would wait for ever
        told.put(repr(error))
        raise


@pytest.mark.timeout(1800)
def test_a_run_that_is_stopped_says_that_it_can_go_on(undisturbed, weights, tmp_path):
    project, told = Project(tmp_path), FORKED.SimpleQueue()
    asked = wanted(weights, "editing.shards=2")
    run = FORKED.Process(target=run_and_tell, args=(project, asked, told, stop_in_a_shard))
    run.start()
    assert told.get() == STOPPED
    run.join()
    assert len(list(EditStore(project.edits))) < 60, "the other shard was not begun"
    assert run_here(project, wanted(weights), silent).success
    assert made(project) == undisturbed


@pytest.mark.timeout(1800)
def test_a_run_of_processes_that_is_stopped_says_so_too(weights, tmp_path):
    project, told = Project(tmp_path), FORKED.SimpleQueue()
    asked = wanted(weights, "executor=multiprocess")
    run = FORKED.Process(target=run_and_tell, args=(project, asked, told))
    run.start()
    wait_for(lambda: len(list(EditStore(project.edits))) > BATCH or not run.is_alive())
    os.kill(run.pid, signal.SIGINT)
    assert told.get() == STOPPED
    run.join()
    assert not project.hybrid.exists()


def stop_in_a_shard(description: str, done: int, total: int) -> None:
    """Do what Ctrl-C does, once edits of a shard are made."""
    if description.startswith("Editing images") and done:
        os.kill(os.getpid(), signal.SIGINT)


def events_of(instance: dg.DagsterInstance, run_id: str) -> list[dg.DagsterEvent]:
    logs = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_START)
    return [log.dagster_event for log in logs if log.dagster_event]
