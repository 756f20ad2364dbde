"""Sources of labelled images: scikit-learn's digits, published datasets, and a user's own."""

import difflib
import hashlib
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from diffusemix_pipeline.datasets.columns import tuples
from diffusemix_pipeline.datasets.images import png_bytes
from diffusemix_pipeline.datasets.items import (
    Item,
    Listing,
    file_item,
    scanned,
    visible_entries,
    written,
)
from diffusemix_pipeline.datasets.manifest import SPLITS
from diffusemix_pipeline.datasets.published import PUBLISHED, published_items
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import digest, digest_of_text
from diffusemix_pipeline.own_code import is_own, own_code
from diffusemix_pipeline.progress import Progress, silent

DIGITS = "digits"
NAMES = (DIGITS, *PUBLISHED)
"""Sources that are no folder; a folder of such a name is given as ./NAME."""
IMAGES = "images"
"""What a Python file that lists images defines: see docs/extending.md."""
_DIGIT_SIDE = 32
_LONGEST_NAME = 255  # bytes, of a folder
_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def list_images(source: str, archives: Path | None = None, progress: Progress = silent) -> Listing:
    """List a source's images in a fixed order; UserError for a source without any.

    A published dataset is read from, and where it is not there downloaded to, `archives`.
    """
    if source == DIGITS:
        return Listing.of(_digits())
    if source in PUBLISHED:
        assert archives is not None, "a published dataset lies in a folder of archives"
        return Listing.of(published_items(source, archives, progress))
    root, found = _on_disk(source)
    return Listing.of(file_item(root, *image) for image in found)


def source_version(source: str) -> str:
    """Identify what a source holds now, as `ingest` notes it.

    A published dataset's archives do not change, so its name says it: nothing is downloaded.
    """
    return source if source in PUBLISHED else source_digest(list_images(source).rows)


def listing_version(source: str) -> str:
    """Identify a user's files by name, size and time: cheap, and another where any was touched.

    UserError where `list_images` gives one.
    """
    found = sorted(_on_disk(source)[1], key=lambda image: image.path)
    return digest_of_text(digest(*_seen(image)) for image in found)


def _seen(image: "_Found") -> tuple[str, str, str | None, int, int]:
    """Return all of an image that can be seen without reading it."""
    path, label, split, unusable = image
    try:
        there = path.lstat() if unusable else path.stat()
        size, changed = there.st_size, there.st_mtime_ns
    except (OSError, ValueError):  # listed, and not there
        size, changed = 0, 0
    return written(str(path)), label, split, size, changed


def source_digest(images: pd.DataFrame) -> str:
    """Identify the content of a source: names, labels, splits and bytes, not times."""
    columns = ["source_id", "label", "split", "sha256"]
    by_name = images[columns].sort_values("source_id").fillna({"split": ""})
    return digest_of_text(digest(*row) for row in tuples(by_name))


def _digits() -> Iterator[Item]:
    for number, label in enumerate(_scikit_digits().target):
        picture = _Digit(number)
        sha256 = hashlib.sha256(png_bytes(picture.pixels())).hexdigest()
        yield Item(f"{DIGITS}/{number:04d}", str(label), None, sha256, picture)


@cache
def _scikit_digits() -> Any:
    from sklearn.datasets import load_digits

    return load_digits()


class _Digit(NamedTuple):
    """A picture of scikit-learn's; no limit of pixels concerns it."""

    number: int

    def read(self, max_pixels: int) -> Image.Image:
        return Image.fromarray(self.pixels())

    def stored(self, max_pixels: int) -> tuple[bytes, str]:
        return png_bytes(self.pixels()), ".png"

    def pixels(self) -> np.ndarray:
        """Return uint8 (32, 32, 3) of scikit-learn's 8 x 8 of 0 to 16."""
        small = _scikit_digits().images[self.number]
        grey = Image.fromarray((small * (255 / 16)).round().astype(np.uint8))
        large = grey.resize((_DIGIT_SIDE, _DIGIT_SIDE), Image.Resampling.BICUBIC)
        return np.repeat(np.asarray(large)[:, :, None], 3, axis=2)


def _on_disk(source: str) -> "tuple[Path, Iterator[_Found]]":
    """Return the folder that holds a user's images, and what is found there."""
    path = Path(source).expanduser()
    return (path.resolve().parent, _listed(source)) if is_own(source) else (path, _folder(path))


def _folder(root: Path) -> "Iterator[_Found]":
    check_is_there(root)
    holds_classes = False
    for found in _found(root):
        holds_classes |= bool(found.label)
        yield found
    if not holds_classes:
        raise UserError(
            f"{root} holds no images in class folders. Lay them out as {root.name}/CLASS/IMAGE "
            f"or {root.name}/{{train,val,test}}/CLASS/IMAGE."
        )


def check_is_there(folder: Path) -> None:
    """Raise UserError, which says what may be named instead, for a source that is no folder."""
    if folder.expanduser().is_dir():
        return
    plain = {name.replace("_", ""): name for name in NAMES}
    meant = "".join(filter(str.isalnum, folder.name.lower()))
    near = difflib.get_close_matches(meant, plain, n=1, cutoff=0.8)
    guess = f"Did you mean {plain[near[0]]}? " if near else ""
    raise UserError(
        f"source.path: the folder {folder} does not exist. {guess}Name a folder of class folders, "
        f"or one of {', '.join(NAMES)}."
    )


class _Found(NamedTuple):
    """What lies in an image folder: an image file, or what is no image of a class, and why."""

    path: Path
    label: str
    """Empty for what belongs to no class."""
    split: str | None
    unusable: str


def _found(root: Path) -> Iterator[_Found]:
    """Give what an image folder holds, by split and class; what cannot be used is named after."""
    top = _subfolders(root)
    splits = {name: _SPLIT_FOLDERS[name.lower()] for name in top if name.lower() in _SPLIT_FOLDERS}
    # A class may be called train: a split holds folders.
    if any(split == "train" and _subfolders(root / name) for name, split in splits.items()):
        homes: dict[Path, str | None] = {root / name: splits[name] for name in sorted(splits)}
        beside = [name for name in top if name not in splits]
    else:
        homes, beside = {root: None}, []
    classes = [(home, name) for home in homes for name in _subfolders(home)]
    _check_labels(root, {written(name) for _, name in classes})
    here = root.resolve()
    for home, name in classes:
        folder, split = home / name, homes[home]
        if here.is_relative_to(folder.resolve()):
            yield _Found(folder, "", split, "a link to a folder that holds this one")
            continue
        entries = visible_entries(folder)
        for path, unusable in entries:
            yield _Found(path, written(name), split, unusable)
        if not entries:
            yield _Found(folder, "", split, "a class without a file")
    for name in beside:
        if any(_images_in(root / name / inner) for inner in _subfolders(root / name)):
            raise UserError(
                f"{root / name} lies beside train, val or test and holds class folders, too. "
                "Rename it to val or test if it is one, or move it elsewhere."
            )
        yield _Found(root / name, "", None, "a folder beside those of train, val and test")
    for home in {root: None} | homes:
        for path in _images_in(home):
            yield _Found(path, "", homes.get(home), "it lies in no folder of a class")


def _listed(source: str) -> Iterator[_Found]:
    """Give the images that a Python file of the user's own lists; UserError for what is wrong."""
    root = Path(source).expanduser().resolve().parent
    images, seen, labels = own_code("source.path", source, IMAGES), set[Path](), set[str]()

    def refused(why: str) -> UserError:
        return UserError(f"source.path: {source} gives {why}. See docs/extending.md.")

    try:
        for name, label, split in images():
            path = root / name
            if not path.is_relative_to(root) or ".." in path.parts:
                raise refused(f"{path}, which lies outside of {root}")
            if path in seen:
                raise refused(f"{path} twice")
            if not label or label.startswith(".") or set("/\\") & set(label):
                raise refused(f"{path} the class {label!r}, which can be no folder's name")
            if split not in (None, *SPLITS):
                raise refused(f"{path} the split {split!r}, which is none of {', '.join(SPLITS)}")
            seen.add(path)
            labels.add(label)
            # A pipe would be waited for.
            unusable = "" if path.is_file() else "no file of that name is there"
            yield _Found(path, label, split, unusable)
        if not seen:
            raise refused("no image")
        _check_labels(root, labels)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"source.path: {source} fails ({type(error).__name__}: {error}). Mend it."
        ) from error


def _check_labels(root: Path, labels: set[str]) -> None:
    """Raise UserError for names that could not be told apart, or written, elsewhere."""
    alike: dict[str, str] = {}
    for label in sorted(labels):
        if any(unicodedata.category(character) == "Cc" for character in label):
            raise UserError(f"{root}: rename the class {label!r}: it holds a control character.")
        if len(label.encode()) > _LONGEST_NAME:
            raise UserError(
                f"{root}: give the class {label[:40]}… a shorter name: it takes more than "
                f"{_LONGEST_NAME} bytes."
            )
        other = alike.setdefault(unicodedata.normalize("NFC", label).casefold(), label)
        if other != label:
            raise UserError(
                f"{root}: the classes {other!a} and {label!a} differ only in case or in how an "
                "accent is encoded, which other systems do not tell apart. Rename one, or put "
                "their images together."
            )


def _images_in(folder: Path) -> list[Path]:
    with scanned(folder) as entries:
        suffixes = Image.registered_extensions()
        names = [e.name for e in entries if not e.name.startswith(".") and not e.is_dir()]
    return sorted(folder / name for name in names if Path(name).suffix.lower() in suffixes)


def _subfolders(folder: Path) -> list[str]:
    with scanned(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
