"""Promises: the champion changes only by the rule, on val; the reason is noted either way."""

import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import quick_settings, tiny_editor, write_digits
from hypothesis import given
from hypothesis import strategies as st

from diffusemix_pipeline.cli import main
from diffusemix_pipeline.evaluation.promotion import (
    InClasses,
    ValScore,
    best_by_chance,
    decide,
)
from diffusemix_pipeline.orchestration.launch import Outcome, run_here
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.training.classifier import build_classifier

shares = st.floats(0, 1)
scores = st.builds(ValScore, shares, shares)


@given(scores, scores, shares)
def test_a_promoted_model_is_no_worse_on_average_and_nowhere_far_worse(new, old, tolerance):
    decision = decide(new, old, tolerance)
    no_worse = new.mean >= old.mean
    near = new.clean >= old.clean - tolerance and new.corrupted >= old.corrupted - tolerance
    assert decision.promoted == (no_worse and near)
    assert str(new) in decision.reason
    assert str(old) in decision.reason


@given(scores)
def test_without_a_champion_or_with_the_same_figures_a_model_is_promoted(new):
    assert decide(new, None, 0).promoted
    assert decide(new, new, 0).promoted


@given(st.lists(st.integers(1, 200), min_size=2, max_size=12))
def test_chance_reaches_the_floor_but_once_in_a_thousand_where_images_are_many(counts):
    floor, total = best_by_chance(counts), sum(counts)
    share = max(counts) / total
    assert share < floor < 1
    if floor < (share + 1) / 2:
        draws = np.random.default_rng(0).binomial(total, share, 20_000) / total
        assert (draws >= floor - 1e-9).mean() < 0.003


def test_a_good_model_passes_the_floor_of_few_or_unequal_images():
    assert best_by_chance([45, 5]) == pytest.approx(0.95)
    assert best_by_chance([4, 4]) == 0.75
    assert best_by_chance([20] * 10) < 0.2


def test_a_model_of_other_classes_and_another_size_answers_in_ours():
    torch.manual_seed(0)
    theirs = build_classifier("resnet10t", ["cat", "dog", "emu"], 48)
    theirs.model.eval()
    images = torch.rand(8, 3, 32, 32)
    ours = InClasses(theirs, ["ant", "dog", "cat"]).eval()
    answers = ours(images)
    assert answers.shape == (8, 3)
    assert (answers.softmax(1)[:, 0] == 0).all()  # it knows no ant
    large = torch.nn.functional.interpolate(images, (48, 48), mode="bilinear", antialias=True)
    assert torch.equal(answers[:, 1:], theirs.model(large)[:, [1, 0]])
    strangers = InClasses(theirs, ["ant", "bee"])(images)
    assert torch.isfinite(strangers.softmax(1)).all()


# With real runs


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_editor(tmp_path_factory.mktemp("editor"))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


def run(project: Project, weights: Path, *overrides: str) -> Outcome:
    settings = quick_settings(
        f"editing.editor={weights}",
        "source.train_per_class=20",
        "source.val_fraction=0.2",
        "source.test_fraction=0.1",
        "training.arms=[vanilla]",
        "training.batch_size=32",
        "checks.val_accuracy=null",
        *overrides,
    )
    return run_here(project, settings, silent)


def versions(project: Project) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return the registry's aliases, and the tags of each version."""
    client = mlflow.MlflowClient(f"sqlite:///{project.state / 'mlflow.db'}")
    model = client.get_registered_model("diffusemix-classifier")
    found = client.search_model_versions("name = 'diffusemix-classifier'")
    aliases = {name: str(version) for name, version in model.aliases.items()}
    return aliases, {str(version.version): version.tags for version in found}


@pytest.mark.slow
def test_a_champion_stays_until_a_model_is_no_worse(project, weights, tmp_path):
    first = run(project, weights, "training.steps=150")
    assert first.success, first.problems
    aliases, tags = versions(project)
    assert aliases["champion"] == "1"
    assert "challenger" not in aliases
    assert "no champion" in tags["1"]["promotion.reason"]
    assert float(tags["1"]["promotion.val_clean"]) > 0.6
    assert 0 < float(tags["1"]["promotion.test_clean"]) <= 1
    assert tags["1"]["promotion.test_reads"] == "1"

    again = run(project, weights, "training.steps=150")
    assert again.success
    assert again.reused

    client = mlflow.MlflowClient(f"sqlite:///{project.state / 'mlflow.db'}")
    client.set_registered_model_alias("diffusemix-classifier", "challenger", "1")
    client.delete_registered_model_alias("diffusemix-classifier", "champion")
    cut_off = run(project, weights, "training.steps=150")  # as a kill between the two leaves it
    assert cut_off.success
    assert versions(project)[0] == {"vanilla": "1", "champion": "1"}
    client.set_registered_model_alias("diffusemix-classifier", "challenger", "1")
    assert run(project, weights, "training.steps=150").reused
    assert versions(project)[0] == {"vanilla": "1", "champion": "1"}

    worse = run(project, weights, "training.steps=50")
    assert worse.success  # a worse model is no broken pipeline
    aliases, tags = versions(project)
    assert (aliases["champion"], aliases["challenger"]) == ("1", "2")
    assert tags["2"]["promotion.promoted"] == "false"
    assert "more than 1 point lower" in tags["2"]["promotion.reason"]
    assert worse.metadata["champion"]["reason"].value == tags["2"]["promotion.reason"]
    assert worse.metadata["champion"]["champion_val_clean"].value == pytest.approx(
        float(tags["1"]["promotion.val_clean"]), abs=1e-4
    )
    assert tags["2"]["promotion.test_reads"] == "2"

    wrong = write_digits(tmp_path / "wrong", shuffled=True)
    sabotaged = run(project, weights, "training.steps=150", f"source.path={wrong}")
    assert not sabotaged.success
    assert "val_accuracy_above_floor" in " ".join(sabotaged.problems)
    assert versions(project)[0]["champion"] == "1"

    better = run(project, weights, "training.steps=300")
    assert better.success
    aliases, tags = versions(project)
    assert aliases["champion"] == max(tags, key=int)
    assert "no lower" in tags[aliases["champion"]]["promotion.reason"]


def of_another_process(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a person does: this process, which trained, told MLflow its address."""
    command = [sys.executable, "-m", "diffusemix_pipeline.cli", *words]
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return subprocess.run(command, capture_output=True, text=True, env=theirs)


@pytest.mark.slow
def test_the_champion_names_raw_images(project, weights):
    if not project.report.exists():
        assert run(project, weights, "training.steps=150").success
    test = sorted((project.raw / "test").rglob("*.png"))[::8]
    broken = project.root / "broken.png"
    broken.write_bytes(b"no image")
    with chdir(project.root):
        answered = of_another_process("predict", *map(str, test))
        failed = CliRunner().invoke(main, ["predict", str(broken), str(test[0])])
        nobody = CliRunner().invoke(main, ["predict", "--alias", "nobody", str(test[0])])
    assert answered.returncode == 0, answered.stderr
    assert not (project.root / "mlflow.db").exists()  # of another MLflow, which has no models
    lines = [line.split("\t") for line in answered.stdout.splitlines()]
    right = [label == Path(name).parent.name for name, label, _ in lines]
    assert len(right) == len(test)
    assert np.mean(right) > 0.6
    assert failed.exit_code == 1
    assert f"{broken}: " in failed.stderr
    assert len(failed.stdout.splitlines()) == 1
    assert nobody.exit_code == 2
    assert "No version of diffusemix-classifier is nobody" in nobody.output
