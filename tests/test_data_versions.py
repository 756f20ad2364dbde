"""Promise: any version of the data comes back, and its models with it, to the same figures."""

import fcntl
import json
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import quick_settings, tiny_editor, write_classes

from diffusemix_pipeline.cli import main
from diffusemix_pipeline.layers import load_settings
from diffusemix_pipeline.orchestration.data_versions import DataVersion, history
from diffusemix_pipeline.orchestration.launch import Outcome, run_here
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings
from diffusemix_pipeline.versioning import pinned_digest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_editor(tmp_path_factory.mktemp("editor"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_classes(tmp_path_factory.mktemp("source") / "photos", ["cat", "dog"], 20)


def settings_of(weights: Path, source: Path, *overrides: str) -> Settings:
    return quick_settings(
        f"editing.editor={weights}",
        f"source.path={source}",
        "source.train_per_class=null",
        "source.val_fraction=0.2",
        "source.test_fraction=0.4",
        "training.steps=12",
        *overrides,
    )


def call(project: Project, *arguments: str) -> Result:
    with chdir(project.root):
        return CliRunner().invoke(main, arguments)


def accuracies(project: Project, outcome: Outcome) -> list[dict]:
    assert outcome.success, outcome.problems
    return json.loads((project.report / "report.json").read_text())["arms"]


def known(project: Project) -> list[DataVersion]:
    return history(project, quick_settings())


def test_an_older_version_comes_back_with_its_figures(project, weights, source):
    old = settings_of(weights, source)
    before = accuracies(project, run_here(project, old, silent))
    version = pinned_digest(project.root)
    assert version in call(project, "data", "status").output
    assert "data/ is as pinned" in call(project, "data", "status").output

    moved_on = settings_of(weights, source, "mixing.lam=0.5", "training.steps=5", "seed=3")
    assert accuracies(project, run_here(project, moved_on, silent)) != before
    assert pinned_digest(project.root) != version
    assert {one.digest for one in known(project)} == {version, pinned_digest(project.root)}
    table = call(project, "data", "history").output
    assert version[:8] in table
    assert f"{pinned_digest(project.root)[:8]}*" in table

    back = call(project, "data", "checkout", version[:6])
    assert back.exit_code == 0, back.output
    assert pinned_digest(project.root) == version
    assert "data/ is as pinned" in call(project, "data", "status").output
    kept = project.root / back.output.split("--config ")[1].strip()
    shutil.rmtree(project.checkpoints)  # so that all is trained and asked again
    shutil.rmtree(project.evidence)
    again = load_settings(project.root, config=kept, environment={})
    assert again.source.path == ""
    assert accuracies(project, run_here(project, again, silent)) == before
    assert pinned_digest(project.root) == version


def test_a_checkout_undoes_what_a_killed_run_left_and_waits_for_none(project, weights, source):
    def git(*command: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *who, *command], cwd=project.root, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init")
    (project.root / ".gitignore").write_text("/.diffusemix\n/outputs\n")
    settings = settings_of(weights, source)
    assert run_here(project, settings, silent).success
    git("add", ".")
    git("commit", "-m", "data")
    (project.root / "README").touch()
    git("add", ".")
    git("commit", "-m", "another")
    version = pinned_digest(project.root)
    shutil.rmtree(project.raw / "train")
    shutil.rmtree(project.augmented)
    (project.root / "dropped.txt").write_text("0123456789abcdef\n")
    back = call(project, "data", "checkout", git("rev-parse", "HEAD"))  # which inherits data.dvc
    assert back.exit_code == 0, back.output
    assert version in back.output
    assert "data/ is as pinned" in call(project, "data", "status").output
    assert f"put outputs/dropped-{version[:8]}.txt in its place" in back.output
    assert (project.root / f"outputs/dropped-{version[:8]}.txt").read_bytes() == b""

    shutil.rmtree(project.raw / "train")
    assert call(project, "data", "pull").exit_code == 0
    assert "data/ is as pinned" in call(project, "data", "status").output
    with project.run_lock.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        for command in (["checkout", version], ["pull"]):
            refused = call(project, "data", *command)
            assert refused.exit_code == 2
            assert "Another is at work" in refused.output


def test_a_version_that_taught_no_classifier_anything_new_is_found(project, weights, source):
    arms = "training.arms=[vanilla]"
    assert run_here(project, settings_of(weights, source, arms), silent).success
    first = pinned_digest(project.root)
    assert run_here(project, settings_of(weights, source, arms, "mixing.lam=0.5"), silent).success
    second = pinned_digest(project.root)
    assert second != first
    assert {one.digest for one in known(project)} == {first, second}
    assert call(project, "data", "checkout", first).exit_code == 0
    back = call(project, "data", "checkout", second)
    assert back.exit_code == 0, back.output
    kept = load_settings(
        project.root, config=project.root / back.output.split("--config ")[1].strip()
    )
    assert kept.mixing.lam == 0.5


def test_what_cannot_be_brought_back_is_named_and_nothing_changes(project, weights, source):
    assert run_here(project, settings_of(weights, source), silent).success
    pin = (project.root / "data.dvc").read_bytes()
    assert "is not known" in call(project, "data", "checkout", "f" * 32).output
    assert "No DVC remote" in call(project, "data", "push").output
    [version] = known(project)
    shutil.rmtree(project.root / ".dvc" / "cache")
    (project.state / "data_version").unlink()
    lost = call(project, "data", "checkout", version.digest)
    assert lost.exit_code == 2
    assert "neither in the DVC cache here nor on a remote" in lost.output
    assert (project.root / "data.dvc").read_bytes() == pin
    assert project.augmented.exists()


def test_what_is_pushed_comes_back_elsewhere(project, weights, source, tmp_path):
    assert run_here(project, settings_of(weights, source), silent).success
    remote, config = tmp_path / "remote", project.root / ".dvc" / "config"
    remote.mkdir()
    added = ["remote", "add", "-d", "there", str(remote)]
    subprocess.run([sys.executable, "-m", "dvc", *added], cwd=project.root, check=True)
    assert "Pushed to the DVC remote 'there'" in call(project, "data", "push").output
    clone = Project(tmp_path / "clone")
    (clone.root / ".dvc").mkdir(parents=True)
    shutil.copy(config, clone.root / ".dvc" / "config")
    shutil.copy(project.root / "data.dvc", clone.root)
    assert pinned_digest(project.root) in call(clone, "data", "pull").output
    assert clone.augmented.exists()
