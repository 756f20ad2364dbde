"""The label gate's teachers: a classifier a fold, trained on the originals outside of that fold.

An edit is judged by the teacher of its source's fold: one that never saw the source, and so cannot
know it by heart. What a teacher's probabilities mean for an edit is decided in editing/gate.py.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusemix_pipeline.datasets.manifest import Stage, class_names
from diffusemix_pipeline.editing.gate import class_thresholds, verdicts
from diffusemix_pipeline.editing.generate import LabelGate
from diffusemix_pipeline.editing.planning import Plan, Source, teacher_recipe
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import replaced_folder, write_json
from diffusemix_pipeline.identity import digest, seed_from
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings
from diffusemix_pipeline.training.classifier import (
    DESCRIPTION,
    Classifier,
    build_classifier,
    load_classifier,
    save_classifier,
)
from diffusemix_pipeline.training.data import LabelledImages, load_images
from diffusemix_pipeline.training.loop import fit

_BATCH = 16  # images a forward pass: a batch of edits falls apart into folds, each padded to this


@dataclass(frozen=True)
class FoldTeachers:
    """Trained teachers by fold."""

    classes: list[str]
    """C names; a label is an index into them."""
    fold_of: Mapping[str, int]
    """Fold of each training image, by the SHA-256 of its file in `data/raw`."""
    teachers: Mapping[int, Classifier]

    def probabilities(self, source_ids: Sequence[str], pixels: np.ndarray) -> np.ndarray:
        """Return class probabilities float32 (B, C) of uint8 (B, size, size, 3) edits.

        `source_ids` holds the SHA-256 of each edit's source file in `data/raw`. An edit's
        probabilities depend neither on its place in the batch nor on its neighbours.
        """
        folds = np.array([self.fold_of[source_id] for source_id in source_ids], np.int64)
        return _judge(self.teachers, folds, pixels, len(self.classes))


@dataclass(frozen=True)
class Fitted:
    """Teachers, and what they say of the real images that they did not see."""

    teachers: FoldTeachers
    folders: Mapping[int, str]
    """Name of each teacher's folder."""
    labels: np.ndarray
    """int64 (N,): the labels of all N training images."""
    held_out: np.ndarray
    """float32 (N, C): their class probabilities, each image judged by its own fold's teacher."""

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy on held-out images, 0 to 1: how far a verdict of the teachers counts."""
        return float((self.held_out.argmax(1) == self.labels).mean())


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
    train = load_images(raw, "train", classes, settings.size, progress)
    folds = assign_folds(train, settings.editing.gate.folds, settings.seed)
    for fold in np.unique(folds):
        _check_classes(train.labels[folds != fold], classes)
    folders = {
        int(fold): _fit_teacher(
            f"Training fold teacher {fold + 1} of {folds.max() + 1}",
            _subset(train, folds != fold),
            _subset(train, folds == fold),
            classes,
            settings,
            folder=folder,
            aside=aside,
            device=device,
            progress=progress,
        )
        for fold in np.unique(folds)
    }
    fold_of = dict(zip(train.ids, folds.tolist(), strict=True))
    teachers = _load(folder, folders, classes, fold_of, device)
    held_out = _judge(teachers.teachers, folds, train.images, len(classes))
    return Fitted(teachers, folders, train.labels, held_out)


def fit_label_gate(
    plan: Plan,
    raw: Stage,
    *,
    folder: Path,
    aside: Path,
    device: str,
    progress: Progress = silent,
) -> LabelGate:
    """Train or read the teachers of a plan's gate; `folder` keeps them and the verdicts.

    What is known of a fitted gate is kept too: shards, which follow, decode no training image.
    """
    settings, gate = plan.settings, plan.settings.editing.gate
    known, home = folder / "fitted" / f"{plan.gate}.json", folder / "teachers"
    if not known.exists():
        fitted = fit_fold_teachers(
            raw, settings, folder=home, aside=aside, device=device, progress=progress
        )
        classes = fitted.teachers.classes
        thresholds = class_thresholds(
            fitted.held_out, fitted.labels, len(classes), gate.false_reject_rate
        )
        content = {
            "accuracy": fitted.accuracy,
            "classes": classes,
            "fold_of": fitted.teachers.fold_of,
            "teachers": fitted.folders,
            "thresholds": thresholds.tolist(),
        }
        write_json(known, content)
    kept = json.loads(known.read_text(encoding="utf-8"))
    teachers = _load(home, kept["teachers"], kept["classes"], kept["fold_of"], device)
    thresholds = np.array(kept["thresholds"])
    index = {name: place for place, name in enumerate(teachers.classes)}

    def judge(sources: Sequence[Source], originals: np.ndarray, edits: np.ndarray) -> list[str]:
        labels = np.array([index[source.label] for source in sources])
        probabilities = teachers.probabilities([source.sha256 for source in sources], edits)
        return verdicts(originals, edits, labels, probabilities, thresholds, gate)

    return LabelGate(judge, plan.verdicts(folder), kept["accuracy"])


def assign_folds(train: LabelledImages, folds: int, seed: int) -> np.ndarray:
    """Return each image's fold, int64 (N,) in [0, folds).

    Within a class, pictures are dealt to the folds in the order of their hashes, so that folds are
    of one size, and a class with two pictures lies in two folds. Copies of a picture share a fold,
    whatever their files or labels. Neither names nor order count. A new image may move others to
    another fold: it is new to all teachers but one, so they are trained anew all the same.
    """
    pictures = [hashlib.sha256(image.tobytes()).hexdigest() for image in train.images]
    dealt = sorted(
        range(len(train)), key=lambda i: (train.labels[i], seed_from(seed, "fold", pictures[i]))
    )
    fold_of: dict[str, int] = {}
    for index in dealt:
        fold_of.setdefault(pictures[index], len(fold_of) % folds)
    return np.array([fold_of[picture] for picture in pictures], np.int64)


def _check_classes(labels_seen: np.ndarray, classes: Sequence[str]) -> None:
    unseen = [name for index, name in enumerate(classes) if index not in labels_seen]
    if unseen:
        raise UserError(
            "editing.gate: a classifier that leaves out some training images would see none of "
            f"{', '.join(unseen)}. Give each class at least two different images, or set "
            "editing.gate.enabled to false."
        )


def _load(
    folder: Path,
    folders: Mapping[Any, str],
    classes: list[str],
    fold_of: Mapping[str, int],
    device: str,
) -> FoldTeachers:
    """Read teachers; `folders` is by fold, which JSON writes as text."""
    read = {int(fold): load_classifier(folder / name, device) for fold, name in folders.items()}
    return FoldTeachers(classes, fold_of, read)


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
            training.model, classes, settings.size, pretrained=training.pretrained
        )
        fit(
            teacher,
            train,
            held_out,
            training,
            seed=seed_from(fingerprint, "batches"),
            device=device,
            describe=describe,
            augment=_tone,
            progress=progress,
        )
        with replaced_folder(target, mark=DESCRIPTION, aside=aside) as partial:
            save_classifier(teacher, partial)
    return fingerprint


def _tone(images: torch.Tensor) -> torch.Tensor:
    """Draw each image another contrast, brightness and colour cast, and some noise.

    Without it, a teacher knows an original by tones that every style changes: of 450 edits of
    digits, it named a quarter, although the digit was there for anyone to read.
    """

    def uniform(low: float, high: float, channels: int = 1) -> torch.Tensor:
        drawn = torch.rand(len(images), channels, 1, 1, device=images.device)
        return low + (high - low) * drawn

    contrast = uniform(0.4, 1.1) * uniform(0.8, 1.2, 3)
    toned = (images - 0.5) * contrast + 0.5 + uniform(-0.15, 0.15) + uniform(-0.15, 0.15, 3)
    noise = uniform(0, 0.08) * torch.randn_like(images)
    return (toned + noise).clamp(0, 1)


def _fingerprint(train: LabelledImages, classes: Sequence[str], settings: Settings) -> str:
    """Identify a teacher by the images that it sees and everything that shapes its training."""
    seen = list(zip(train.labels.tolist(), train.ids, strict=True))
    return digest("teacher", teacher_recipe(settings), classes, seen)


def _judge(
    teachers: Mapping[int, Classifier], folds: np.ndarray, pixels: np.ndarray, classes: int
) -> np.ndarray:
    """Return float32 (B, C): each image's probabilities by the teacher of its fold."""
    found = np.empty((len(pixels), classes), np.float32)
    for fold in np.unique(folds):
        ours = np.flatnonzero(folds == fold)
        # The shape of a batch changes the bytes of its members: every batch is a full one.
        padded = np.pad(ours, (0, -len(ours) % _BATCH), mode="edge")
        found[ours] = teachers[int(fold)].predict_proba(pixels[padded], _BATCH)[: len(ours)]
    return found


def _subset(images: LabelledImages, chosen: np.ndarray) -> LabelledImages:
    """Return the images where bool (N,) `chosen` is true."""
    index = np.flatnonzero(chosen)
    return LabelledImages(
        images.images[index], images.labels[index], [images.ids[i] for i in index]
    )
