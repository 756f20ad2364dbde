"""The arms of a comparison: what each trains on, and the finished fit of one arm and seed.

Every arm has the same model, recipe, basic crop and flip, optimiser steps and seeds; only the
training images differ, and what is drawn anew for every batch.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from diffusemix_pipeline.datasets.manifest import Stage, class_names
from diffusemix_pipeline.files import replaced_folder, write_json
from diffusemix_pipeline.identity import digest, seed_from
from diffusemix_pipeline.mixing.fractals import fractals_version, load_fractals
from diffusemix_pipeline.mixing.masks import half_mask
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Arm, Settings
from diffusemix_pipeline.training import augmentations
from diffusemix_pipeline.training.augmentations import Augmentation
from diffusemix_pipeline.training.classifier import build_classifier, save_classifier
from diffusemix_pipeline.training.data import LabelledImages, load_images, ordered_rows
from diffusemix_pipeline.training.loop import fit

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

    @property
    def best(self) -> dict[str, float]:
        """The curve's row whose weights were kept: the first with the best val accuracy."""
        row = self.curve.loc[self.curve["val_accuracy"].idxmax()]
        return {name: float(value) for name, value in row.items()}


def fit_fingerprint(arm: Arm, seed: int, stages: Mapping[str, Stage], settings: Settings) -> str:
    """Identify a fit by the images it sees and everything that shapes the training.

    Test images are not among them: a new one costs a reading, not a training.
    """
    added = _ADDED_STAGE.get(arm)
    versions = [_version_of_seen(stages["raw"]), stages[added].version if added else None]
    recipe = settings.training.model_dump(exclude={"arms", "seeds"})
    drawn: list[Any] = []
    if arm in _USES_FRACTALS:
        drawn.append(fractals_version(settings.mixing, settings.seed))
    if arm == "diffusemix_online":
        drawn.append(settings.mixing.model_dump(include={"masks", "seam", "lam"}))
    of_run = [settings.size, settings.seed, recipe, drawn]
    return digest("fit", CODE_VERSION, arm, seed, versions, *of_run)


def _version_of_seen(raw: Stage) -> str:
    """Identify the train and val images by content, split and label."""
    rows = raw.manifest(["split", "label", "sha256"]).query("split != 'test'")
    return digest(class_names(raw.counts), sorted(rows.itertuples(index=False, name=None)))


def finished_fit(checkpoints: Path, fingerprint: str) -> Fit | None:
    """Return the fit of that fingerprint if it was finished before."""
    folder = checkpoints / fingerprint
    if not (folder / _FIT).exists():
        return None
    facts = json.loads((folder / _FIT).read_text(encoding="utf-8"))
    return Fit(folder=folder, curve=pd.read_csv(folder / _CURVE), **facts)


def fit_arm(
    arm: Arm,
    seed: int,
    stages: Mapping[str, Stage],
    settings: Settings,
    *,
    checkpoints: Path,
    fractal_cache: Path,
    aside: Path,
    device: str,
    on_point: Callable[[int, dict[str, float]], None],
    progress: Progress = silent,
) -> Fit:
    """Train one arm with one seed, or return the fit that the same inputs gave before.

    `stages` maps raw, generated, hybrid and augmented to their stages.
    """
    fingerprint = fit_fingerprint(arm, seed, stages, settings)
    finished = finished_fit(checkpoints, fingerprint)
    if finished:
        for point in finished.curve.to_dict("records"):
            on_point(int(point.pop("step")), point)
        return finished
    raw, added = stages["raw"], _ADDED_STAGE.get(arm)
    parts = [raw, stages[added]] if added else [raw]
    classes = class_names(raw.counts)
    train = load_images(parts, "train", classes, settings.size, aside=aside, progress=progress)
    val = load_images([raw], "val", classes, settings.size, aside=aside)
    fractals = {}
    if arm in _USES_FRACTALS:
        mixing = settings.mixing
        fractals = load_fractals(mixing, settings.seed, settings.size, fractal_cache, progress)
    augmentation = _augmentation(
        arm, len(classes), [fractals[name] for name in sorted(fractals)], train, stages, settings
    )
    # Every arm of a seed starts from the same weights.
    torch.manual_seed(seed_from(settings.seed, "weights", seed))
    classifier = build_classifier(
        settings.training.model, classes, settings.size, pretrained=settings.training.pretrained
    )
    curve = fit(
        classifier,
        train,
        val,
        settings.training,
        seed=seed_from(settings.seed, "batches", seed),
        device=device,
        describe=f"Training {arm}, seed {seed}",
        augmentation=augmentation,
        on_point=on_point,
        progress=progress,
    )
    facts = {
        "arm": arm,
        "seed": seed,
        "fingerprint": fingerprint,
        "images": len(train),
        "steps": settings.training.steps,
    }
    with replaced_folder(checkpoints / fingerprint, mark=_FIT, aside=aside) as folder:
        save_classifier(classifier, folder)
        curve.to_csv(folder / _CURVE, index=False)
        write_json(folder / _FIT, facts)
    done = finished_fit(checkpoints, fingerprint)
    assert done is not None
    return done


def _augmentation(
    arm: Arm,
    classes: int,
    fractals: Sequence[np.ndarray],
    train: LabelledImages,
    stages: Mapping[str, Stage],
    settings: Settings,
) -> Augmentation:
    """Return what an arm draws anew for every batch."""
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
            return augmentations.pixmix(fractals)
        case "diffusemix_online":
            mixing, size = settings.mixing, settings.size
            masks = [half_mask(m, size, size, mixing.seam) for m in sorted(mixing.masks)]
            sources = _sources_of_edits(stages["raw"], stages["generated"])
            return augmentations.diffusemix_redrawn(
                train.images, sources, masks, fractals, mixing.lam
            )
        case "vanilla" | "generated_only" | "hybrid_only" | "diffusemix":
            return augmentations.NONE


def _sources_of_edits(raw: Stage, generated: Stage) -> np.ndarray:
    """Return for each edit, int64 (edits,), its original's place among the training images."""
    originals = pd.Index(ordered_rows(raw, "train", ["image_id"])["image_id"])
    places = originals.get_indexer(ordered_rows(generated, "train", ["source_id"])["source_id"])
    assert (places >= 0).all()
    return places


def all_arms(settings: Settings) -> Sequence[tuple[Arm, int]]:
    """List the arms and seeds that the settings ask for."""
    return [(arm, seed) for arm in settings.training.arms for seed in settings.training.seeds]
