"""The label gate's teachers: a classifier a fold, trained on the originals outside of that fold.

An edit is judged by the teacher of its source's fold: one that never saw the source, and so cannot
know it by heart. What a teacher's probabilities mean for an edit is decided in editing/gate.py.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diffusemix_pipeline.arrays import read_arrays, write_arrays
from diffusemix_pipeline.datasets.manifest import Stage, class_names
from diffusemix_pipeline.editing.gate import class_thresholds, verdicts
from diffusemix_pipeline.editing.generate import LabelGate
from diffusemix_pipeline.editing.planning import Plan, SourceImage, teacher_recipe
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import replaced_folder, undamaged
from diffusemix_pipeline.identity import digest, seed_from
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings
from diffusemix_pipeline.training.augmentations import Augmentation
from diffusemix_pipeline.training.classifier import (
    DESCRIPTION,
    Classifier,
    build_classifier,
    load_classifier,
    save_classifier,
)
from diffusemix_pipeline.training.data import Images, LabelledImages, load_images
from diffusemix_pipeline.training.loop import fit

_BATCH = 16  # images a forward pass: a batch of edits falls apart into folds, each padded to this
_JUDGED = 1024  # images whose probabilities are held at a time


@dataclass(frozen=True)
class FoldTeachers:
    """Trained teachers by fold."""

    classes: list[str]
    """C names; a label is an index into them."""
    ids: np.ndarray
    """bytes (N,), sorted: the SHA-256 of each training image's file in `data/raw`, in hex."""
    folds: np.ndarray
    """int64 (N,): the fold of each."""
    teachers: Mapping[int, Classifier]

    def fold_of(self, source_ids: Sequence[str]) -> np.ndarray:
        """Return the folds, int64 (B,), of training images by their SHA-256.

        An image that no teacher saw, as one that was dropped when they were trained, is any fold's.
        """
        asked = np.array(source_ids, self.ids.dtype)
        places = np.searchsorted(self.ids, asked).clip(max=len(self.ids) - 1)
        return np.where(self.ids[places] == asked, self.folds[places], 0)

    def probabilities(self, source_ids: Sequence[str], pixels: np.ndarray) -> np.ndarray:
        """Return class probabilities float32 (B, C) of uint8 (B, size, size, 3) edits.

        `source_ids` holds the SHA-256 of each edit's source file in `data/raw`. An edit's
        probabilities depend neither on its place in the batch nor on its neighbours.
        """
        return _judge(self.teachers, self.fold_of(source_ids), pixels, len(self.classes))


@dataclass(frozen=True)
class Fitted:
    """Teachers, and what they say of the real images that they did not see."""

    teachers: FoldTeachers
    folders: Sequence[str]
    """Name of each teacher's folder, by fold."""
    labels: np.ndarray
    """int64 (N,): the labels of all N training images."""
    held_out: np.ndarray
    """float32 (N,): the probability of each one's label, judged by its own fold's teacher."""
    accuracy: float
    """Top-1 accuracy on held-out images, 0 to 1: how far a verdict of the teachers counts."""


def fit_fold_teachers(
    raw: Stage,
    settings: Settings,
    *,
    folder: Path,
    aside: Path,
    device: str,
    progress: Progress = silent,
) -> Fitted:
    """Train a teacher for each fold of the training images of `raw`, or read it from `folder`.

    Model and recipe are those of `training`. Each teacher lies in a folder named by what shapes it,
    so a run that was cut off loses one teacher at most. Raises UserError for a class of which some
    teacher would see no image.
    """
    classes = class_names(raw.counts)
    train = load_images([raw], "train", classes, settings.size, aside=aside, progress=progress)
    folds = assign_folds(train, settings.editing.gate.folds, settings.seed)
    for fold in np.unique(folds):
        _check_classes(train.labels[folds != fold], classes)
    folders = [
        _fit_teacher(
            f"Training fold teacher {fold + 1} of {folds.max() + 1}",
            train.subset(np.flatnonzero(folds != fold)),
            train.subset(np.flatnonzero(folds == fold)),
            classes,
            settings,
            folder=folder,
            aside=aside,
            device=device,
            progress=progress,
        )
        for fold in np.unique(folds)  # 0, 1, ...
    ]
    ids = np.array(train.ids, "S")
    order = np.argsort(ids)
    teachers = FoldTeachers(classes, ids[order], folds[order], _load(folder, folders, device))
    held_out, accuracy = _judge_held_out(teachers, train, folds)
    return Fitted(teachers, folders, train.labels, held_out, accuracy)


def label_gate(
    plan: Plan,
    raw: Stage,
    *,
    folder: Path,
    aside: Path,
    device: str,
    progress: Progress = silent,
) -> LabelGate:
    """Return a plan's gate, whose teachers are trained or read when they are asked for first.

    `folder` keeps them, the verdicts, and what is known of a fitted gate: shards, which follow,
    decode no training image.
    """
    settings, gate = plan.settings, plan.settings.editing.gate
    known, home = folder / "fitted" / f"{plan.gate}.npz", folder / "teachers"
    classes = class_names(raw.counts)
    index = {name: place for place, name in enumerate(classes)}

    @cache
    def fitted() -> tuple[FoldTeachers, np.ndarray, float]:
        if not known.exists():
            found = fit_fold_teachers(
                raw, settings, folder=home, aside=aside, device=device, progress=progress
            )
            _keep_fitted(known, found, gate.false_reject_rate, aside)
            del found  # not to be held beside what is read
        kept = _read_fitted(known)
        read = _load(home, kept["folders"].tolist(), device)
        teachers = FoldTeachers(classes, kept["ids"], kept["folds"], read)
        return teachers, kept["thresholds"], float(kept["accuracy"])

    def judge(
        sources: Sequence[SourceImage], originals: np.ndarray, edits: np.ndarray
    ) -> list[str]:
        teachers, thresholds, _ = fitted()
        labels = np.array([index[source.label] for source in sources])
        probabilities = teachers.probabilities([source.sha256 for source in sources], edits)
        return verdicts(originals, edits, labels, probabilities, thresholds, gate)

    return LabelGate(judge, plan.verdicts(folder), lambda: fitted()[2])


def _keep_fitted(path: Path, fitted: Fitted, false_reject_rate: float, aside: Path) -> None:
    """Write what is known of fitted teachers, as one file: it is there as a whole or not."""
    classes = len(fitted.teachers.classes)
    known = {
        "ids": fitted.teachers.ids,
        "folds": fitted.teachers.folds,
        "folders": fitted.folders,
        "thresholds": class_thresholds(fitted.held_out, fitted.labels, classes, false_reject_rate),
        "accuracy": fitted.accuracy,
    }
    write_arrays(path, known, aside=aside)


def _read_fitted(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays that `_keep_fitted` wrote."""
    repair = "Delete it and run again: it is made anew from the teachers, which stay."
    with undamaged(path, repair):
        return read_arrays(path, ("ids", "folds", "folders", "thresholds", "accuracy"))


def assign_folds(train: LabelledImages, folds: int, seed: int) -> np.ndarray:
    """Return each image's fold, int64 (N,) in [0, folds).

    Within a class, pictures are dealt to the folds in the order of their hashes, so that folds are
    of one size, and a class with two pictures lies in two folds. Copies of a picture share a fold,
    whatever their files or labels. Neither names nor order count. A new image may move others to
    another fold: it is new to all teachers but one, so they are trained anew all the same.
    """
    hashed = (
        hashlib.sha256(train.images[row : row + 1].tobytes()).hexdigest()
        for row in range(len(train))
    )
    pictures = np.fromiter((seed_from(seed, "fold", each) for each in hashed), np.int64)
    dealt = np.lexsort((pictures, train.labels))
    turns, _ = pd.factorize(pictures[dealt])  # copies of a picture have one turn
    found = np.empty(len(train), np.int64)
    found[dealt] = turns % folds
    return found


def _check_classes(labels_seen: np.ndarray, classes: Sequence[str]) -> None:
    unseen = [name for index, name in enumerate(classes) if index not in labels_seen]
    if unseen:
        raise UserError(
            "editing.gate: a classifier that leaves out some training images would see none of "
            f"{', '.join(unseen)}. Give each class at least two different images, or set "
            "editing.gate.enabled to false."
        )


def _load(folder: Path, names: Sequence[str], device: str) -> dict[int, Classifier]:
    """Read teachers by fold."""
    return {fold: load_classifier(folder / name, device) for fold, name in enumerate(names)}


def _fit_teacher(
    describe: str,
    train: LabelledImages,
    held_out: LabelledImages,
    classes: Sequence[str],
    settings: Settings,
    *,
    folder: Path,
    aside: Path,
    device: str,
    progress: Progress,
) -> str:
    """Train a teacher where it is not there already; return the name of its folder."""
    # Nothing is chosen on the held-out fold, or its probabilities would not be those of unseen
    # images: the one validation comes after the last step, so the last weights stay.
    training = settings.training.model_copy(update={"validations": 1})
    fingerprint = _fingerprint(train, classes, settings)
    target = folder / fingerprint
    if not (target / DESCRIPTION).exists():
        torch.manual_seed(seed_from(fingerprint, "weights"))
        teacher = build_classifier(
            training.model, classes, settings.size, pretrained=training.pretrained_at
        )
        fit(
            teacher,
            train,
            held_out,
            training,
            seed=seed_from(fingerprint, "batches"),
            device=device,
            describe=describe,
            augmentation=Augmentation(batch=_tone),
            progress=progress,
        )
        with replaced_folder(target, mark=DESCRIPTION, aside=aside) as partial:
            save_classifier(teacher, partial)
    return fingerprint


def _tone(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw each image another contrast, brightness and colour cast, and some noise.

    Without it, a teacher knows an original by tones that every style changes: of 450 edits of
    digits, it named a quarter, although the digit was there for anyone to read.
    """

    def uniform(low: float, high: float, channels: int = 1) -> torch.Tensor:
        drawn = torch.rand(len(images), channels, 1, 1, device=images.device)
        return low + (high - low) * drawn

    toned = tone(images, uniform)
    noise = uniform(0, 0.08) * torch.randn_like(images)
    return (toned + noise).clamp(0, 1), labels


def tone(images: torch.Tensor, uniform: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Change contrast, brightness and colour cast by draws of `uniform(low, high, channels=1)`.

    Takes float (N, 3, H, W); a draw is (N, channels, 1, 1). The result may leave [0, 1].
    """
    contrast = uniform(0.4, 1.1) * uniform(0.8, 1.2, 3)
    return (images - 0.5) * contrast + 0.5 + uniform(-0.15, 0.15) + uniform(-0.15, 0.15, 3)


def _fingerprint(train: LabelledImages, classes: Sequence[str], settings: Settings) -> str:
    """Identify a teacher by the images that it sees and everything that shapes its training."""
    seen = list(zip(train.labels.tolist(), train.ids, strict=True))
    return digest("teacher", teacher_recipe(settings), classes, seen)


def _judge_held_out(
    teachers: FoldTeachers, train: LabelledImages, folds: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return each image's probability of its label, float32 (N,), and the top-1 accuracy."""
    own = np.empty(len(train), np.float32)
    right = 0
    for start in range(0, len(train), _JUDGED):
        chosen = np.arange(start, min(start + _JUDGED, len(train)))
        labels = train.labels[chosen]
        images = train.images.subset(chosen)
        found = _judge(teachers.teachers, folds[chosen], images, len(teachers.classes))
        own[chosen] = found[np.arange(len(labels)), labels]
        right += int((found.argmax(1) == labels).sum())
    return own, right / len(train)


def _judge(
    teachers: Mapping[int, Classifier], folds: np.ndarray, images: Images, classes: int
) -> np.ndarray:
    """Return float32 (B, C): each image's probabilities by the teacher of its fold."""
    found = np.empty((len(images), classes), np.float32)
    for fold in np.unique(folds):
        ours = np.flatnonzero(folds == fold)
        # The shape of a batch changes the bytes of its members: every batch is a full one.
        padded = np.pad(ours, (0, -len(ours) % _BATCH), mode="edge")
        of_fold = images[padded] if isinstance(images, np.ndarray) else images.subset(padded)
        found[ours] = teachers[int(fold)].predict_proba(of_fold, _BATCH)[: len(ours)]
    return found
