"""Promise: a shard that fails is tried again, and can be run again without the others."""

import os
from contextlib import chdir, contextmanager
from pathlib import Path

import dagster as dg
import pytest
import yaml
from conftest import quick_settings, tiny_editor

from diffusemix_pipeline.editing import generate
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.layers import load_settings
from diffusemix_pipeline.orchestration.assets import generated_images
from diffusemix_pipeline.orchestration.build import build_definitions
from diffusemix_pipeline.orchestration.launch import prepare_instance
from diffusemix_pipeline.project import Project

pytestmark = pytest.mark.slow


def the_job() -> dg.JobDefinition:
    root = Path(os.environ["DAGSTER_HOME"])
    return build_definitions(Project(root), load_settings(root)).resolve_job_def("diffusemix")


@pytest.fixture
def instance(project, tmp_path_factory, monkeypatch):
    weights = tiny_editor(tmp_path_factory.mktemp("editor"))
    settings = quick_settings(f"editing.editor={weights}", "editing.shards=3")
    (project.root / "diffusemix.yaml").write_text(yaml.safe_dump(settings.model_dump()))
    monkeypatch.setenv("DAGSTER_HOME", str(project.root))
    prepare_instance(project)
    with chdir(project.root), dg.DagsterInstance.get() as instance:
        yield instance


def shards_of(result: dg.JobExecutionResult) -> list[str]:
    """Return which shards ended well, each as often as it did."""
    steps = (event.step_key for event in result.all_events if event.is_step_success)
    return sorted(step.split("[")[1] for step in steps if "edit_shard[" in step)


def test_a_device_that_fails_once_fails_no_run(instance, monkeypatch):
    real, calls, devices = generate.make_edits, [], set()

    @contextmanager
    def own_device(project, device):
        yield f"one's own {device}"

    def make_edits(plan, **how):
        calls.append(how["shard"])
        devices.add(how.pop("device"))
        if calls.count(1) == 1 and how["shard"] == 1:
            raise RuntimeError("the device was lost")
        return real(plan, device="cpu", **how)

    monkeypatch.setattr(generated_images, "own_device", own_device)
    monkeypatch.setattr(generate, "make_edits", make_edits)
    with dg.execute_job(dg.reconstructable(the_job), instance) as result:
        assert result.success
        assert sorted(calls) == [0, 1, 1, 2]
    assert devices == {f"one's own {quick_settings().device}"}


def test_a_failed_shard_is_run_again_without_the_others(instance, monkeypatch):
    real, calls = generate.make_edits, []

    def make_edits(plan, **how):
        calls.append(how["shard"])
        if how["shard"] == 1:
            raise UserError("the disk is full")
        return real(plan, **how)

    with monkeypatch.context() as broken:
        broken.setattr(generate, "make_edits", make_edits)
        with dg.execute_job(dg.reconstructable(the_job), instance) as failed:
            assert not failed.success
            assert sorted(calls) == [0, 1, 2]  # a person's mistake is not tried twice
            assert shards_of(failed) == ["shard_0]", "shard_2]"]
    from_failure = dg.ReexecutionOptions.from_failure(failed.run_id, instance)
    with dg.execute_job(
        dg.reconstructable(the_job), instance, reexecution_options=from_failure
    ) as again:
        assert again.success
        assert shards_of(again) == ["shard_1]"]
        assert not [e for e in again.all_events if e.step_key == "raw_dataset"]
