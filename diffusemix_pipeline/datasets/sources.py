"""Sources of labelled images: scikit-learn's digits, and a user's folder, only ever read."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffusemix_pipeline.datasets.images import plain_rgb_suffix, png_bytes, read_rgb
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import digest, digest_of_text, file_sha256

DIGITS = "digits"
_DIGIT_SIDE = 32
_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True, slots=True)  # there is one for every image of a source at once
class Item:
    """One labelled image before it is read. `split` is None where the source does not say."""

    source_id: str
    label: str
    split: str | None
    digest: bytes
    """SHA-256 of the file's bytes; none of a file that cannot be read."""
    file: "_File | _Digit"
    pixels: bytes = b""
    """Identifies the picture, once it was read."""
    size: tuple[int, int] = (0, 0)
    """Its width and height in px, once it was read."""

    @property
    def sha256(self) -> str:
        """The digest in hexadecimal, which takes twice its memory."""
        return self.digest.hex()

    def read(self, max_pixels: int) -> Image.Image:
        """Return the upright RGB picture, or raise UnreadableImageError."""
        return self.file.read(max_pixels)

    def stored(self, max_pixels: int) -> tuple[bytes, str]:
        """Return the bytes and the suffix in `data/raw`."""
        return self.file.stored(max_pixels)


def list_items(source: str) -> list[Item]:
    """List a source's images in a fixed order; UserError for a folder without any."""
    return list(_digits() if source == DIGITS else _folder(Path(source).expanduser()))


def source_digest(items: Iterable[Item]) -> str:
    """Identify the content of a source: names, labels, splits and bytes, not times."""
    by_name = sorted(items, key=lambda item: item.source_id)
    return digest_of_text(digest(i.source_id, i.label, i.split or "", i.sha256) for i in by_name)


def _digits() -> Iterable[Item]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for index, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        digit = _enlarged_digit(pixels)
        yield Item(
            source_id=f"{DIGITS}/{index:04d}",
            label=str(label),
            split=None,
            digest=hashlib.sha256(png_bytes(digit)).digest(),
            file=_Digit(digit),
        )


class _Digit(NamedTuple):
    """A picture that is in memory; no limit of pixels concerns it."""

    pixels: np.ndarray

    def read(self, max_pixels: int) -> Image.Image:
        return Image.fromarray(self.pixels)

    def stored(self, max_pixels: int) -> tuple[bytes, str]:
        return png_bytes(self.pixels), ".png"


def _enlarged_digit(pixels: np.ndarray) -> np.ndarray:
    """Turn scikit-learn's 8 x 8 of 0 to 16 into uint8 (32, 32, 3)."""
    grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    large = grey.resize((_DIGIT_SIDE, _DIGIT_SIDE), Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(large)[:, :, None], 3, axis=2)


def _folder(root: Path) -> Iterable[Item]:
    if not root.is_dir():
        raise UserError(f"The image folder {root} does not exist. Give a folder of class folders.")
    top = _subfolders(root)
    splits = {name: _SPLIT_FOLDERS[name.lower()] for name in top if name.lower() in _SPLIT_FOLDERS}
    classes: list[tuple[str | None, str, str]]
    # A class may be called train: a split holds folders.
    if any(split == "train" and _subfolders(root / name) for name, split in splits.items()):
        classes = [
            (split, f"{folder}/{label}", _written(label))
            for folder, split in sorted(splits.items())
            for label in _subfolders(root / folder)
        ]
    else:
        classes = [(None, label, _written(label)) for label in top]
    found = [
        _file_item(root, path, label, split)
        for split, folder, label in classes
        for path in _files(root / folder)
    ]
    if not found:
        raise UserError(
            f"{root} holds no images in class folders. Lay them out as {root.name}/CLASS/IMAGE "
            f"or {root.name}/{{train,val,test}}/CLASS/IMAGE."
        )
    return found


def _file_item(root: Path, path: Path, label: str, split: str | None) -> Item:
    try:
        found = bytes.fromhex(file_sha256(path))
    except OSError:  # reading it will fail as well, and say why
        found = b""
    name = path.relative_to(root).as_posix()
    source_id = _written(name)
    file = _File(root, source_id if source_id == name else name)
    return Item(source_id, label, split, found, file)


class _File(NamedTuple):
    """An image file, in little memory: the root is shared by all, the name with `source_id`."""

    root: Path
    name: str

    @property
    def path(self) -> Path:
        return self.root / self.name

    def read(self, max_pixels: int) -> Image.Image:
        return read_rgb(self.path, max_pixels)

    def stored(self, max_pixels: int) -> tuple[bytes, str]:
        plain = plain_rgb_suffix(self.path)
        if plain:
            return self.path.read_bytes(), plain
        return png_bytes(np.asarray(self.read(max_pixels))), ".png"


def _written(name: str) -> str:
    """Return a file name as text that can be stored: bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _subfolders(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    """List the files below a class folder; what is hidden, as editors' thumbnails are, is not."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
