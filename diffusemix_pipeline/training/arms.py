"""The arms of a comparison: which images each trains on, and the finished fit of one arm and seed.

Every arm has the same model, recipe, optimiser steps and seeds; only the training images differ.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from diffusemix_pipeline.datasets.manifest import Stage, class_names
from diffusemix_pipeline.files import replaced_folder, write_json
from diffusemix_pipeline.identity import digest, seed_from
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings
from diffusemix_pipeline.training.classifier import build_classifier, save_classifier
from diffusemix_pipeline.training.data import load_images
from diffusemix_pipeline.training.loop import fit

CODE_VERSION = "2"
# What an arm adds to the originals.
_ADDED_STAGE = {
    "vanilla": None,
    "generated_only": "generated",
    "hybrid_only": "hybrid",
    "diffusemix": "augmented",
}
_CURVE = "curve.csv"
_FIT = "fit.json"


@dataclass(frozen=True)
class Fit:
    """One trained classifier: `load_classifier` reads `folder`; `curve` is a row a validation."""

    arm: str
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


def fit_fingerprint(arm: str, seed: int, stages: Mapping[str, Stage], settings: Settings) -> str:
    """Identify a fit by the images it sees and everything that shapes the training.

    Test images are not among them: a new one costs a reading, not a training.
    """
    added = _ADDED_STAGE[arm]
    versions = [_version_of_seen(stages["raw"]), stages[added].version if added else None]
    recipe = settings.training.model_dump(exclude={"arms", "seeds"})
    return digest("fit", CODE_VERSION, arm, seed, versions, settings.size, settings.seed, recipe)


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
    arm: str,
    seed: int,
    stages: Mapping[str, Stage],
    settings: Settings,
    *,
    checkpoints: Path,
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
    raw, added = stages["raw"], _ADDED_STAGE[arm]
    parts = [raw, stages[added]] if added else [raw]
    classes = class_names(raw.counts)
    train = load_images(parts, "train", classes, settings.size, aside=aside, progress=progress)
    val = load_images([raw], "val", classes, settings.size, aside=aside)
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


def all_arms(settings: Settings) -> Sequence[tuple[str, int]]:
    """List the arms and seeds that the settings ask for."""
    return [(arm, seed) for arm in settings.training.arms for seed in settings.training.seeds]
