"""Everything that can be known to be wrong before any work is done, each with one message."""

import sqlite3
import warnings
from contextlib import closing
from pathlib import Path

from diffusemix_pipeline.datasets.manifest import STAGE
from diffusemix_pipeline.datasets.published import PUBLISHED, check_at_hand
from diffusemix_pipeline.datasets.sources import DIGITS, IMAGES, check_is_there
from diffusemix_pipeline.devices import choose_device, count_gpus
from diffusemix_pipeline.editing.editor import BUNDLED, check_honoured, locate_editor, locate_lora
from diffusemix_pipeline.editing.shared_edits import SharedEdits
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import check_replaceable
from diffusemix_pipeline.mixing.fractals import fractals_version
from diffusemix_pipeline.own_code import is_own, own_code
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import PAPER_PROMPTS, Settings


def check_run(project: Project, settings: Settings) -> None:
    """Raise UserError for what would end a run after hours of work, or cost a person files."""
    from diffusemix_pipeline.evaluation.published_corruptions import check_corrupted_sets
    from diffusemix_pipeline.training.augmentations import check_own_arms
    from diffusemix_pipeline.training.classifier import check_model

    source = settings.source
    if source.path in PUBLISHED:
        check_at_hand(source.path, _checked_archives(project, source.archives))
    elif is_own(source.path):
        own_code("source.path", source.path, IMAGES)
    elif source.path not in ("", DIGITS):
        _check_source(Path(source.path), project)
    _check_data(project)
    check_databases(project)
    check_model(settings.training.model, settings.size, settings.training.pretrained_at)
    check_corrupted_sets(settings.evaluation.corrupted_sets)
    check_own_arms(settings.training.arms)
    _check_edits_and_mixing(settings)
    if settings.executor != "ray":
        check_device(settings)
        check_processes(settings)
    # On a cluster, another machine may be the one that edits.
    elif settings.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"device: Ray gives each step a GPU of its own, so there is no {settings.device}. "
            "Use auto, cuda or cpu."
        )


def check_databases(project: Project) -> None:
    """Raise UserError where what Dagster or MLflow keeps here is no whole SQLite database."""
    of_dagster = (project.dagster / "storage").rglob("*.db")
    for path in (project.mlflow_database, *of_dagster):
        if not path.exists():
            continue
        try:
            with closing(sqlite3.connect(path, timeout=0)) as database:
                database.execute("PRAGMA schema_version")
        except sqlite3.OperationalError:
            continue  # somebody else is in it, or it may not be opened, which its user tells
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path} is damaged ({error}). Restore it from a backup, or remove it: its runs "
                "are forgotten then; images, edits and classifiers stay."
            ) from None


def check_device(settings: Settings) -> None:
    """Raise UserError where this machine has no such device."""
    import torch

    try:
        torch.empty(0, device=choose_device(settings.device))
    except (RuntimeError, AssertionError):
        raise UserError(
            f"device: this machine has no {settings.device}. Use auto or cpu."
        ) from None


def check_processes(settings: Settings) -> None:
    """Raise UserError where this machine has no device for each process of a training."""
    processes, device = settings.training.processes, choose_device(settings.device)
    if processes == 1 or device == "cpu":
        return
    if device != "cuda":
        raise UserError(
            f"training.processes: {processes} processes take a GPU each, the first of this "
            f"machine's, so not device: {device}. Use cuda, auto or cpu."
        )
    if processes > count_gpus():
        raise UserError(
            f"training.processes: {processes} processes want a GPU each, and this machine has "
            f"{count_gpus()}. Set it to no more than that."
        )


def check_outputs(project: Project) -> None:
    """Raise UserError where a folder that later stages write anew holds somebody's files."""
    from diffusemix_pipeline.evaluation.written_report import DOCUMENT

    for folder in (project.generated, project.hybrid, project.augmented):
        check_replaceable(folder, STAGE)
    check_replaceable(project.report, DOCUMENT)


def _checked_archives(project: Project, chosen: str) -> Path:
    """Return where published datasets lie: not where DVC would take them for our own."""
    archives = project.archives(chosen)
    if archives.resolve().is_relative_to(project.data.resolve()):
        raise UserError(f"source.archives: {archives} lies in {project.data}. Name another folder.")
    return archives


def _check_source(source: Path, project: Project) -> None:
    check_is_there(source)
    folder = source.expanduser().resolve()
    if any(folder.is_relative_to(own.resolve()) for own in (project.data, project.state)):
        raise UserError(
            f"source.path: {source} lies where only the pipeline writes ({project.data}). "
            "Move the images elsewhere and name that folder: it is only read."
        )
    if project.root.resolve().is_relative_to(folder):
        raise UserError(
            f"source.path: {source} holds this project, so what the pipeline makes would be read "
            "as images. Run in a folder of its own and give the images' path."
        )


def _check_data(project: Project) -> None:
    """DVC takes all of `data/`, and makes what it takes read-only."""
    if not project.data.exists():
        return
    own = {*project.stages, project.settings}
    strangers = sorted(p.name for p in set(project.data.iterdir()) - own if p.name[0] != ".")
    if strangers:
        raise UserError(
            f"{project.data} is the pipeline's alone, but holds {', '.join(strangers[:5])}. "
            "Move what is yours elsewhere; images are read from any folder (source.path)."
        )


def check_augmentation(settings: Settings) -> None:
    """Raise UserError for what is not here, and for settings that the editor cannot honour."""
    check_device(settings)
    _check_edits_and_mixing(settings)


def _check_edits_and_mixing(settings: Settings) -> None:
    mixing, editing = settings.mixing, settings.editing
    unknown = [prompt for prompt in editing.prompts if prompt.lower() not in PAPER_PROMPTS]
    if editing.editor == BUNDLED and unknown:
        warnings.warn(
            f"The bundled editor does not know these prompts: {', '.join(unknown)}. It draws "
            "something near one of its own for them, or nothing; its own are "
            f"{', '.join(PAPER_PROMPTS)}.",
            stacklevel=3,
        )
    fractals_version(mixing, settings.seed)
    if mixing.seam > settings.size:
        raise UserError(
            f"mixing.seam: {mixing.seam} px is wider than the images. Set it to at most size, "
            f"{settings.size} px."
        )
    folder = locate_editor(editing.editor, editing.revision)
    check_honoured(folder, editing)
    locate_lora(editing.lora)
    if settings.storage.edits:
        SharedEdits(settings.storage.edits).check()
