"""One labelled image before it is read: what every kind of source gives, in little memory.

What does not belong here: which images a source has.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from diffusemix_pipeline.datasets.images import plain_rgb_suffix, png_bytes, read_rgb
from diffusemix_pipeline.identity import file_sha256


class Picture(Protocol):
    """Where an image's pixels are."""

    def read(self, max_pixels: int) -> Image.Image:
        """Return the upright RGB picture, or raise UnreadableImageError."""
        ...

    def stored(self, max_pixels: int) -> tuple[bytes, str]:
        """Return the bytes and the suffix in `data/raw`."""
        ...


@dataclass(frozen=True, slots=True)  # there is one for every image of a source at once
class Item:
    """One labelled image before it is read. `split` is None where the source does not say."""

    source_id: str
    label: str
    split: str | None
    digest: bytes
    """SHA-256 of the file's bytes; none of a file that cannot be read."""
    file: Picture
    pixels: bytes = b""
    """Identifies the picture, once it was read."""
    outline: bytes = b""
    """The picture in 128 bytes, once it was read: see `copies.outline`."""
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


def file_item(root: Path, path: Path, label: str, split: str | None) -> Item:
    """Return the item of an image file below `root`."""
    try:
        found = bytes.fromhex(file_sha256(path))
    except OSError:  # reading it will fail as well, and say why
        found = b""
    name = path.relative_to(root).as_posix()
    source_id = written(name)
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


def written(name: str) -> str:
    """Return a file name as text that can be stored: bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def visible_files(folder: Path) -> list[Path]:
    """List the files below a class folder; what is hidden, as editors' thumbnails are, is not."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
