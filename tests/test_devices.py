"""Promise: where there are several GPUs, each shard that is at work has one of its own."""

from concurrent.futures import ThreadPoolExecutor, TimeoutError

import pytest

from diffusemix_pipeline import devices, locks
from diffusemix_pipeline.locks import own_device
from diffusemix_pipeline.project import Project


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    monkeypatch.setattr(locks, "choose_device", lambda device: device.replace("auto", "cuda"))
    monkeypatch.setattr(locks, "count_gpus", lambda: 2)
    monkeypatch.setattr(locks, "_LOOK_AGAIN_SECONDS", 0.01)


@pytest.mark.parametrize(
    ("told", "cores"), [("max 100000\n", 4), ("200000 100000\n", 2), ("50000 100000\n", 1)]
)
def test_a_container_has_as_many_cores_as_it_is_given_time(told, cores, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(told)
    monkeypatch.setattr(devices, "_CONTAINER_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(4)))
    assert devices.usable_cores() == cores


@pytest.mark.usefixtures("two_gpus")
def test_each_gpu_has_one_user_and_the_next_waits_for_a_free_one(project: Project, caplog):
    with ThreadPoolExecutor() as pool, own_device(project, "auto") as first:
        second = own_device(project, "auto")
        assert {first, second.__enter__()} == {"cuda:0", "cuda:1"}
        third = own_device(project, "auto")
        waiting = pool.submit(third.__enter__)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        assert [record.message for record in caplog.records if "2 GPUs are taken" in record.message]
        second.__exit__(None, None, None)
        assert waiting.result(10) == "cuda:1"
        third.__exit__(None, None, None)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("named", ["cpu", "cuda:1", "mps"])
def test_a_device_that_is_named_is_given_as_it_is(project, named):
    with own_device(project, named) as one, own_device(project, named) as other:
        assert (one, other) == (named, named)


def test_without_several_gpus_nobody_waits(project):
    with own_device(project, "cpu") as one, own_device(project, "cpu") as other:
        assert one == other == "cpu"
