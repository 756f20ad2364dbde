"""The augmentation alone: class folders in, an ImageFolder of augmented images out.

For whoever has a training loop already. Neither dagster, mlflow nor dvc is imported.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.manifest import (
    MANIFEST,
    STAGE,
    TABLES,
    Stage,
    read_stage,
)
from diffusemix_pipeline.devices import choose_device
from diffusemix_pipeline.editing.gate import ACCEPTED
from diffusemix_pipeline.editing.generate import generate, judged_edits
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import write_if_changed
from diffusemix_pipeline.identity import digest
from diffusemix_pipeline.locks import using_edits
from diffusemix_pipeline.mixing.stages import make_augmented
from diffusemix_pipeline.preflight import check_augmentation
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings
from diffusemix_pipeline.training.fold_teachers import label_gate

_SOURCES = "sources.parquet"


class Augmented(NamedTuple):
    """The finished stage, and which source files were not used."""

    stage: Stage
    set_aside: list[dict[str, str]]
    """`source_id` and `reason`."""
    left_out_by_train_per_class: int
    rejected: int
    """Edits that the label gate did not let through."""


def augment_folder(
    train_dir: Path, out: Path, settings: Settings, project: Project, progress: Progress = silent
) -> Augmented:
    """Write `out/<class>/*.png` with `manifest.parquet`, from `train_dir/<class>/*`.

    `sources.parquet` holds the originals' rows: a manifest row's `source_id` is an `image_id`
    there, whose own `source_id` is the path below `train_dir`. Where `storage.format` is `tar`,
    shards are written; `auto` means files, of however many images. Copies of the originals, the
    edits and the store lie under the project's state folder. Raises UserError where `train_dir` is
    not there, and where `out` holds something else or lies within it.
    """
    _check_out(train_dir, out)
    check_augmentation(settings)
    if settings.storage.format == "auto":  # an ImageFolder is what was asked for
        files = settings.storage.model_copy(update={"format": "files"})
        settings = settings.model_copy(update={"storage": files})
    work = project.augment / digest(str(out.resolve()))
    parts = work / "aside"
    raw = ingest(
        str(train_dir.resolve()),  # a folder called cifar10 is no published dataset
        settings,
        work / "raw",
        aside=parts,
        train_only=True,
        progress=progress,
    )
    device = choose_device(settings.device)
    with using_edits(project):
        generated = generate(
            raw,
            settings,
            work / "generated",
            store=EditStore(project.edits, settings.storage.edits),
            aside=parts,
            device=device,
            gate_of=lambda plan: label_gate(
                plan, raw, folder=project.gate, aside=parts, device=device, progress=progress
            ),
            progress=progress,
        ).stage
    aside = out.parent / f".{out.name}.aside"  # on the file system of `out`
    augmented = make_augmented(
        raw,
        generated,
        settings,
        out,
        fractal_cache=project.fractals,
        aside=aside,
        progress=progress,
    )
    write_if_changed(out / _SOURCES, (raw.folder / MANIFEST).read_bytes(), aside=aside)
    for folder in (parts, aside):
        shutil.rmtree(folder, ignore_errors=True)  # with what killed calls left there
    return Augmented(
        augmented,
        raw.notes["set_aside"],
        raw.notes["left_out_by_train_per_class"],
        int((judged_edits(generated)["verdict"] != ACCEPTED).sum()),
    )


def _check_out(train_dir: Path, out: Path) -> None:
    if not train_dir.is_dir():
        raise UserError(f"--train-dir {train_dir} does not exist. Name a folder of class folders.")
    if out.resolve().is_relative_to(train_dir.resolve()):
        raise UserError(f"--out {out} lies inside --train-dir {train_dir}: choose another folder.")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: choose a folder.")
    if out.exists() and any(out.iterdir()) and not _is_earlier_result(out):
        raise UserError(f"--out {out} is not empty and no earlier result: choose another folder.")


def _is_earlier_result(out: Path) -> bool:
    """Tell whether a folder holds what this wrote and nothing else, so that it may be replaced."""
    if not (out / STAGE).exists() or read_stage(out).name != "augmented":
        return False
    own = {*TABLES, _SOURCES, *read_stage(out).image_files()}
    return own >= {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
