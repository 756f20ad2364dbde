"""Promises of the whole: one run makes everything, a second nothing, two the same bytes."""

import json
import shutil
import socket
import subprocess
from contextlib import chdir
from pathlib import Path

import dagster as dg
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import ASSETS, quick_settings, tiny_editor, write_classes

from diffusemix_pipeline.cli import _print_outcome, _what_to_know, main
from diffusemix_pipeline.editing.instruct_pix2pix import InstructPix2PixEditor
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.locks import note_holder
from diffusemix_pipeline.orchestration.launch import Outcome, prepare_instance, run_here
from diffusemix_pipeline.orchestration.lost_runs import PROCESS_TAG
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.training import arms, fold_teachers
from diffusemix_pipeline.versioning import pinned_digest


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_editor(tmp_path_factory.mktemp("editor"))


@pytest.fixture(scope="module")
def done(weights, tmp_path_factory) -> tuple[Project, Outcome]:
    """A project in which the pipeline ran once."""
    project = Project(tmp_path_factory.mktemp("project"))
    return project, run(project, weights)


def run(project: Project, weights: Path, *overrides: str) -> Outcome:
    settings = quick_settings(f"editing.editor={weights}", *overrides)
    return run_here(project, settings, silent)


def bytes_below(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def times_of(project: Project) -> dict[str, int]:
    kept = [project.data, project.checkpoints, project.report, project.root / "data.dvc"]
    files = [path for top in kept for path in ([top] if top.is_file() else top.rglob("*"))]
    return {str(path): path.stat().st_mtime_ns for path in files if path.is_file()}


def mlflow_runs(project: Project, experiment: str = "diffusemix") -> pd.DataFrame:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{project.state / 'mlflow.db'}")
    return mlflow.search_runs(experiment_names=[experiment])


def test_every_asset_is_materialized_and_every_check_passes(done):
    project, outcome = done
    assert (project.state / "dagster").is_dir()  # Dagster's history is the project's own
    assert outcome.problems == []
    assert outcome.success
    assert not outcome.reused
    assert sorted(outcome.metadata) == sorted(ASSETS)


def test_every_asset_shows_what_a_person_looks_at(done):
    _, outcome = done
    for asset in ASSETS[:4]:
        assert outcome.metadata[asset]["images"].value > 0
        sheet = outcome.metadata[asset]["contact_sheet"].value
        assert "data:image/png;base64," in sheet
        assert len(sheet) < 300_000  # it lies in Dagster's event log
    assert "class_histogram" in outcome.metadata["raw_dataset"]
    assert "learning_curves" in outcome.metadata["trained_classifier"]
    assert "significant" in outcome.metadata["robustness_report"]["headline"].value


def test_every_augmented_image_is_traceable(done):
    project, _ = done
    raw = pd.read_parquet(project.raw / "manifest.parquet").set_index("image_id")
    edits = pd.read_parquet(project.generated / "manifest.parquet").set_index("image_id")
    augmented = pd.read_parquet(project.augmented / "manifest.parquet")
    assert len(augmented) == 20
    for row in augmented.itertuples():
        assert raw.loc[row.source_id, "label"] == row.label
        assert raw.loc[row.source_id, "split"] == "train"
        assert raw.loc[row.source_id, "source_sha256"] == row.source_sha256
        assert edits.loc[row.image_id, "edit_key"] == row.edit_key
        assert row.prompt in ("sunset", "mosaic")
        assert row.mask in ("left", "right", "top", "bottom")
        assert row.fractal_id.startswith("made-")
        assert row.lam == 0.2


def test_the_three_tools_share_one_id(done):
    project, outcome = done
    digest = pinned_digest(project.root)
    assert outcome.metadata["fractal_augmented_dataset"]["dvc_digest"].value == digest
    report = json.loads((project.report / "report.json").read_text())
    assert report["versions"]["data.dvc"] == digest
    assert set(mlflow_runs(project)["tags.dvc.data"]) == {digest}


def test_each_arm_is_a_run_with_a_model_that_serves_raw_images(done):
    import mlflow

    project, _ = done
    runs = mlflow_runs(project)
    assert set(runs["status"]) == {"FINISHED"}
    assert sorted(runs["tags.diffusemix.arm"]) == ["diffusemix", "vanilla"]
    assert runs["metrics.test_clean"].between(0, 1).all()
    assert runs["metrics.val_accuracy"].between(0, 1).all()
    for measure in ("corrupted", "corrupted_unshared", "fgsm_2_255", "pgd_20_8_255"):
        assert runs[f"metrics.test_{measure}"].between(0, 1).all()
    of_vanilla = runs[runs["tags.diffusemix.arm"] == "vanilla"].iloc[0]
    assert of_vanilla["metrics.test_mce_to_vanilla"] == pytest.approx(1)
    assert (runs[["metrics.test_brier", "metrics.test_nll"]] > 0).all(axis=None)
    model = mlflow.pyfunc.load_model("models:/diffusemix-classifier/1")
    files = sorted((project.raw / "test").rglob("*.png"))[:2]
    answers = model.predict([str(file) for file in files])
    assert set(answers["label"]) <= set("0123456789")


def test_the_reports_of_two_runs_are_compared_by_their_ids(done, monkeypatch):
    project, _ = done
    monkeypatch.chdir(project.root)
    first, second = mlflow_runs(project)["run_id"]
    told = CliRunner().invoke(main, ["report", "--compare", first, second[:7]])
    assert told.exit_code == 0, told.output
    assert "Settings: no difference." in told.output
    assert CliRunner().invoke(main, ["report"]).output.startswith("**Against vanilla")
    unknown = CliRunner().invoke(main, ["report", "--compare", first, "0" * 32])
    assert unknown.exit_code == 2
    assert f"'{'0' * 32}' is neither a folder, nor a report.json, nor the id" in unknown.output


def test_what_came_of_a_run_is_told_with_its_numbers(done, capsys):
    project, outcome = done
    _print_outcome(project, outcome)
    told = capsys.readouterr().out
    report = json.loads((project.report / "report.json").read_text())
    for said in ("Clean", "Corrupted", "FGSM 2/255", "vanilla", report["headline"]):
        assert said in told
    [accuracy] = [arm["clean"] for arm in report["arms"] if arm["arm"] == "vanilla"]
    assert f"{100 * accuracy['value']:.1f} ({100 * accuracy['low']:.1f} to" in told
    assert f"Report: {project.report / 'index.html'}" in told


def test_without_a_remote_it_says_so_and_goes_on(done):
    _, outcome = done
    assert "no DVC remote" in outcome.metadata["fractal_augmented_dataset"]["dvc_push"].value


def test_a_second_run_does_nothing_and_says_so(done, weights, monkeypatch):
    project, _ = done
    before, runs = times_of(project), len(mlflow_runs(project))
    monkeypatch.setattr(InstructPix2PixEditor, "edit", lambda *a: pytest.fail("edited"))
    monkeypatch.setattr(arms, "fit", lambda *a, **how: pytest.fail("trained"))
    again = run(project, weights)
    assert again.success
    assert again.reused
    assert times_of(project) == before
    assert len(mlflow_runs(project)) == runs


@pytest.mark.parametrize("damaged", ["report", "note of what is logged"])
def test_a_damaged_report_is_made_anew(done, weights, damaged):
    project, _ = done
    files = {
        "report": project.report / "report.json",
        "note of what is logged": project.state / "logged_report.json",
    }
    report, runs = bytes_below(project.report), len(mlflow_runs(project))
    whole = files[damaged].read_bytes()
    files[damaged].write_bytes(whole[:-100])
    again = run(project, weights)
    assert again.success, again.problems
    assert not again.metadata["robustness_report"]["reused"].value
    assert bytes_below(project.report) == report
    assert files[damaged].read_bytes() == whole
    assert len(mlflow_runs(project)) == runs


def test_two_runs_into_empty_folders_give_the_same_bytes(done, weights, tmp_path):
    project, _ = done
    other = Project(tmp_path)
    assert run(other, weights).success
    assert bytes_below(other.data) == bytes_below(project.data)
    assert pinned_digest(tmp_path) == pinned_digest(project.root)
    evidence = [path.read_bytes() for path in sorted(project.evidence.rglob("*.npz"))]
    assert evidence == [path.read_bytes() for path in sorted(other.evidence.rglob("*.npz"))]


def test_a_new_lambda_edits_nothing_and_old_bytes_come_back(weights, tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    project = Project(tmp_path)
    assert run(project, weights).success
    old_bytes, old_pin = bytes_below(project.data), (tmp_path / "data.dvc").read_bytes()
    monkeypatch.setattr(InstructPix2PixEditor, "edit", lambda *a: pytest.fail("edited"))
    changed = run(project, weights, "mixing.lam=0.5")
    assert changed.success
    assert changed.metadata["generated_images"]["reused"].value
    assert changed.metadata["hybrid_images"]["reused"].value
    assert len(mlflow_runs(project)) == 3  # vanilla is as it was
    assert bytes_below(project.data) != old_bytes
    (tmp_path / "data.dvc").write_bytes(old_pin)
    subprocess.run(["dvc", "checkout", "-q"], cwd=tmp_path, check=True, env=_venv_path())
    assert bytes_below(project.data) == old_bytes


def test_a_failing_check_fails_the_run(weights, tmp_path, monkeypatch):
    from diffusemix_pipeline.mixing import stages

    project = Project(tmp_path)
    real = stages.png_bytes
    written: list[Path] = []

    def with_a_stray_file(pixels: np.ndarray) -> bytes:
        found = set(project.aside.glob("hybrid.*")) - {project.aside / "hybrid.begun"}
        partial = found.pop() if found else None
        if partial and not written:
            written.append(partial / "stray.png")
            written[0].write_bytes(real(pixels))
        return real(pixels)

    monkeypatch.setattr(stages, "png_bytes", with_a_stray_file)
    outcome = run(project, weights)
    assert not outcome.success
    [problem] = outcome.problems
    assert "files_match_manifest on hybrid_images" in problem
    assert "trained_classifier" not in outcome.metadata


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("source.path=nowhere", "source.path: the folder nowhere does not exist"),
        ("training.model=resnet10s", "timm has no model 'resnet10s'"),
        ("mixing.fractal_dir=nowhere", "mixing.fractal_dir: nowhere is no folder"),
        ("training.model=inception_v3", "inception_v3 does not take images of 32 px"),
        ("device=cuda:7", "device: this machine has no cuda:7"),
        ("mixing.seam=40", "mixing.seam: 40 px is wider than the images"),
        ("tracking.uri=http://127.0.0.1:9", "http://127.0.0.1:9 (tracking.uri) cannot be used"),
    ],
)
def test_a_mistake_is_told_before_any_work(override, message, weights, project, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    outcome = run(project, weights, override)
    assert outcome.user_error
    assert any(message in problem for problem in outcome.problems)
    assert not any("Traceback" in problem or "Stack" in problem for problem in outcome.problems)
    assert not project.data.exists()


def _venv_path() -> dict[str, str]:
    import os
    import sys

    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_a_second_run_at_the_same_time_is_refused(weights, project):
    import fcntl

    project.state.mkdir()
    with (project.state / "run.lock").open("w") as lock:
        note_holder(lock, "run 1234")
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(
            UserError,
            match=rf"Another is at work in \S+: run 1234 on {socket.gethostname()}, since 20",
        ):
            run(project, weights)
    assert not project.data.exists()


def test_a_killed_run_is_told_and_gives_back_what_it_held(weights, project):
    prepare_instance(project)
    process = {PROCESS_TAG: f"{socket.gethostname()} 1 9999999"}  # number 1 is older
    status = dg.DagsterRunStatus
    killed, *others = [
        dg.DagsterRun(job_name="diffusemix", status=of, tags=process)
        for of in (status.STARTED, status.NOT_STARTED, status.CANCELING)
    ]
    with chdir(project.root), dg.DagsterInstance.get() as instance:
        for gone in (killed, *others):
            instance.add_run(gone)
        slots = instance.event_log_storage
        slots.initialize_concurrency_limit_to_default("gpu")
        slots.claim_concurrency_slot("gpu", killed.run_id, "generated_images.edit_shard")
        assert slots.get_concurrency_info("gpu").active_slot_count == 1
        assert run(project, weights).success
        for gone in (killed, *others):
            assert instance.get_run_by_id(gone.run_id).status == status.FAILURE
        assert slots.get_concurrency_info("gpu").active_slot_count == 0


def test_the_gate_trains_its_teachers_once_and_shows_its_yield(weights, project, monkeypatch):
    # Teachers of four steps know nothing, but some edits lie above the thresholds that they give.
    gate = ["editing.gate.enabled=true", "editing.gate.folds=2", "editing.gate.max_change=1"]
    gate += ["editing.gate.false_reject_rate=0.25", "editing.copies=2", "editing.batch_size=2"]
    trained = []
    real = fold_teachers.fit
    monkeypatch.setattr(fold_teachers, "fit", lambda *a, **h: (trained.append(1), real(*a, **h))[1])
    outcome = run(project, weights, *gate, "editing.shards=2")
    assert outcome.success, outcome.problems
    assert len(trained) == 2
    shown = outcome.metadata["generated_images"]
    assert 0 < shown["gate_yield"].value <= 1
    assert "data:image/png" in shown["gate_yield_map"].value
    edits = pd.read_parquet(project.generated / "manifest.parquet")
    rejected = pd.read_parquet(project.generated / "rejected.parquet")
    share = len(edits) / (len(edits) + len(rejected))
    assert shown["gate_yield"].value == pytest.approx(share)

    # What the pilot foretold was seen before the work began, and stands beside what came of it.
    with chdir(project.root), dg.DagsterInstance.get() as instance:
        (observed,) = instance.fetch_observations(dg.AssetKey("generated_images"), limit=9).records
    foretold = observed.asset_observation.metadata
    assert 0 <= foretold["gate_teachers_accuracy"].value <= 1
    assert foretold["pilot_edits"].value == 2 * 12
    for name in ("edits", "seconds", "images", "megabytes", "yield"):
        assert shown[f"predicted_{name}"] == foretold[f"predicted_{name}"]
    assert shown["edits_made"].value == len(edits) + len(rejected)
    assert shown["actual_seconds"].value > 0
    assert shown["images"].value == len(edits)
    size = sum((project.generated / name).stat().st_size for name in edits["file_name"])
    assert shown["megabytes"].value == pytest.approx(size / 1e6)
    (told,) = (line for line in _what_to_know(outcome) if line.startswith("Editing: "))
    assert f"{len(edits)} images, {size / 1e6:,.1f} MB; a pilot predicted" in told


def test_a_clone_with_a_remote_pulls_what_is_pinned(weights, tmp_path):
    from diffusemix_pipeline.versioning import ensure_repository

    first, clone = Project(tmp_path / "first"), Project(tmp_path / "clone")
    first.root.mkdir()
    photos = write_classes(tmp_path / "photos", ["cat", "dog"], 10)
    own = ["source.train_per_class=null", "source.val_fraction=0.2", "source.test_fraction=0.2"]
    ensure_repository(first.root)
    remote = ["dvc", "remote", "add", "-q", "-d", "store", tmp_path / "remote"]
    subprocess.run(remote, cwd=first.root, check=True, env=_venv_path())
    outcome = run(first, weights, f"source.path={photos}", *own)
    assert outcome.success
    assert "pushed" in outcome.metadata["fractal_augmented_dataset"]["dvc_push"].value

    (clone.root / ".dvc").mkdir(parents=True)
    for name in ("data.dvc", ".dvc/config"):
        shutil.copy(first.root / name, clone.root / name)
    pulled = run(clone, weights, "source.path=''")
    assert pulled.success
    assert pulled.metadata["raw_dataset"]["origin"].value == "data.dvc"
    assert pulled.metadata["generated_images"]["edits_made"].value == 0
    assert bytes_below(clone.data) == bytes_below(first.data)
    assert run(clone, weights, "source.path=''").reused


def test_images_whose_pin_is_nowhere_are_kept(weights, tmp_path):
    project = Project(tmp_path / "project")
    project.root.mkdir()
    photos = write_classes(tmp_path / "photos", ["cat", "dog"], 10)
    assert run(project, weights, f"source.path={photos}", "source.train_per_class=null").success
    before = bytes_below(project.raw)
    pin = project.root / "data.dvc"
    pin.write_text(pin.read_text().replace(pinned_digest(project.root), f"{'0' * 32}.dir"))
    again = run(project, weights, "source.path=''")
    assert again.success
    assert bytes_below(project.raw) == before


def test_images_that_nobody_can_give_any_more_do_not_become_digits(weights, tmp_path):
    project = Project(tmp_path / "project")
    project.root.mkdir()
    photos = write_classes(tmp_path / "photos", ["cat", "dog"], 10)
    assert run(project, weights, f"source.path={photos}", "source.train_per_class=null").success
    image = next(project.raw.rglob("*.png"))
    image.chmod(0o644)
    with image.open("r+b") as file:  # as a disk damages it, and DVC's cache by the link
        file.write(b"junk")
    shutil.rmtree(project.raw)
    pin = (project.root / "data.dvc").read_bytes()
    again = run(project, weights, "source.path=''")
    assert again.user_error
    assert "The images that data.dvc pins are gone from data/raw" in again.problems[0]
    assert (project.root / "data.dvc").read_bytes() == pin
    [kept] = (project.state / "damaged").iterdir()
    assert kept.read_bytes().startswith(b"junk"), "nothing is deleted"


def test_another_experiment_gets_the_runs_and_their_evaluation(done, weights):
    project, _ = done
    assert run(project, weights, "tracking.experiment=other").success
    runs = mlflow_runs(project, "other")
    assert len(runs) == 2
    assert runs["metrics.test_clean"].between(0, 1).all()


def test_classifiers_of_fewer_images_are_judged_and_logged(done, weights):
    project, _ = done
    assert run(project, weights, "tracking.experiment=few", "training.few_images=[1]").success
    runs = mlflow_runs(project, "few")
    assert sorted(runs["tags.diffusemix.images_a_class"]) == ["1", "1", "all", "all"]
    assert runs["metrics.test_clean"].between(0, 1).all()
    few = json.loads((project.report / "report.json").read_text())["few_images"]
    assert [(one["arm"], one["per_class"]) for one in few] == [
        ("vanilla", 1), ("vanilla", 2), ("diffusemix", 1), ("diffusemix", 2)
    ]  # fmt: skip
