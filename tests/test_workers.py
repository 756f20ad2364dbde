"""Promise: work on all cores ends, however it ends, and a killed process is told in words."""

import os
import signal
from multiprocessing import get_context

import pytest

from diffusemix_pipeline import workers
from diffusemix_pipeline.errors import UserError

KEPT: list[Exception] = []


def killed(item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails_half_way() -> None:
    """Keep an error that knows of workers, as whoever tells of it later does."""
    try:
        with workers.in_processes(abs, range(100)) as results:
            next(results)
            raise RuntimeError
    except RuntimeError as error:
        KEPT.append(error)


def test_a_killed_worker_is_told_with_what_to_do(monkeypatch):
    monkeypatch.setattr(workers, "usable_cores", lambda: 2)
    with (
        pytest.raises(UserError, match="was killed.*free memory and run again"),
        workers.in_processes(killed, [1, 2]) as results,
    ):
        list(results)


def test_a_process_ends_whose_work_on_all_cores_failed():
    process = get_context("forkserver").Process(target=fails_half_way)
    process.start()
    process.join(30)
    ended = process.exitcode
    process.kill()
    assert ended == 0
