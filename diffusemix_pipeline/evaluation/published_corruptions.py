"""Published sets of corrupted test images, read from a folder: what others' numbers were taken on.

Two layouts are known: ImageNet-C's, `<family>/<severity>/<class>/<image>`, and CIFAR-10-C's,
`<family>.npy` of all severities in turn beside `labels.npy`. What does not belong here: corrupting
images (`corruptions`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args

import numpy as np
from PIL import Image

from diffusemix_pipeline.datasets.images import read_square, to_square
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import digest, file_sha256
from diffusemix_pipeline.settings import Corruption

_SEVERITIES = range(1, 6)
_LABELS = "labels.npy"


class CorruptedSet(Protocol):
    """One family at one severity."""

    @property
    def name(self) -> str:
        """Family and severity, as fog/3."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""

    def read(self, start: int, end: int, size: int) -> np.ndarray:
        """Return some images as uint8 (n, size, size, 3)."""


@dataclass(frozen=True)
class _Files:
    name: str
    labels: np.ndarray
    paths: Sequence[Path]

    def read(self, start: int, end: int, size: int) -> np.ndarray:
        return np.stack([read_square(path, size) for path in self.paths[start:end]])


@dataclass(frozen=True)
class _Rows:
    name: str
    labels: np.ndarray
    pixels: np.ndarray

    def read(self, start: int, end: int, size: int) -> np.ndarray:
        pictures = (Image.fromarray(np.ascontiguousarray(each)) for each in self.pixels[start:end])
        return np.stack([to_square(picture, size) for picture in pictures])


def check_corrupted_sets(place: str) -> None:
    """Raise UserError for a folder that cannot hold sets; none is named by an empty `place`."""
    folder = Path(place).expanduser()
    if not place:
        return
    if not folder.is_dir():
        raise UserError(f"evaluation.corrupted_sets: the folder {folder} does not exist.")
    if not (folder / _LABELS).exists() and not any(_image_files(folder)):
        raise UserError(
            f"evaluation.corrupted_sets: {folder} holds neither FAMILY/SEVERITY/CLASS/IMAGE nor "
            f"FAMILY.npy beside {_LABELS}."
        )


def read_corrupted_sets(place: str, classes: Sequence[str]) -> list[CorruptedSet]:
    """List the sets of the folder `place`, by name; none where it is empty.

    All have as many images, in the same order.

    A class folder is known by its class's whole name, or its first word: ImageNet's are synsets.
    Labels in an array count the classes in the order of their names. Raises UserError for a folder
    without sets, and for what is not laid out so.
    """
    check_corrupted_sets(place)
    if not place:
        return []
    folder = Path(place).expanduser()
    sets = _arrays(folder, classes) if (folder / _LABELS).exists() else _folders(folder, classes)
    for one in sets[1:]:
        if not np.array_equal(one.labels, sets[0].labels):
            raise UserError(
                f"evaluation.corrupted_sets: {one.name} has other images than {sets[0].name}: "
                "every family and severity must show the same ones."
            )
    return sets


def corrupted_sets_version(place: str) -> str:
    """Identify the sets of a folder by their labels, and by the names and sizes of their files.

    Reading millions of images would take hours. Empty where none is named.
    """
    if not place:
        return ""
    folder = Path(place).expanduser()
    labels = folder / _LABELS
    told = file_sha256(labels) if labels.exists() else ""
    files = sorted(folder.glob("*.npy") if told else _image_files(folder))
    return digest(told, [[str(path.relative_to(folder)), path.stat().st_size] for path in files])


def counted(names: Sequence[str]) -> list[int]:
    """Return the places of the sets that an average is over, by names as fog/3.

    Those of the fifteen families where there are any, or all: published archives hold four more
    families, on which methods may be tuned, and published averages leave them out.
    """
    of_fifteen = [p for p, name in enumerate(names) if name.split("/")[0] in get_args(Corruption)]
    return of_fifteen or list(range(len(names)))


def _folders(folder: Path, classes: Sequence[str]) -> list[CorruptedSet]:
    label_of = {name.split()[0]: label for label, name in enumerate(classes)}
    label_of |= {name: label for label, name in enumerate(classes)}
    sets: list[CorruptedSet] = []
    for family in sorted(path for path in folder.iterdir() if path.is_dir()):
        for severity in _SEVERITIES:
            paths = sorted(p for p in (family / str(severity)).glob("*/*") if _is_image(p))
            if not paths:
                continue
            unknown = sorted({path.parent.name for path in paths} - label_of.keys())
            if unknown:
                raise UserError(
                    f"evaluation.corrupted_sets: {family.name}/{severity} has the class "
                    f"{unknown[0]}, which the classifiers do not know."
                )
            labels = np.array([label_of[path.parent.name] for path in paths], np.int64)
            sets.append(_Files(f"{family.name}/{severity}", labels, paths))
    return sets


def _image_files(folder: Path) -> Iterator[Path]:
    for severity in _SEVERITIES:
        yield from filter(_is_image, folder.glob(f"*/{severity}/*/*"))


def _is_image(path: Path) -> bool:
    """Tell an image from what file managers and archives leave beside it, by its name."""
    return not path.name.startswith(".") and path.suffix.lower() in Image.registered_extensions()


def _arrays(folder: Path, classes: Sequence[str]) -> list[CorruptedSet]:
    every = _array(folder / _LABELS).astype(np.int64)
    if every.ndim != 1 or not len(every) or len(every) % 5 or every.max() >= len(classes):
        raise UserError(
            f"evaluation.corrupted_sets: {folder / _LABELS} must hold labels below {len(classes)}, "
            "those of five severities in turn."
        )
    count = len(every) // len(_SEVERITIES)
    sets: list[CorruptedSet] = []
    for path in sorted(folder.glob("*.npy")):
        if path.name == _LABELS:
            continue
        pixels = _array(path)
        fits = pixels.ndim == 4 and len(pixels) == len(every) and pixels.shape[3] == 3
        if pixels.dtype != np.uint8 or not fits:
            raise UserError(
                f"evaluation.corrupted_sets: {path} is {pixels.dtype} {pixels.shape}; it must be "
                f"uint8 ({len(every)}, height, width, 3)."
            )
        for severity in _SEVERITIES:
            part = slice((severity - 1) * count, severity * count)
            sets.append(_Rows(f"{path.stem}/{severity}", every[part], pixels[part]))
    return sets


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"evaluation.corrupted_sets: {path} cannot be read: {error}") from None
