"""Runs and registered models, on one real MLflow database for the whole file."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Trap
from PIL import Image

from diffusemix_pipeline import tracking
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.processes import is_gone, this_process
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Tracking
from diffusemix_pipeline.tracking import Dataset, LoggedRun, Tracker

TOP = Path(__file__).parent.parent
SETTINGS = Tracking()
DATA = Dataset("fractal_augmented_dataset", "data/augmented", "d" * 32 + ".dir")
OPEN = """
import os, signal, sys
from pathlib import Path
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Tracking
from diffusemix_pipeline.tracking import Dataset, open_tracking
tracker = open_tracking(Project(Path(sys.argv[1])), Tracking())
print(tracker.experiment_id, flush=True)
"""
KILLED = """
with tracker.training_run("killed", {}, Dataset("d", "s", "0" * 36), {}):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in git, whose database three processes made at once, in a folder of their own.

    Two of them end well, the third is killed in the middle of a run.
    """
    root = tmp_path_factory.mktemp("project")
    work = tmp_path_factory.mktemp("work")
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "first"]):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
        subprocess.run(["git", *who, *command], cwd=root, check=True)
    ends = ["", "", KILLED]
    started = [_start(OPEN + end, root, work) for end in ends]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0, -signal.SIGKILL], said
    assert len({out.split()[0] for out, _ in said}) == 1, "one experiment"
    assert [err for _, err in said] == [b""] * 3, "opening is quiet"
    assert list(work.iterdir()) == [], "no ./mlruns"
    return Project(root)


def _start(code: str, root: Path, work: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", code, str(root)]
    environment = os.environ | {"PYTHONPATH": str(TOP)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=work, env=environment, stdout=pipe, stderr=pipe)


@pytest.fixture(scope="module")
def tracker(project: Project) -> Tracker:
    return tracking.open_tracking(project, SETTINGS)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from diffusemix_pipeline.training.classifier import build_classifier, save_classifier

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    save_classifier(build_classifier("resnet10t", ["cat", "dog", "label"], 32), folder)
    return folder


@pytest.fixture(scope="module")
def logged(tracker: Tracker, classifier_folder: Path) -> LoggedRun:
    """A training as the pipeline records it."""
    params = {"seed": 0, "editing.prompts": ["autumn", "snowy"], "training.pretrained": False}
    with tracker.training_run("vanilla-0", params, DATA, {"fingerprint": "f1"}) as run:
        for step in range(3):
            run.log_curve(step, {"train/loss": 1 / (step + 1), "val/accuracy": step / 10})
        run.log_bytes("figures/curves.png", b"\x89PNG")
        run.log_bytes("texts/settings.yaml", b"seed: 0\n")
        return run.log_classifier(classifier_folder, alias="vanilla")


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _no_mlruns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "mlruns").exists()


def test_a_run_holds_params_curves_data_commit_and_files(
    tracker: Tracker, project: Project, logged: LoggedRun
) -> None:
    run = tracker._client.get_run(logged.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "vanilla-0"
    assert run.data.params["editing.prompts"] == "['autumn', 'snowy']"
    curve = tracker._client.get_metric_history(logged.run_id, "train/loss")
    assert [(point.step, point.value) for point in curve] == [(0, 1), (1, 0.5), (2, 1 / 3)]
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == (DATA.name, DATA.digest)
    assert json.loads(dataset.source) == {"uri": DATA.source}
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=project.root, text=True)
    assert run.data.tags["mlflow.source.git.commit"] == head.strip()
    assert run.data.tags["git.changed"] == "false"
    files = project.state / "mlflow" / logged.run_id / "artifacts"
    assert (files / "figures" / "curves.png").read_bytes() == b"\x89PNG"
    assert (files / "texts" / "settings.yaml").read_text() == "seed: 0\n"


def test_the_registered_model_predicts_from_raw_images(
    tracker: Tracker,
    logged: LoggedRun,
    classifier_folder: Path,
    images: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow
    import pandas as pd

    from diffusemix_pipeline.training.classifier import load_classifier

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.set_tracking_uri(tracker.uri)
    model = mlflow.pyfunc.load_model("models:/diffusemix-classifier@vanilla")
    assert model.metadata.model_id == logged.model_id

    classifier = load_classifier(classifier_folder)
    prepared = np.stack([classifier.prepare(Image.fromarray(image)) for image in images])
    expected = classifier.predict_proba(prepared)
    answer = model.predict(images)
    assert list(answer.columns) == ["label", "p(cat)", "p(dog)", "p(label)"]
    np.testing.assert_allclose(answer.iloc[:, 1:].to_numpy(), expected, rtol=1e-5)
    assert list(answer["label"]) == [classifier.classes[i] for i in expected.argmax(axis=1)]

    files = [str(tmp_path / f"{number}.png") for number in range(3)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    for given in (files, pd.DataFrame({"path": files}), np.array(files), images.tolist()):
        pd.testing.assert_frame_equal(model.predict(given), answer)
    with pytest.raises(Exception, match="whole numbers from 0 to 255"):
        model.predict(images / 255.0)


def test_the_model_loads_where_the_package_is_not_installed(
    project: Project, logged: LoggedRun, images: np.ndarray, tmp_path: Path
) -> None:
    folder = next((project.state / "mlflow" / "models").glob("*/artifacts"))
    np.save(tmp_path / "images.npy", images)
    code = """
import sys
sys.path = [p for p in sys.path if p != sys.argv[2]]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import importlib.util
assert importlib.util.find_spec("diffusemix_pipeline") is None
import mlflow, numpy
answer = mlflow.pyfunc.load_model(sys.argv[1]).predict(numpy.load("images.npy"))
assert "artifacts" in sys.modules["diffusemix_pipeline"].__file__
assert len(answer) == 3
"""
    command = [sys.executable, "-P", "-c", code, str(folder), str(TOP)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def registered(tracker: Tracker, alias: str, **how: Any) -> None:
    """Register a model that we did not write, as whoever can write to the store could."""
    import mlflow

    mlflow.set_tracking_uri(tracker.uri)
    with tracker.training_run(alias, {}, DATA, {}):
        made = mlflow.pyfunc.log_model(
            name=alias, registered_model_name=tracker.model_name, pip_requirements=[], **how
        )
    version = str(made.registered_model_version)
    tracker._client.set_registered_model_alias(tracker.model_name, alias, version)


@pytest.mark.filterwarnings("ignore")
def test_no_code_of_the_store_of_models_is_run(
    tracker: Tracker, classifier_folder: Path, trap: Trap, images: np.ndarray, tmp_path: Path
) -> None:
    import mlflow

    class Pickled(mlflow.pyfunc.PythonModel):
        def predict(self, context: Any, model_input: Any, params: Any = None) -> Any: ...

        def __reduce__(self) -> Any:
            return trap.__reduce__()

    registered(tracker, "pickled", python_model=Pickled())
    with pytest.raises(UserError, match=r"holds no classifier\.json.*may run code"):
        tracker.load("pickled")

    (tmp_path / "beside.py").write_text(f"open({str(trap.mark)!r}, 'w')\n")
    registered(
        tracker,
        "code",
        loader_module="beside",
        data_path=str(classifier_folder),
        code_paths=[str(tmp_path / "beside.py")],
    )
    answer = tracker.load("code").predict(images)
    assert set(answer["label"]) <= {"cat", "dog", "label"}


def test_nothing_is_pickled(project: Project, logged: LoggedRun) -> None:
    kept = project.state / "mlflow"
    ours = (kept / logged.run_id, kept / "models" / str(logged.model_id))
    files = [file for folder in ours for file in folder.rglob("*") if file.is_file()]
    known = {".py", ".json", ".safetensors", ".png", ".yaml", ".yml", ".txt", ".jinja", ".md", ""}
    assert {file.suffix for file in files} <= known
    without_suffix = {file.name for file in files if not file.suffix}
    assert without_suffix - {"registered_model_meta"} == {"MLmodel"}  # MLflow's, once it is loaded
    assert any(file.name == "model.safetensors" for file in files)
    for file in files:
        start = file.read_bytes()[:4]
        assert not start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"))


def test_a_run_is_found_by_its_tag(tracker: Tracker, project: Project, logged: LoggedRun) -> None:
    assert tracker.find_run("fingerprint", "f1") == logged
    assert tracker.find_run("fingerprint", "f2") is None
    under_another_name = tracking.open_tracking(project, Tracking(model_name="flowers"))
    assert under_another_name.find_run("fingerprint", "f1") is None


@pytest.mark.parametrize("name", ["0" * 32, "outputs/reprt", "a"])
def test_a_report_of_no_run_is_told_by_what_might_be_named(
    name: str, tracker: Tracker, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"'{name}' is neither a folder, nor a report.json, nor"):
        tracker.report(name, tmp_path)


def test_a_registered_version_says_what_it_is(tracker: Tracker, logged: LoggedRun) -> None:
    version = tracker._client.get_model_version_by_alias("diffusemix-classifier", "vanilla")
    assert str(version.version) == logged.model_version
    assert version.tags == {"fingerprint": "f1"}


def test_an_evaluation_lies_with_the_run_and_the_model(
    tracker: Tracker, project: Project, logged: LoggedRun, tmp_path: Path
) -> None:
    (tmp_path / "report.html").write_text("<p>")
    (tmp_path / "stages.png").write_bytes(b"of an earlier report")
    test = Dataset("test", "data/raw/test", "e" * 36)
    for accuracy in (0.5, 0.75):
        tracker.log_evaluation(logged, {"test/accuracy": accuracy}, test, tmp_path)
        (tmp_path / "stages.png").unlink(missing_ok=True)
    assert tracker._client.get_run(logged.run_id).data.metrics["test/accuracy"] == 0.75
    model = tracker._client.get_logged_model(logged.model_id)
    metric = max((m for m in model.metrics if m.key == "test/accuracy"), key=lambda m: m.timestamp)
    assert (metric.value, metric.dataset_name, metric.dataset_digest) == (0.75, "test", "e" * 36)
    report = project.state / "mlflow" / logged.run_id / "artifacts" / "report" / "report.html"
    assert report.read_text() == "<p>"
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]


def test_an_exception_fails_the_run_and_goes_on(tracker: Tracker) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        tracker.training_run("breaks", {}, DATA, {"fingerprint": "broken"}) as run,
    ):
        raise ZeroDivisionError
    assert tracker._client.get_run(run.run_id).info.status == "FAILED"
    assert tracker.find_run("fingerprint", "broken") is None


def test_a_killed_run_is_marked_and_a_living_one_is_not(
    tracker: Tracker,
) -> None:
    (killed,) = tracker._client.search_runs(
        [tracker.experiment_id], "attributes.run_name = 'killed'"
    )
    run_id = killed.info.run_id
    assert killed.info.status == "RUNNING"
    with tracker.training_run("alive", {}, DATA, {}) as alive:
        tracker.reconcile()
        assert tracker._client.get_run(alive.run_id).info.status == "RUNNING"
    assert tracker._client.get_run(run_id).info.status == "KILLED"


def test_a_process_of_another_machine_or_a_reused_number_is_told_apart() -> None:
    mine = this_process()
    host, pid, started = mine.split()
    assert not is_gone(mine)
    assert is_gone(f"{host} {pid} {float(started) - 3600:.0f}")
    assert not is_gone(f"elsewhere {pid} 1") and not is_gone("")


def test_the_own_server_is_on_loopback(project: Project, tracker: Tracker) -> None:
    command = tracking.mlflow_ui_command(project, SETTINGS, 5055)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--backend-store-uri") + 1] == tracker.uri
    where = tracker.run_url("abc", 5055)
    assert where == f"http://127.0.0.1:5055/#/experiments/{tracker.experiment_id}/runs/abc"
    with pytest.raises(UserError, match="shown at http"):
        tracking.mlflow_ui_command(project, Tracking(uri="http://mlflow.example"))


def test_what_cannot_be_opened_is_told_in_one_sentence(
    project: Project, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 \(tracking\.uri\)"):
        tracking.open_tracking(project, Tracking(uri="http://127.0.0.1:9"))
    gone = tracking.open_tracking(project, Tracking(experiment="gone"))
    gone._client.delete_experiment(gone.experiment_id)
    with pytest.raises(UserError, match="'gone'.*is deleted.*mlflow experiments restore"):
        tracking.open_tracking(project, Tracking(experiment="gone"))


def test_the_database_of_an_older_mlflow_is_upgraded(
    project: Project, logged: LoggedRun, tmp_path: Path
) -> None:
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config

    old = Project(tmp_path)
    old.state.mkdir()
    file = old.state / "mlflow.db"
    source = project.state / "mlflow.db"
    with closing(sqlite3.connect(source)) as a, closing(sqlite3.connect(file)) as b:
        a.backup(b)
    command.downgrade(_get_alembic_config(f"sqlite:///{file}"), "-1")
    (old.state / "mlflow.version").write_text("3.16.0")
    (old.state / "mlflow.partial.db").write_bytes(b"left half made by a kill")
    upgraded = tracking.open_tracking(old, SETTINGS)
    assert upgraded.find_run("fingerprint", "f1") == logged
    assert len(list(old.state.glob("mlflow.before-*.db"))) == 1
    assert not (old.state / "mlflow.partial.db").exists()
