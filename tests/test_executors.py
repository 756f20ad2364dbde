"""Promise: executor, number of shards and the way in which images lie change no byte of them.

The same on a Ray cluster: test_ray.py.
"""

import hashlib
import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import dagster as dg
import pytest
import yaml
from conftest import ASSETS, quick_settings, tiny_editor, write_digits

from diffusemix_pipeline.datasets.manifest import read_stage
from diffusemix_pipeline.orchestration.launch import prepare_instance
from diffusemix_pipeline.project import Project

pytestmark = pytest.mark.slow
SHARDS = {
    "one shard": ("editing.shards=1",),
    "eight shards": ("editing.shards=8", "storage.shard_images=63"),  # 400 are for training
}
WAYS = {
    f"{layout}, {name}": (f"storage.format={layout}", *shards)
    for layout in ("files", "tar")
    for name, shards in SHARDS.items()
}
"""In which images lie, and as how many steps and tars."""
MADE = """
import sys
import dagster as dg
from diffusemix_pipeline.orchestration.launch import main_job
from diffusemix_pipeline.layers import load_settings
from pathlib import Path

if __name__ == "__main__":
    settings = load_settings(Path.cwd())
    how_made = str(Path.cwd()), settings.executor
    job = dg.build_reconstructable_job(main_job.__module__, main_job.__name__, how_made)
    assets = frozenset(map(dg.AssetKey, sys.argv[1:]))
    without_checks = job.get_subset(asset_selection=assets, asset_check_selection=frozenset())
    config = {"resources": {"settings": {"config": settings.model_dump()}}}
    with dg.DagsterInstance.get() as instance:
        assert dg.execute_job(without_checks, instance, run_config=config).success
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """500 images, and an editor."""
    folder = tmp_path_factory.mktemp("inputs")
    photos = write_digits(folder / "photos", last=500)
    split = ["source.train_per_class=null", "source.val_fraction=0.1", "source.test_fraction=0.1"]
    return [f"source.path={photos}", f"editing.editor={tiny_editor(folder / 'editor')}", *split]


def images_of(project: Project) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of each image's bytes, by stage and name, and each stage's version."""
    found = {}
    for folder in (project.raw, project.generated, project.hybrid, project.augmented):
        stage = read_stage(folder)
        names = stage.manifest(["file_name"])["file_name"]
        found[stage.name] = {n: hashlib.sha256(stage.files.read(n)).hexdigest() for n in names}
        found[stage.name]["version"] = stage.version
    return found


def made(root: Path, inputs: list[str], *how: str, **environment: str) -> dict[str, dict[str, str]]:
    """Materialize what makes images, in a process of its own; return what it made."""
    project, settings = Project(root), quick_settings(*inputs, *how)
    (root / "diffusemix.yaml").write_text(yaml.safe_dump(settings.model_dump()))
    prepare_instance(project)
    with chdir(root), dg.DagsterInstance.get() as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 2)  # shards run beside each other
    home = os.environ | environment | {"DAGSTER_HOME": str(root)}
    subprocess.run([sys.executable, "-c", MADE, *ASSETS[:4]], cwd=root, env=home, check=True)
    return images_of(project)


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory) -> dict[str, dict[str, str]]:
    root = tmp_path_factory.mktemp("plain")
    found = made(root, inputs, "executor=in_process", "storage.format=files")
    assert len(found["raw"]) == 501
    return found


@pytest.mark.parametrize(
    ("executor", "way"),
    [
        (executor, way)
        for executor in ("in_process", "multiprocess")
        for way in WAYS
        if (executor, way) != ("in_process", "files, one shard")  # that is `plain`
    ],
)
def test_the_same_500_images_are_made_however_they_are_made(plain, inputs, executor, way, tmp_path):
    assert made(tmp_path, inputs, f"executor={executor}", *WAYS[way]) == plain
    assert tars_in(tmp_path) == tars_of(way)


def tars_in(root: Path) -> int:
    return len(list((root / "data" / "augmented").glob("*.tar")))


def tars_of(way: str) -> int:
    return 0 if "files" in way else 8 if "eight" in way else 1
