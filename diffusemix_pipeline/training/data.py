"""Stage folders as labelled images: what classifiers are trained on, chosen and judged by."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffusemix_pipeline.datasets.columns import tuples
from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.datasets.storage import StoredFiles
from diffusemix_pipeline.progress import Progress, silent

_DISK_RESERVE = 1_000_000_000  # bytes left to everything else that writes


class DecodedImages:
    """Images uint8 (N, S, S, 3) in a file: a slice or an index array reads those that it names.

    Memory holds none of them; the pages of a mapped file would count as held. The file has no name,
    so it goes with the process, even a killed one.
    """

    def __init__(self, images: Iterable[np.ndarray], size: int, folder: Path) -> None:
        """Write `images`, uint8 (size, size, 3) each, to the file system on which `folder` lies."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this)
        self._shape = (size, size, 3)
        count = 0
        for image in images:
            self._file.write(image.tobytes())
            count += 1
        self._file.flush()
        self._places = np.arange(count)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        places = self._places[index]
        pixels = np.empty((len(places), *self._shape), np.uint8)
        for place, image in zip(places.tolist(), pixels, strict=True):
            # Unlike seek and read, this shares no position with other threads and forks.
            read = os.preadv(self._file.fileno(), [image.data], place * image.nbytes)
            assert read == image.nbytes
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        """Let a process that is just being started share the file."""
        return {**vars(self), "_file": DupFd(self._file.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _file=os.fdopen(state["_file"].detach(), "rb"))

    def subset(self, index: np.ndarray) -> "DecodedImages":
        """Return the images that an int or bool array names, in the same file."""
        subset = object.__new__(DecodedImages)  # copy.copy would ask for the state of a new process
        vars(subset).update(vars(self))
        subset._places = self._places[index]
        return subset


class StoredImages:
    """Image files read as uint8 (N, S, S, 3): each is decoded again whenever it is asked for."""

    def __init__(self, files: Sequence[StoredFiles], rows: pd.DataFrame, size: int) -> None:
        """Take stages' files, and rows with `file_name` and `stage`, its place in `files`."""
        self._files, self._rows, self._size = files, rows[["stage", "file_name"]], size

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        pixels = np.empty((len(self._rows.iloc[index]), self._size, self._size, 3), np.uint8)
        for place, image in enumerate(self.subset(index)):
            pixels[place] = image
        return pixels

    def __iter__(self) -> Iterator[np.ndarray]:
        for stage, name in tuples(self._rows):
            yield self._files[stage].pixels(name, self._size)

    def subset(self, index: slice | np.ndarray) -> "StoredImages":
        """Return the images that a slice, an int or a bool array names."""
        return StoredImages(self._files, self._rows.iloc[index], self._size)


Images = np.ndarray | DecodedImages | StoredImages
"""uint8 (N, S, S, 3), read by slices and index arrays."""


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 (N, S, S, 3), their labels int64 (N,), and their files' SHA-256."""

    images: DecodedImages | StoredImages
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

    Within a stage, their order follows from label and content: a file's name changes nothing. While
    they are in use, the decoded images take `size` ** 2 * 3 bytes each of the disk of `aside`;
    where they do not fit, each is decoded when it is asked for, and a warning says so.
    """
    columns = ["label", "sha256", "file_name"]
    each = [ordered_rows(s, split, columns).assign(stage=n) for n, s in enumerate(stages)]
    rows = pd.concat(each, ignore_index=True)
    stored = StoredImages([stage.files for stage in stages], rows, size)
    index_of = {label: index for index, label in enumerate(classes)}
    labels, ids = np.array(rows["label"].map(index_of), np.int64), list(rows["sha256"])
    if not _fits(len(rows) * size**2 * 3, split, aside):
        return LabelledImages(stored, labels, ids)

    def decoded() -> Iterator[np.ndarray]:
        for done, image in enumerate(stored, 1):
            yield image
            progress(f"Reading {split} images", done, len(rows))

    return LabelledImages(DecodedImages(decoded(), size, aside), labels, ids)


LoadImages = Callable[..., LabelledImages]
"""Loads as `load_images` does."""


def loading_once() -> LoadImages:
    """Return `load_images` for one after another: what was asked for last of a split is kept."""
    last: dict[str, tuple[Any, LabelledImages]] = {}

    def load(
        stages: Sequence[Stage], split: str, classes: Sequence[str], size: int, **how: Any
    ) -> LabelledImages:
        asked = [(stage.folder, stage.version) for stage in stages], list(classes), size
        if split not in last or last[split][0] != asked:
            last.pop(split, None)  # its disk is free before the next ones are decoded
            last[split] = asked, load_images(stages, split, classes, size, **how)
        return last[split][1]

    return load


def _fits(needed: int, split: str, folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    fits = needed + _DISK_RESERVE <= free
    if not fits:
        warnings.warn(
            f"Decoded, the {split} images would take {needed / 1e9:.1f} GB of the disk of "
            f"{folder}, which has {free / 1e9:.1f} GB left: each is decoded whenever it is used, "
            "which takes longer.",
            stacklevel=3,
        )
    return fits


def ordered_rows(stage: Stage, split: str, columns: Sequence[str]) -> pd.DataFrame:
    """Return columns of the manifest's rows of a split, in the order of `load_images`."""
    rows = stage.manifest(list({"split", "label", "sha256", *columns})).query("split == @split")
    return rows.sort_values(["label", "sha256"], kind="stable")[list(columns)]
