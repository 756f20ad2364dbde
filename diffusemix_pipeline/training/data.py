"""Stage folders as arrays: what an arm trains on, and what it is chosen and judged by."""

import copy
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from diffusemix_pipeline.datasets.images import read_square
from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.progress import Progress, silent


class DecodedImages:
    """Images uint8 (N, S, S, 3) in a file: a slice or an index array reads those that it names.

    Memory holds none of them. The file has no name, so it goes with the process, even a killed one.
    """

    def __init__(self, images: Iterable[np.ndarray], size: int, folder: Path) -> None:
        """Write `images`, uint8 (size, size, 3) each, to the file system on which `folder` lies."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this)
        self._shape = (size, size, 3)
        count = sum(1 for image in images if self._file.write(image.tobytes()))
        self._places = np.arange(count)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        places = self._places[index]
        pixels = np.empty((len(places), *self._shape), np.uint8)
        for place, image in zip(places.tolist(), pixels, strict=True):
            self._file.seek(place * image.nbytes)
            self._file.readinto(image.data)
        return pixels

    def subset(self, index: np.ndarray) -> "DecodedImages":
        """Return the images that an int or bool array names, in the same file."""
        subset = copy.copy(self)
        subset._places = self._places[index]
        return subset


Images = np.ndarray | DecodedImages
"""uint8 (N, S, S, 3), read by slices and index arrays."""


@dataclass(frozen=True)
class LabelledImages:
    """Decoded images uint8 (N, S, S, 3), their labels int64 (N,), and their files' SHA-256."""

    images: DecodedImages
    labels: np.ndarray
    ids: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> "LabelledImages":
        """Return the images that an int array names."""
        ids = [self.ids[i] for i in index]
        return LabelledImages(self.images.subset(index), self.labels[index], ids)


def load_images(
    stages: Sequence[Stage],
    split: str,
    classes: Sequence[str],
    size: int,
    *,
    aside: Path,
    progress: Progress = silent,
) -> LabelledImages:
    """Decode one split of some stages at `size` px; a label is its class's index in `classes`.

    Within a stage, their order follows from label and content: a file's name changes nothing.
    `aside` is a folder for the decoded images.
    """
    rows = pd.concat([_rows(stage, split) for stage in stages])

    def decoded() -> Iterator[np.ndarray]:
        for done, path in enumerate(rows["path"], 1):
            yield read_square(Path(path), size)
            progress(f"Reading {split} images", done, len(rows))

    index_of = {label: index for index, label in enumerate(classes)}
    labels = np.array(rows["label"].map(index_of), np.int64)
    return LabelledImages(DecodedImages(decoded(), size, aside), labels, list(rows["sha256"]))


def _rows(stage: Stage, split: str) -> pd.DataFrame:
    """Return label, sha256 and path of a split's images, in the order of `load_images`."""
    rows = stage.manifest(["split", "label", "sha256", "file_name"]).query("split == @split")
    rows = rows.sort_values(["label", "sha256"])
    return rows[["label", "sha256"]].assign(path=f"{stage.folder}/" + rows["file_name"])
