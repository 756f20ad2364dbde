"""Each fault of docs/faults.md: what a person sees, and that a plain run afterwards ends the same.

One fault a row, drawn once; `python -m benchmarks.soak` strikes a hundred.
"""

import random
import re
from typing import Any

import pytest

from benchmarks import soak

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> soak.Bench:
    made = soak.Bench(tmp_path_factory.mktemp("soak"), latest=True)
    soak.prepare(made)
    return made


def struck(bench: soak.Bench, kind: str, seed: int = 0) -> dict[str, Any]:
    """Let a fault strike; a plain run afterwards has to end as if nothing had been."""
    bench.rng = random.Random(seed)
    done = soak.one_round(bench, kind)
    assert done["again"] == 0, done["said_again"]
    assert done["differs"] == []
    return done


def test_a_killed_worker(bench):
    done = struck(bench, "worker killed")
    assert done["code"] == 2
    assert "process was killed, as the system does where memory runs out" in done["seen"]


def test_everything_killed(bench):
    assert struck(bench, "everything killed")["code"] == -9


def test_a_killed_daemon(bench):
    assert struck(bench, "daemon killed")["seen"] == "diffusemix: SUCCESS"


@pytest.mark.skipif(
    not soak.may_mount(),
    reason="user namespaces, in which a disk can be mounted, are not allowed here",
)
def test_a_full_disk(bench):
    done = struck(bench, "disk full")
    assert done["code"] == 2
    # SQLite, which may be the first, does not say which it was.
    assert re.search(
        "(make room on the disk|whether the disk or the memory is full) and run", done["seen"]
    )


def test_a_read_only_folder(bench):
    done = struck(bench, "folder read-only", seed=13)  # .diffusemix/aside, from the start
    assert done["code"] == 2
    assert "Permission denied: 'PROJECT/" in done["seen"]
    assert "make it writable and run again" in done["seen"]


@pytest.mark.skipif(soak.faketime() is None, reason="libfaketime is not installed")
def test_a_clock_that_goes_back(bench):
    assert struck(bench, "clock back")["code"] == 0


def test_mlflow_down_at_the_start(bench):
    done = struck(bench, "MLflow down at start")
    assert done["code"] == 2
    assert "(tracking.uri) cannot be used" in done["seen"]


def test_mlflow_down_in_training(bench):
    done = struck(bench, "MLflow down in training")
    assert done["code"] == 2
    assert "start MLflow's server and run again" in done["seen"]


def test_mlflow_down_at_the_end(bench):
    done = struck(bench, "MLflow down at the end")
    assert done["code"] == 2
    assert "start MLflow's server and run again" in done["seen"]


def test_a_dvc_remote_that_is_gone(bench):
    done = struck(bench, "DVC remote gone")
    assert done["code"] == 2
    assert "failed with the DVC remote 'store'" in done["seen"]


def test_dagsters_database_locked(bench):
    done = struck(bench, "Dagster's database locked")  # for two seconds
    assert done["code"] == 0


def test_dagsters_database_locked_for_long(bench):
    done = struck(bench, "Dagster's database locked", seed=13)  # for as long as the run lives
    assert done["code"] == 2
    assert "database is locked: end what holds" in done["seen"]
    assert "It is open in: N." in done["seen"]


def test_too_little_memory_in_the_editor(bench):
    done = struck(bench, "out of memory")
    assert done["code"] == 2
    assert "too little memory for one edit of N px: free some and run again" in done["seen"]


def test_a_step_that_hangs(bench):
    done = struck(bench, "step hangs")
    assert "if it hangs, `kill -9 N` ends it" in done["seen"]
