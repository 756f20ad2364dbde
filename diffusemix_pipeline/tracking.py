"""Runs, metrics and registered models: the only code that imports MLflow.

What belongs here: what a training run records, and the classifier as a model that loads by name.
What does not: what is trained and measured, and which model is promoted.

Runs lie in a SQLite database under `.diffusemix/` with their files beside it, or on the server that
`tracking.uri` names. Nothing is pickled: a model is safetensors and a copy of this package, whose
`training/served_classifier.py` MLflow calls. We ourselves read the safetensors and run none of the
code that a store of models gives.
MLflow takes seconds to import, so functions import it when they need it.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import link_or_copy, write_bytes
from diffusemix_pipeline.git import git
from diffusemix_pipeline.processes import is_gone, is_of_this_host, this_process
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput
    from mlflow.entities import Run as MlflowRun

    from diffusemix_pipeline.training.classifier import Classifier
    from diffusemix_pipeline.training.served_classifier import ServedClassifier

# Read when MLflow is imported, by this process and by the server that it starts.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight workers that outlive the server
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the default waits minutes on a mistyped address
}.items():
    os.environ.setdefault(_name, _value)

DEFAULT_PORT = 5000
SHORT_ID = 7
"""Letters of a run's id, by which it is known where there is little room."""
_PROCESS = "diffusemix.process"
_LONGEST_RUN_DAYS = 7  # max_runtime_seconds in dagster.yaml
_MODEL_NAME = "diffusemix.model_name"
_MODEL_ID = "diffusemix.model_id"
_MODEL_VERSION = "diffusemix.model_version"
_REPORT = "report"
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""What MLflow answers for a run that it has not, and for what can be no run's id."""
_PACKAGE = Path(__file__).parent
_NOT_CODE = shutil.ignore_patterns("__pycache__", "*.safetensors")
_CLASSIFIER_NEEDS = ("mlflow", "torch", "timm", "safetensors", "numpy", "pandas", "pillow")


class Dataset(NamedTuple):
    """Data that a run read: a name, where it lies, and its version (at most 36 characters)."""

    name: str
    source: str
    digest: str


@dataclass(frozen=True)
class LoggedRun:
    """A finished run, and the model it logged and registered, if it did."""

    run_id: str
    model_id: str | None
    model_version: str | None


class Registered(NamedTuple):
    """A version of the registered model, and what is noted on it."""

    version: str
    tags: Mapping[str, str]


class FinishedTraining(NamedTuple):
    """A finished training run as the history of versions shows it."""

    run_id: str
    name: str
    started: datetime
    tags: Mapping[str, str]
    metrics: Mapping[str, float]

    @property
    def model_version(self) -> str | None:
        """Its version in the registry; None where it registered no model."""
        return self.tags.get(_MODEL_VERSION)


@dataclass(frozen=True)
class Run:
    """A run that is under way: `training_run` gives it."""

    run_id: str
    model_name: str
    tags: Mapping[str, str]
    _client: "MlflowClient"

    def log_curve(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each named curve."""
        _log_metrics(self._client, self.run_id, values, step=step)

    def log_bytes(self, name: str, content: bytes) -> None:
        """Keep a file with the run; `name` may have folders: `figures/curves.png`."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(name).name
            file.write_bytes(content)
            inside = str(Path(name).parent)
            self._client.log_artifact(self.run_id, str(file), None if inside == "." else inside)

    def log_classifier(self, folder: Path, alias: str) -> LoggedRun:
        """Log and register the classifier of a folder that `training.save_classifier` wrote.

        The new version carries the run's tags, and `alias`, which an older one may have had.
        `mlflow.pyfunc.load_model("models:/NAME@ALIAS").predict(...)` then takes images as they
        are: uint8 (N, H, W, 3), a list of files, or a data frame with a column `path`. It returns
        a row an image, with `label` and `p(<class>)`. The signature tells the answer's columns
        only: with one for the input too, MLflow would take one of the three and refuse the others.
        """
        import mlflow
        import numpy as np
        from mlflow.models import ModelSignature
        from mlflow.types.schema import ColSpec, Schema, TensorSpec

        from diffusemix_pipeline.training.classifier import load_classifier

        classes = load_classifier(folder).classes
        columns: list[ColSpec | TensorSpec] = [ColSpec("string", "label")]
        columns += [ColSpec("float", f"p({c})") for c in classes]
        with tempfile.TemporaryDirectory() as aside:
            code = Path(aside) / _PACKAGE.name
            shutil.copytree(_PACKAGE, code, ignore=_NOT_CODE)
            logged = mlflow.pyfunc.log_model(
                name="classifier",
                loader_module="diffusemix_pipeline.training.served_classifier",
                data_path=str(folder),
                code_paths=[str(code)],  # it loads where the package is not installed
                pip_requirements=[f"{n}=={version(n).split('+')[0]}" for n in _CLASSIFIER_NEEDS],
                signature=ModelSignature(outputs=Schema(columns)),
                input_example=np.zeros((1, 8, 8, 3), dtype=np.uint8),
                registered_model_name=self.model_name,
            )
        version_there = str(logged.registered_model_version)
        for key, value in self.tags.items():
            self._client.set_model_version_tag(self.model_name, version_there, key, value)
        self._client.set_registered_model_alias(self.model_name, alias, version_there)
        self._client.set_tag(self.run_id, _MODEL_ID, logged.model_id)
        self._client.set_tag(self.run_id, _MODEL_VERSION, version_there)
        return LoggedRun(self.run_id, logged.model_id, version_there)


@dataclass(frozen=True)
class Tracker:
    """An MLflow experiment that is ready for runs: `open_tracking` gives it."""

    uri: str
    address: str
    """Of the pages of the server, where it is not `uri`."""
    experiment_id: str
    model_name: str
    root: Path
    _client: "MlflowClient" = field(repr=False)

    @contextmanager
    def training_run(
        self, name: str, params: Mapping[str, Any], dataset: Dataset, tags: Mapping[str, str]
    ) -> Iterator[Run]:
        """Record a training: FINISHED at the end, FAILED on an exception, which goes on.

        At most 100 `params`, each of at most 6000 characters. The project's git commit, and
        whether files differ from it, are recorded too.
        """
        import mlflow
        from mlflow.entities import Param

        all_tags = {
            **_commit(self.root),
            **tags,
            _MODEL_NAME: self.model_name,
            _PROCESS: this_process(),
        }
        run_id = self._client.create_run(
            self.experiment_id, run_name=name, tags=all_tags
        ).info.run_id
        mlflow.set_tracking_uri(self.uri)
        with mlflow.start_run(run_id=run_id):
            self._client.log_batch(run_id, params=[Param(k, str(v)) for k, v in params.items()])
            self._client.log_inputs(run_id, [_dataset_input(dataset, "training")])
            yield Run(run_id, self.model_name, tags, self._client)

    def log_evaluation(
        self, logged: LoggedRun, metrics: Mapping[str, float], dataset: Dataset, folder: Path
    ) -> None:
        """Add what a model scored on `dataset` to its run and to the model, with a report's files.

        Logged again, the newer values are the ones shown, and the newer files the only ones.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        self._client.log_inputs(logged.run_id, [_dataset_input(dataset, "evaluation")])
        _log_metrics(self._client, logged.run_id, metrics, model_id=logged.model_id, on=dataset)
        files = self._client.get_run(logged.run_id).info.artifact_uri
        get_artifact_repository(files, tracking_uri=self.uri).delete_artifacts(_REPORT)
        self._client.log_artifacts(logged.run_id, str(folder), _REPORT)

    def report(self, run_id: str, folder: Path) -> Path:
        """Bring a run's report into `folder`; UserError for a run that is not here or has none.

        `run_id` may be the start of the id of one of `trainings`, SHORT_ID letters or more.
        """
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in _UNKNOWN:
                raise
            run_id = self._whole_id(run_id)
        return self._download(run_id, f"{_REPORT}/report.json", folder)

    def _whole_id(self, start: str) -> str:
        """Return the id of a training that begins so; UserError where not just one does."""
        if len(start) >= SHORT_ID:
            begun = [t.run_id for t in self.trainings() if t.run_id.startswith(start)]
            if len(begun) == 1:
                return begun[0]
            if begun:
                raise UserError(f"'{start}' begins {', '.join(begun)}: write more of the id.")
        raise UserError(
            f"'{start}' is neither a folder, nor a report.json, nor the id of an MLflow run. "
            "`diffusemix data history` lists the ids."
        )

    def _download(self, run_id: str, name: str, folder: Path) -> Path:
        from mlflow.exceptions import MlflowException

        try:
            return Path(self._client.download_artifacts(run_id, name, str(folder)))
        except (MlflowException, OSError) as error:
            raise UserError(
                f"MLflow at {self.uri} has no {name} of the run {run_id}: {error}"
            ) from None

    def find_run(self, tag: str, value: str) -> LoggedRun | None:
        """Return the newest FINISHED run with the tag and this model name; None without one."""
        found = self._client.search_runs(
            [self.experiment_id],
            f"tags.`{tag}` = '{value}' and tags.`{_MODEL_NAME}` = '{self.model_name}' "
            "and attributes.status = 'FINISHED'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        if not found:
            return None
        tags = found[0].data.tags
        return LoggedRun(found[0].info.run_id, tags.get(_MODEL_ID), tags.get(_MODEL_VERSION))

    def trainings(self) -> list[FinishedTraining]:
        """Return every finished run of this model name, newest first."""
        found = self._search(
            f"tags.`{_MODEL_NAME}` = '{self.model_name}' and attributes.status = 'FINISHED'"
        )
        return [
            FinishedTraining(
                run.info.run_id,
                run.info.run_name,
                datetime.fromtimestamp(run.info.start_time / 1000, UTC),
                run.data.tags,
                run.data.metrics,
            )
            for run in found
        ]

    def _search(self, which: str) -> "list[MlflowRun]":
        """Return all runs of the experiment under a filter, newest first."""
        found: list[MlflowRun] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id],
                which,
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
            found += page
            token = page.token
            if not token:
                return found

    def file_of(self, run_id: str, name: str) -> bytes:
        """Return a file that was kept with a run; UserError where it is not there."""
        with tempfile.TemporaryDirectory() as folder:
            return self._download(run_id, name, Path(folder)).read_bytes()

    def registered(self, alias: str) -> Registered | None:
        """Return the version that has the alias now; None where none has."""
        from mlflow.exceptions import MlflowException

        try:
            aliases = self._client.get_registered_model(self.model_name).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if alias not in aliases:
            return None
        version_there = str(aliases[alias])
        found = self._client.get_model_version(self.model_name, version_there)
        return Registered(version_there, found.tags)

    def load(self, alias: str) -> "ServedClassifier":
        """Load the model that has the alias; UserError where none has."""
        from diffusemix_pipeline.training.served_classifier import ServedClassifier

        found = self.registered(alias)
        if found is None:
            raise UserError(
                f"No version of {self.model_name} is {alias} at {self.uri}: a run that promotes "
                "its model makes one."
            )
        return ServedClassifier(self.classifier_of(found.version))

    def set_alias(self, alias: str, version: str) -> None:
        """Give a version the alias, which another may have had."""
        self._client.set_registered_model_alias(self.model_name, alias, version)

    def remove_alias(self, alias: str) -> None:
        """Take the alias from whichever version has it."""
        self._client.delete_registered_model_alias(self.model_name, alias)

    def note(self, version: str, tags: Mapping[str, str]) -> None:
        """Write tags on a version, over those of the same keys."""
        for key, value in tags.items():
            self._client.set_model_version_tag(self.model_name, version, key, value)

    def classifier_of(self, version: str, device: str = "cpu") -> "Classifier":
        """Load a version; UserError where its files are damaged, or no classifier of ours."""
        import mlflow

        from diffusemix_pipeline.training.classifier import DESCRIPTION, load_classifier

        uri = f"models:/{self.model_name}/{version}"
        told = f"ersion {version} of {self.model_name} at {self.uri}"
        repair = "Give the alias to another version, or take it away."
        mlflow.set_tracking_uri(self.uri)  # a registered model is looked for nowhere else
        with tempfile.TemporaryDirectory() as folder:
            there = mlflow.artifacts.download_artifacts(uri, dst_path=folder)
            found = list(Path(there).rglob(DESCRIPTION))
            if len(found) != 1:
                raise UserError(
                    f"V{told} holds no {DESCRIPTION}, as the models of this pipeline do. No other "
                    f"kind is loaded, as it may run code. {repair}"
                )
            return load_classifier(found[0].parent, device, f"It is of v{told}. {repair}")

    def unfinished(self, days: int, *, remove: bool) -> list[str]:
        """Find the runs of so long ago that never finished; remove them, as MLflow does.

        They are gone from its pages, and for good after `mlflow gc`.
        """
        now, ids = time.time(), []
        for status, least in (("FAILED", 0), ("KILLED", 0), ("RUNNING", _LONGEST_RUN_DAYS)):
            before = int((now - max(days, least) * 24 * 3600) * 1000)
            found = self._search(
                f"attributes.status = '{status}' and attributes.start_time < {before}"
            )
            # `reconcile` has ended those of this host that do not live.
            ids += [
                run.info.run_id
                for run in found
                if status != "RUNNING" or not is_of_this_host(run.data.tags.get(_PROCESS, ""))
            ]
        if remove:
            for run_id in ids:
                self._client.delete_run(run_id)
        return ids

    def reconcile(self) -> None:
        """Mark as KILLED the runs whose process on this machine is gone."""
        for run in self._client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'"):
            if is_gone(run.data.tags.get(_PROCESS, "")):
                self._client.set_terminated(run.info.run_id, "KILLED")

    def run_url(self, run_id: str, port: int = DEFAULT_PORT) -> str:
        """Return where a browser finds a run, by default at what `diffusemix mlflow` starts."""
        local = self.uri.startswith("sqlite:")
        base = self.address or (f"http://127.0.0.1:{port}" if local else self.uri)
        return f"{base.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"


def open_tracking(project: Project, tracking: Tracking) -> Tracker:
    """Open the project's experiment, after making or upgrading the database where need be.

    Raises UserError where the server of `tracking.uri` does not answer, and for an experiment that
    was deleted.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DatabaseError

    project.state.mkdir(parents=True, exist_ok=True)
    uri = tracking.uri or _database(project)
    # MLflow 3.17 breaks where two processes make the tables or the experiment at once.
    with FileLock(project.state / "mlflow.lock"):
        try:
            if not tracking.uri:
                _make_database(project)
            client = MlflowClient(uri)
            experiment = client.get_experiment_by_name(tracking.experiment)
            if experiment is None:
                files = None if tracking.uri else _files(project)
                experiment_id = client.create_experiment(tracking.experiment, files)
                experiment = client.get_experiment(experiment_id)
        except MlflowException as error:
            raise UserError(
                f"MLflow at {uri} (tracking.uri) cannot be used: {error}. Start its server, or "
                "name another, and run again."
            ) from error
        except DatabaseError as error:
            if "not a database" not in str(error) and "malformed" not in str(error):
                raise
            raise UserError(
                f"MLflow's database {uri} is damaged ({error.orig}). Restore it from a backup, or "
                "move it elsewhere: runs and models are then registered anew."
            ) from error
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"The MLflow experiment '{tracking.experiment}' at {uri} is deleted. Restore it with "
            f"`mlflow experiments restore -x {experiment.experiment_id}`, or set "
            "tracking.experiment to another name."
        )
    return Tracker(
        uri,
        tracking.address,
        experiment.experiment_id,
        tracking.model_name,
        project.root,
        client,
    )


def mlflow_ui_command(
    project: Project,
    tracking: Tracking,
    port: int = DEFAULT_PORT,
    host: str = "127.0.0.1",
) -> list[str]:
    """Return the command that shows the project's runs.

    Raises UserError where `tracking.uri` names a server, which shows them itself.
    """
    if tracking.uri:
        raise UserError(f"tracking.uri is set: the runs are shown at {tracking.uri}.")
    open_tracking(project, tracking)  # a server's workers would make the tables all at once
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", _database(project), "--default-artifact-root", _files(project)),
        *("--host", host, "--port", str(port), "--workers", "1"),
    ]


def _database(project: Project) -> str:
    return f"sqlite:///{project.mlflow_database.resolve()}"


def _files(project: Project) -> str:
    return (project.state / "mlflow").resolve().as_uri()


def _make_database(project: Project) -> None:
    """Make the database, or bring an older MLflow's to this one's schema and keep it as it was.

    It is done on a copy that then takes its place: MLflow cannot go on with a half-made one.
    """
    database, aside = project.mlflow_database, project.state / "mlflow.partial.db"
    made_by, installed = project.state / "mlflow.version", version("mlflow")
    if database.exists() and made_by.exists() and made_by.read_text() == installed:
        return
    aside.unlink(missing_ok=True)
    if database.exists():
        with closing(sqlite3.connect(database)) as old, closing(sqlite3.connect(aside)) as copy:
            old.backup(copy)
    command = [
        sys.executable,
        "-P",
        "-m",
        "mlflow",
        "db",
        "upgrade",
        f"sqlite:///{aside.resolve()}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"MLflow {installed} cannot use {database}: {done.stderr.strip()[-500:]}\nMove it "
            "elsewhere (runs and models are then registered anew), or install the MLflow that "
            "made it."
        )
    if database.exists():
        kept = project.state / f"mlflow.before-{installed}.db"
        kept.unlink(missing_ok=True)
        link_or_copy(database, kept)
    aside.replace(database)
    write_bytes(made_by, installed.encode())


def _log_metrics(
    client: "MlflowClient",
    run_id: str,
    values: Mapping[str, float],
    *,
    step: int = 0,
    model_id: str | None = None,
    on: Dataset | None = None,
) -> None:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    name, digest = (on.name, on.digest) if on else (None, None)
    metrics = [
        Metric(key, float(value), now, step, model_id, name, digest, run_id)
        for key, value in values.items()
    ]
    client.log_batch(run_id, metrics=metrics)


def _dataset_input(dataset: Dataset, context: str) -> "DatasetInput":
    from mlflow.entities import Dataset as DatasetEntity
    from mlflow.entities import DatasetInput, InputTag

    source = json.dumps({"uri": dataset.source})
    entity = DatasetEntity(dataset.name, dataset.digest, source_type="local", source=source)
    return DatasetInput(entity, [InputTag("mlflow.data.context", context)])


def _commit(root: Path) -> dict[str, str]:
    """Return the project's commit and whether files differ from it; {} without git."""

    commit = git(root, "rev-parse", "HEAD")
    if commit is None:
        return {}
    changed = git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        "mlflow.source.git.commit": commit.decode().strip(),
        "git.changed": str(bool(changed)).lower(),
    }
