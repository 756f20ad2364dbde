"""Labelled images before they are read: what every kind of source gives, and all of them at once.

What does not belong here: which images a source has.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote_from_bytes, unquote_to_bytes

import numpy as np
import pandas as pd
from PIL import Image

from diffusemix_pipeline.datasets.columns import tuples
from diffusemix_pipeline.datasets.images import (
    UnreadableImageError,
    plain_rgb_suffix,
    png_bytes,
    read_rgb,
)
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import file_sha256

_AT_ONCE = 4096  # items that are held as such


class Picture(Protocol):
    """Where an image's pixels are: a named tuple of texts and numbers, the same for a source."""

    def read(self, max_pixels: int) -> Image.Image:
        """Return the upright RGB picture, or raise UnreadableImageError."""
        ...

    def stored(self, max_pixels: int) -> tuple[bytes, str]:
        """Return the bytes and the suffix in `data/raw`."""
        ...


class Item(NamedTuple):
    """One labelled image before it is read. `split` is None where the source does not say."""

    source_id: str
    label: str
    split: str | None
    sha256: str
    """Of the file's bytes; empty for a file that cannot be read."""
    picture: Any
    """See `Picture`."""


@dataclass(frozen=True)
class Listing:
    """The images of a source as a table: some 200 bytes an image, so of any number."""

    rows: pd.DataFrame
    """The fields of `Item`, those of its picture in the place of that."""
    kind: Any
    """The class of its pictures."""

    @classmethod
    def of(cls, items: Iterable[Item]) -> "Listing":
        """Take the items of a source, one at least, all of one kind of picture."""
        names, tables = list(Item._fields[:-1]), []
        kind: Any = None
        texts, left = dict.fromkeys(names, "str"), iter(items)
        while some := list(islice(left, _AT_ONCE)):
            kind = type(some[0].picture)
            values = [[*item[:-1], *item.picture] for item in some]
            tables.append(pd.DataFrame(values, columns=[*names, *kind._fields]).astype(texts))
        return cls(pd.concat(tables, ignore_index=True), kind)

    def pictures(self) -> Iterator[Picture]:
        """Give the picture of each row."""
        return map(self.kind._make, tuples(self.rows[list(self.kind._fields)]))


def file_item(root: Path, path: Path, label: str, split: str | None, unusable: str = "") -> Item:
    """Return the item of an image file below `root`, or of what is `unusable` as one, and why."""
    sha256 = ""
    if not unusable:
        with suppress(OSError):  # reading it will fail as well, and say why
            sha256 = file_sha256(path)
    name = "/".join(path.parts[len(root.parts) :])
    source_id = written(name)
    encoded = "" if source_id == name else quote_from_bytes(os.fsencode(name))
    picture = File(str(root), encoded or name, bool(encoded), unusable)
    return Item(source_id, label, split, sha256, picture)


class File(NamedTuple):
    """An image file: where its name is no text, that is percent-encoded."""

    root: str
    name: str
    encoded: bool
    unusable: str
    """Why it cannot be an image file; empty where it may be one."""

    @property
    def path(self) -> Path:
        """Where it lies."""
        name = os.fsdecode(unquote_to_bytes(self.name)) if self.encoded else self.name
        return Path(self.root, name)

    def read(self, max_pixels: int) -> Image.Image:
        """Return the upright RGB picture, or raise UnreadableImageError."""
        if self.unusable:
            raise UnreadableImageError(self.unusable)
        return read_rgb(self.path, max_pixels)

    def stored(self, max_pixels: int) -> tuple[bytes, str]:
        """Return its bytes where they are a plain RGB JPEG or PNG, else those of a PNG."""
        plain = plain_rgb_suffix(self.path)
        if plain:
            return self.path.read_bytes(), plain
        return png_bytes(np.asarray(self.read(max_pixels))), ".png"


def written(name: str) -> str:
    """Return a file name as text that can be stored: bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def visible_files(folder: Path) -> list[Path]:
    """List the files below a folder, without what `visible_entries` says to be none."""
    return [path for path, unusable in visible_entries(folder) if not unusable]


def visible_entries(folder: Path) -> list[tuple[Path, str]]:
    """List all that lies below a folder but folders, each with why it can be no image file, if so.

    What is hidden, as editors' thumbnails are, is not listed; links to folders are not followed.
    Raises UserError for a folder that cannot be read.
    """
    # By parts as paths are, which takes less than half the time by a key.
    entries = ((Path(path), unusable) for path, unusable in _visible(os.fspath(folder)))
    return sorted(entries, key=lambda entry: entry[0].parts)


def _visible(top: str) -> Iterator[tuple[str, str]]:
    folders, longest = [top], os.pathconf(top, "PC_PATH_MAX")
    while folders:
        with scanned(folders.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir(follow_symlinks=False):
                    yield entry.path, why_unusable(entry)
                elif len(os.fsencode(entry.path)) < longest:
                    folders.append(entry.path)
                else:
                    yield entry.path, "a folder whose path is longer than the system takes"


def why_unusable(entry: "os.DirEntry[str]") -> str:
    """Say why something that is no folder can be no image file; empty where it may be one."""
    # By os.path, as a Path raises where a link's target has too long a name.
    if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path):  # noqa: PTH113
        return ""
    if not entry.is_symlink():
        return "neither a file nor a folder"
    if os.path.isdir(entry.path):  # noqa: PTH112
        return "a link to a folder, which is not followed within a class"
    return "a link that leads to no file"


@contextmanager
def scanned(folder: str | Path) -> Iterator[Iterator["os.DirEntry[str]"]]:
    """Look into a folder; UserError for one that cannot be read."""
    try:
        entries = os.scandir(folder)
    except PermissionError:
        raise UserError(
            f"{folder} cannot be read. Make it readable (`chmod u+rx`), or move it elsewhere."
        ) from None
    with entries:
        yield entries
