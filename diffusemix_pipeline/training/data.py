"""Stage folders as arrays: what an arm trains on, and what it is chosen and judged by."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diffusemix_pipeline.datasets.images import read_square
from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.progress import Progress, silent


@dataclass(frozen=True)
class LabelledImages:
    """Decoded images uint8 (N, S, S, 3), their labels int64 (N,), and their files' SHA-256."""

    images: np.ndarray
    labels: np.ndarray
    ids: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def load_images(
    stage: Stage,
    split: str,
    classes: Sequence[str],
    size: int,
    progress: Progress = silent,
) -> LabelledImages:
    """Decode one split of a stage at `size` px; a label is its class's index in `classes`.

    Their order follows from label and content, so that a file's name changes nothing.
    """
    rows: pd.DataFrame = stage.manifest().query("split == @split")
    rows = rows.sort_values(["label", "sha256"])
    images = np.empty((len(rows), size, size, 3), np.uint8)
    for index, name in enumerate(rows["file_name"]):
        images[index] = read_square(stage.folder / name, size)
        progress(f"Reading {stage.name} images", index + 1, len(rows))
    index_of = {label: index for index, label in enumerate(classes)}
    labels = np.array(rows["label"].map(index_of), np.int64)
    return LabelledImages(images, labels, list(rows["sha256"]))


def concatenate(parts: Sequence[LabelledImages]) -> LabelledImages:
    """Join originals and augmented images into one training set."""
    return LabelledImages(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
        [image_id for part in parts for image_id in part.ids],
    )
