"""The arms of a comparison: what each trains on, and the finished fit of one arm and seed.

Every arm has the same model, recipe, basic crop and flip, optimiser steps and seeds; only the
training images differ, and what is drawn anew for every batch.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from diffusemix_pipeline.datasets.columns import rows_digest
from diffusemix_pipeline.datasets.manifest import Stage, class_names, read_manifest
from diffusemix_pipeline.files import BEGUN, replaced_folder, undamaged, write_json
from diffusemix_pipeline.identity import digest, seed_from
from diffusemix_pipeline.mixing.fractals import fractals_version, load_fractals
from diffusemix_pipeline.mixing.masks import half_mask
from diffusemix_pipeline.own_code import is_own
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.recipes import training_identity
from diffusemix_pipeline.settings import Arm, Settings
from diffusemix_pipeline.training import augmentations
from diffusemix_pipeline.training.augmentations import Augmentation
from diffusemix_pipeline.training.classifier import build_classifier, save_classifier, trained_anew
from diffusemix_pipeline.training.data import LabelledImages, LoadImages, load_images, ordered_rows
from diffusemix_pipeline.training.loop import Checkpoint, fit
from diffusemix_pipeline.training.processes import Tell, train_together

if TYPE_CHECKING:
    from accelerate import Accelerator

CODE_VERSION = "3"
# What an arm adds to the originals; those that are not here add nothing.
_ADDED_STAGE: dict[Arm, str] = {
    "generated_only": "generated",
    "hybrid_only": "hybrid",
    "diffusemix": "augmented",
    "diffusemix_online": "generated",
    "diffusemix+cutmix": "augmented",
}
# The arms that use fractals while they train.
_USES_FRACTALS: tuple[Arm, ...] = ("pixmix", "diffusemix_online")
BASELINE: Arm = "vanilla"
SUBJECTS: tuple[Arm, ...] = ("diffusemix", "diffusemix_online")
"""The arms that a comparison is about."""
_CURVE = "curve.csv"
_FIT = "fit.json"


@dataclass(frozen=True)
class Fit:
    """One trained classifier: `load_classifier` reads `folder`; `curve` is a row a validation."""

    arm: Arm
    seed: int
    fingerprint: str
    folder: Path
    curve: pd.DataFrame
    images: int
    steps: int
    per_class: int | None = None
    """The originals a class that it was limited to, with what was made of them."""

    @property
    def best(self) -> dict[str, float]:
        """The curve's row whose weights were kept: the first with the best val accuracy."""
        row = self.curve.loc[self.curve["val_accuracy"].idxmax()]
        return {name: float(value) for name, value in row.items()}


class Wanted(NamedTuple):
    """A fit that is wanted: an arm, a training seed, and the originals a class; None: all."""

    arm: Arm
    seed: int
    per_class: int | None = None

    def __str__(self) -> str:
        few = "" if self.per_class is None else f", {self.per_class} a class"
        return f"{self.arm}, seed {self.seed}{few}"


def slug(arm: Arm) -> str:
    """Return an arm's name as files and MLflow's aliases may bear it."""
    name = Path(arm).stem if is_own(arm) else arm.replace("+", "-with-")
    return re.sub(r"[^\w-]", "-", name)


def fit_fingerprint(wanted: Wanted, stages: Mapping[str, Stage], settings: Settings) -> str:
    """Identify a fit by the images it sees and everything that shapes the training.

    Test images are not among them: a new one costs a reading, not a training.
    """
    arm, seed, per_class = wanted
    added = _ADDED_STAGE.get(arm)
    raw = stages["raw"]
    seen = _version_of_seen(raw.folder, raw.version, tuple(class_names(raw.counts)))
    versions = [seen, stages[added].version if added else None]
    drawn: list[Any] = [augmentations.VERSIONS[arm]] if arm in augmentations.VERSIONS else []
    if is_own(arm):
        drawn.append(augmentations.own_version(arm))
    if arm in _USES_FRACTALS:
        drawn.append(fractals_version(settings.mixing, settings.seed))
    if arm == "diffusemix_online":
        drawn.append(settings.mixing.model_dump(include={"masks", "seam", "lam"}))
    if per_class is not None:
        drawn.append("by training seed")
    of_run = [settings.size, settings.seed, training_identity(settings.training), drawn]
    return digest("fit", CODE_VERSION, arm, seed, per_class, versions, *of_run)


@lru_cache(maxsize=4)
def _version_of_seen(raw: Path, version: str, classes: tuple[str, ...]) -> str:
    """Identify the train and val images of a raw stage's version by content, split and label.

    A run asks for every arm and seed, and of a million images each answer takes half a minute.
    """
    rows = read_manifest(raw, ["split", "label", "sha256"]).query("split != 'test'")
    return digest(classes, rows_digest(rows))


def finished_fit(checkpoints: Path, fingerprint: str) -> Fit | None:
    """Return the fit of that fingerprint if it was finished before."""
    folder = checkpoints / fingerprint
    if not (folder / _FIT).exists():
        return None
    with undamaged(folder / _FIT, trained_anew(folder)):
        facts = json.loads((folder / _FIT).read_text(encoding="utf-8"))
        return Fit(folder=folder, curve=pd.read_csv(folder / _CURVE), **facts)


def fit_arm(
    wanted: Wanted,
    stages: Mapping[str, Stage],
    settings: Settings,
    *,
    checkpoints: Path,
    fractal_cache: Path,
    aside: Path,
    device: str,
    on_point: Callable[[int, dict[str, float]], None],
    progress: Progress = silent,
    load: LoadImages = load_images,
) -> Fit:
    """Train one arm with one seed, or return the fit that the same inputs gave before.

    `stages` maps raw, generated, hybrid and augmented to their stages. `load` is `load_images`, or
    what `loading_once` gives.
    """
    fingerprint = fit_fingerprint(wanted, stages, settings)
    finished = finished_fit(checkpoints, fingerprint)
    if finished:
        for point in finished.curve.to_dict("records"):
            on_point(int(point.pop("step")), point)
        return finished
    images = _images_of(wanted, stages, settings, load, fractal_cache, aside, progress)
    checkpoint = Checkpoint(checkpoints / f"{fingerprint}{BEGUN}", aside)
    with replaced_folder(checkpoints / fingerprint, mark=_FIT, aside=aside) as folder:
        task = _Task(wanted, images, settings, checkpoint, folder)
        if settings.training.processes == 1:
            _train(task, device, on_point, progress)
        else:
            hears: dict[str, Callable[..., None]] = {"point": on_point, "progress": progress}
            train_together(
                settings.training.processes,
                device,
                _train_a_share,
                (task,),
                lambda what, *said: hears[what](*said),
            )
        facts = {
            **wanted._asdict(),
            "fingerprint": fingerprint,
            "images": len(images.train),
            "steps": int(pd.read_csv(folder / _CURVE)["step"].iloc[-1]),
        }
        write_json(folder / _FIT, facts)
    checkpoint.path.unlink(missing_ok=True)
    done = finished_fit(checkpoints, fingerprint)
    assert done is not None
    return done


class _Images(NamedTuple):
    """All that a fit sees."""

    classes: list[str]
    train: LabelledImages
    """Originals first, what was made of them last."""
    sources: np.ndarray
    """Of what was made, int (M,): the place of each one's original."""
    val: LabelledImages
    fractals: list[np.ndarray]


def _images_of(
    wanted: Wanted,
    stages: Mapping[str, Stage],
    settings: Settings,
    load: LoadImages,
    fractal_cache: Path,
    aside: Path,
    progress: Progress,
) -> _Images:
    raw, added = stages["raw"], _ADDED_STAGE.get(wanted.arm)
    parts = [raw, stages[added]] if added else [raw]
    classes = class_names(raw.counts)
    train = load(parts, "train", classes, settings.size, aside=aside, progress=progress)
    sources = _sources_of_edits(raw, stages[added]) if added else np.empty(0, np.int64)
    if wanted.per_class is not None:
        train, sources = _few(
            train, sources, wanted.per_class, seed_from(settings.seed, wanted.seed)
        )
    val = load([raw], "val", classes, settings.size, aside=aside, progress=progress)
    fractals = {}
    if wanted.arm in _USES_FRACTALS:
        mixing = settings.mixing
        fractals = load_fractals(mixing, settings.seed, settings.size, fractal_cache, progress)
    return _Images(classes, train, sources, val, [fractals[name] for name in sorted(fractals)])


class _Task(NamedTuple):
    """What is to be trained, on what, and where it is written."""

    wanted: Wanted
    images: _Images
    settings: Settings
    checkpoint: Checkpoint
    folder: Path


def _train(
    task: _Task,
    device: str,
    on_point: Callable[[int, dict[str, float]], None],
    progress: Progress,
    group: "Accelerator | None" = None,
) -> None:
    """Train a classifier, and write it and its curve into the task's folder; see `loop.fit`."""
    wanted, images, settings, checkpoint, folder = task
    training = settings.training
    # Every arm of a seed starts from the same weights.
    torch.manual_seed(seed_from(settings.seed, "weights", wanted.seed))
    classifier = build_classifier(
        training.model, images.classes, settings.size, pretrained=training.pretrained_at
    )
    curve = fit(
        classifier,
        images.train,
        images.val,
        training,
        seed=seed_from(settings.seed, "batches", wanted.seed),
        device=device,
        describe=f"Training {wanted}",
        augmentation=_augmentation(wanted.arm, images, settings),
        on_point=on_point,
        progress=progress,
        checkpoint=checkpoint,
        group=group,
    )
    if group is None or group.is_main_process:
        save_classifier(classifier, folder)
        curve.to_csv(folder / _CURVE, index=False)


def _train_a_share(task: _Task, group: "Accelerator", tell: Tell) -> None:
    """Do what `_train` does in one process of several, of which the first tells how it goes."""

    def heard(what: str) -> Callable[..., None]:
        return partial(tell, what) if group.is_main_process else lambda *said: None

    _train(task, str(group.device), heard("point"), heard("progress"), group)


def _augmentation(arm: Arm, images: _Images, settings: Settings) -> Augmentation:
    """Return what an arm draws anew for every batch."""
    classes = len(images.classes)
    match arm:
        case "trivialaugment":
            return augmentations.trivialaugment()
        case "randaugment":
            return augmentations.randaugment()
        case "augmix":
            return augmentations.augmix()
        case "mixup":
            return augmentations.mixup(classes)
        case "cutmix" | "diffusemix+cutmix":
            return augmentations.cutmix(classes)
        case "pixmix":
            return augmentations.pixmix(images.fractals)
        case "diffusemix_online":
            mixing, size = settings.mixing, settings.size
            masks = [half_mask(m, size, size, mixing.seam) for m in sorted(mixing.masks)]
            return augmentations.diffusemix_redrawn(
                images.train.images, images.sources, masks, images.fractals, mixing.lam
            )
        case _ if is_own(arm):
            return augmentations.own_augmentation(arm, classes)
        case _:
            return augmentations.NONE


def _sources_of_edits(raw: Stage, generated: Stage) -> np.ndarray:
    """Return for each edit, int64 (edits,), its original's place among the training images."""
    originals = pd.Index(ordered_rows(raw, "train", ["image_id"])["image_id"])
    places = originals.get_indexer(ordered_rows(generated, "train", ["source_id"])["source_id"])
    assert (places >= 0).all()
    return places


def _few(
    train: LabelledImages, sources: np.ndarray, per_class: int, seed: int
) -> tuple[LabelledImages, np.ndarray]:
    """Keep `per_class` originals of each class, and what was made of them.

    `train` holds originals first. A larger number keeps all that a smaller one does. Returns the
    places of the kept edits' originals, too.
    """
    originals = len(train) - len(sources)
    drawn = pd.Series([seed_from(seed, "few", name) for name in train.ids[:originals]])
    kept = (drawn.groupby(train.labels[:originals]).rank(method="first") <= per_class).to_numpy()
    with_edits = np.concatenate([kept, kept[sources]])
    new_place = np.cumsum(kept) - 1
    return train.subset(np.flatnonzero(with_edits)), new_place[sources[kept[sources]]]


def all_fits(settings: Settings) -> list[Wanted]:
    """List the fits of a comparison: every arm, every seed, all training images."""
    training = settings.training
    return [Wanted(arm, seed) for arm in training.arms for seed in training.seeds]


def few_image_fits(settings: Settings, raw: Stage) -> list[Wanted]:
    """List the fits of the curve over the number of images; all images are in `all_fits`."""
    training, most = settings.training, max(raw.counts["by_split"]["train"].values())
    arms = [arm for arm in training.arms if arm == BASELINE or arm in SUBJECTS]
    return [
        Wanted(arm, seed, number)
        for arm in arms
        for number in sorted(set(training.few_images))
        for seed in training.seeds
        if number < most
    ]
