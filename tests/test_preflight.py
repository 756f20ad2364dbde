"""Promise: a mistake is told before any work is done, and a person's files are never touched."""

from contextlib import nullcontext

import pytest
from conftest import quick_settings, write_classes

from diffusemix_pipeline import preflight
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.preflight import check_outputs, check_processes, check_run
from diffusemix_pipeline.project import Project


def test_a_project_with_images_elsewhere_may_run(project):
    photos = write_classes(project.root / "photos", ["cat", "dog"], 1)
    (project.data / "raw").mkdir(parents=True)
    (project.data / ".gitkeep").touch()
    check_run(project, quick_settings(f"source.path={photos}"))
    check_outputs(project)


@pytest.mark.parametrize("where", ["data", "data/raw", ".diffusemix/augment"])
def test_images_where_the_pipeline_writes_are_not_its_source(where, project):
    write_classes(project.root / where, ["cat", "dog"], 1)
    with pytest.raises(UserError, match="lies where only the pipeline writes"):
        check_run(project, quick_settings(f"source.path={project.root / where}"))


def test_a_source_that_holds_the_project_is_refused(project):
    write_classes(project.root, ["cat", "dog"], 1)
    with pytest.raises(UserError, match="holds this project"):
        check_run(project, quick_settings(f"source.path={project.root}"))


def test_files_of_others_in_data_are_named(project):
    write_classes(project.data / "train", ["cat", "dog"], 1)
    (project.data / "notes.txt").touch()
    with pytest.raises(UserError, match="holds notes.txt, train"):
        check_run(project, quick_settings())


@pytest.mark.parametrize("stage", ["generated", "hybrid", "augmented", "report"])
def test_what_would_be_written_over_is_looked_at_first(stage, project):
    folder = getattr(project, stage)
    folder.mkdir(parents=True)
    (folder / "mine.txt").touch()
    with pytest.raises(UserError, match=f"{folder.name} would be written anew"):
        check_outputs(project)


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:1", 4, "the first of this machine's, so not device: cuda:1"),
        ("mps", 0, "so not device: mps"),
        ("cuda", 1, "2 processes want a GPU each, and this machine has 1"),
        ("cuda", 2, None),
        ("cpu", 0, None),
    ],
)
def test_processes_that_train_together_need_a_device_each(monkeypatch, device, gpus, message):
    monkeypatch.setattr(preflight, "count_gpus", lambda: gpus)
    asked = quick_settings("training.processes=2", f"device={device}")
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_processes(asked)


@pytest.mark.parametrize("prompts", ["[sunset, Snowy]", "[sunset, night, fog]"])
def test_the_bundled_editor_says_which_prompts_it_does_not_know(prompts, project, recwarn):
    check_run(project, quick_settings(f"editing.prompts={prompts}"))
    told = [str(warning.message) for warning in recwarn if "prompts" in str(warning.message)]
    if "night" in prompts:
        [warning] = told
        assert "does not know these prompts: night, fog." in warning
    else:
        assert not told


def test_a_device_is_looked_for_where_its_steps_run(project):
    write_classes(project.root / "photos", ["cat", "dog"], 1)
    asked = [f"source.path={project.root / 'photos'}"]
    (project.root / "project").mkdir()
    inner = Project(project.root / "project")
    with pytest.raises(UserError, match="device: this machine has no cuda:7"):
        check_run(inner, quick_settings(*asked, "device=cuda:7"))
    check_run(inner, quick_settings(*asked, "device=cuda", "executor=ray"))  # on a node with a GPU
    with pytest.raises(UserError, match="a GPU of its own, so there is no cuda:7"):
        check_run(inner, quick_settings(*asked, "device=cuda:7", "executor=ray"))
