"""Where the image files of a stage folder lie: as they are, or in tar shards; one way to read both.

What belongs here: names, places and bytes of image files. What does not: their rows (`manifest`),
and making them (`parts`).

A shard is an ordinary tar in WebDataset's naming: `cat/dog-1.png` of the manifest is its member
`cat/dog-1.png`, beside which `cat/dog-1.cls` holds the label's index; dots in a stem are `~` there,
as WebDataset's readers end a key at the first one. `shards.parquet` says where each file's bytes
lie, and `_info.json` tells timm's reader which shards a split has.
"""

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd

from diffusemix_pipeline.datasets.columns import tuples
from diffusemix_pipeline.datasets.images import decode_square
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import undamaged, write_json
from diffusemix_pipeline.settings import Storage

INDEX = "shards.parquet"
INFO = "_info.json"
_PACKED_FROM = 20_000  # images
_SHARD = re.compile(r"[a-z]+-\d{6}\.tar")
_BLOCK = tarfile.BLOCKSIZE
_LABEL = ".cls"
_INDEX_DTYPES = {"name_hash": "uint64", "offset": "int64", "size": "int32"}


@dataclass(frozen=True)
class Layout:
    """How the images of a dataset lie, and into how many parts each split falls."""

    packed: bool
    """Whether a part is a tar shard; if not, it is some files."""
    parts: Mapping[str, int]
    """By split; powers of two, so that a dataset twice as large parts each in two."""

    @classmethod
    def of(cls, counts: Mapping[str, int], storage: Storage) -> "Layout":
        """Return the layout of a dataset of so many source images by split."""
        packed = storage.format == "tar"
        if storage.format == "auto":
            packed = sum(counts.values()) >= _PACKED_FROM
        least = {split: -(-count // storage.shard_images) for split, count in counts.items()}
        return cls(packed, {split: 1 << (n - 1).bit_length() for split, n in least.items() if n})

    def part_of(self, split: str, image_id: str) -> str:
        """Return the name of the part that a source image, and what is made of it, falls into."""
        return f"{split}-{_hash(image_id) % self.parts[split]:06d}"

    def document(self) -> dict[str, object]:
        """Return the layout as JSON."""
        return {"packed": self.packed, "parts": dict(sorted(self.parts.items()))}


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def made_anew(folder: Path) -> str:
    """Say what to do where a file of a stage folder is damaged."""
    return f"Remove {folder} and run again: what is not there is made anew, or pulled."


class StoredFiles:
    """The image files of a stage folder, by their names in the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _index(self) -> "_Index | None":
        path = self.folder / INDEX
        if not path.exists():
            return None
        state = path.stat()
        return _read_index_once(path, state.st_ino, state.st_mtime_ns)

    @property
    def packed(self) -> bool:
        """Whether they lie in tar shards."""
        return self._index is not None

    def read(self, name: str) -> bytes:
        """Return a file's bytes; FileNotFoundError where there is none of that name."""
        with (self.folder / self.holder(name)).open("rb") as file:
            return self.read_from(file, name)

    def pixels(self, name: str, size: int) -> np.ndarray:
        """Return an image as uint8 (size, size, 3); UserError for a file that is damaged."""
        content = self.read(name)
        with undamaged(self.folder / name, made_anew(self.folder)):
            return decode_square(content, size)

    def read_from(self, holder: BinaryIO, name: str) -> bytes:
        """Return a file's bytes from what holds it, opened anew or for files read before."""
        if self._index is None:
            return holder.read()
        place = self._index.place(name)
        return os.pread(holder.fileno(), place.size, place.offset)

    def holder(self, name: str) -> str:
        """Return the file of the folder that holds an image file, which is itself or a shard.

        FileNotFoundError where no shard does.
        """
        return name if self._index is None else self._index.place(name).shard

    def holders(self, names: pd.Series) -> pd.Series:
        """Return what holds each file; missing where no shard does."""
        return names if self._index is None else self._index.shards_of(names)

    def sizes(self, names: pd.Series) -> int:
        """Return how many bytes some files have together; those that are nowhere have none."""
        if self._index is None:
            paths = (self.folder / name for name in names)
            return sum(path.stat().st_size for path in paths if path.exists())
        return self._index.bytes_of(names)


class Differences(NamedTuple):
    """How the files of a folder differ from what its tables say, by names."""

    files: int
    """How many files there are, or shards."""
    strays: list[str]
    missing: list[str]
    changed: list[str]


def differences(folder: Path, expected: pd.DataFrame, tables: set[str]) -> Differences:
    """Read a stage's image files, and compare each `file_name` with the `sha256` it should have.

    `tables` names the files of the folder that hold no images.
    """
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - tables
    stored, changed = StoredFiles(folder), []
    holders = stored.holders(expected["file_name"])
    there = holders.isin(files)
    by_holder = expected[there].assign(holder=holders[there]).sort_values("holder")
    rows = tuples(by_holder[["holder", "file_name", "sha256"]])
    for holder, of_holder in groupby(rows, key=itemgetter(0)):
        with (folder / holder).open("rb") as file:
            for _, name, sha256 in of_holder:
                if hashlib.sha256(stored.read_from(file, name)).hexdigest() != sha256:
                    changed.append(name)
    missing = expected.loc[~there, "file_name"]
    strays = files - set(holders.dropna().unique())
    return Differences(len(files), sorted(strays), sorted(missing), sorted(changed))


def member_name(name: str) -> str:
    """Return a file's name in its shard."""
    path = PurePosixPath(name)
    return str(path.with_name(path.stem.replace(".", "~") + path.suffix))


class _Place(NamedTuple):
    shard: str
    offset: int
    size: int


class _Index:
    """Where each file's bytes lie, found by the hash of its name: 24 bytes each in memory."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.shards: list[str] = list(table["shard"].cat.categories)
        self._hashes = table["name_hash"].to_numpy(np.uint64)
        self._shard = table["shard"].cat.codes.to_numpy(np.int32)
        self._offset = table["offset"].to_numpy(np.int64)
        self._size = table["size"].to_numpy(np.int32)

    def place(self, name: str) -> _Place:
        """Return where a file lies; FileNotFoundError for an unknown name."""
        wanted = np.uint64(_hash(name))
        row = int(self._hashes.searchsorted(wanted))
        if row == len(self._hashes) or self._hashes[row] != wanted:
            raise FileNotFoundError(name)
        return _Place(self.shards[self._shard[row]], int(self._offset[row]), int(self._size[row]))

    def shards_of(self, names: pd.Series) -> pd.Series:
        """Return the shard of each file; missing for an unknown name."""
        rows, known = self._rows(names)
        codes = np.where(known, self._shard[rows], -1)
        return pd.Series(pd.Categorical.from_codes(codes, self.shards), names.index).astype("str")

    def bytes_of(self, names: pd.Series) -> int:
        """Return how many bytes the files have together; an unknown one has none."""
        rows, known = self._rows(names)
        return int(self._size[rows[known]].sum())

    def _rows(self, names: pd.Series) -> tuple[np.ndarray, np.ndarray]:
        """Return int (N,) places in the index, and bool (N,) whether that is the file's."""
        wanted = np.fromiter(map(_hash, names), np.uint64, len(names))
        rows = np.minimum(self._hashes.searchsorted(wanted), len(self._hashes) - 1)
        return rows, self._hashes[rows] == wanted


@lru_cache(maxsize=2)  # a part of a stage is made of two others
def _read_index_once(path: Path, inode: int, changed: int) -> _Index:
    """Read an index, once for all that a process makes of it."""
    return _Index(_read_table(path))


class ShardWriter:
    """Writes one tar shard; the same files in the same order give the same bytes."""

    def __init__(self, file: BinaryIO) -> None:
        # By the locale's encoding, names would differ from machine to machine.
        how: dict[str, Any] = {"format": tarfile.GNU_FORMAT, "encoding": "utf-8"}
        self._tar = tarfile.open(fileobj=file, mode="w", **how)  # noqa: SIM115
        self._rows: list[dict[str, int]] = []

    def add(self, name: str, content: bytes, label: int) -> None:
        """Add a file and its label's index in the sorted classes."""
        member = member_name(name)
        self._put(member, content)
        offset = self._tar.offset - -(-len(content) // _BLOCK) * _BLOCK
        self._rows.append({"name_hash": _hash(name), "offset": offset, "size": len(content)})
        self._put(str(PurePosixPath(member).with_suffix(_LABEL)), str(label).encode())

    def close(self) -> None:
        """End the archive; the file stays open."""
        self._tar.close()

    def index(self) -> pd.DataFrame:
        """Return `name_hash`, `offset` and `size` of each file."""
        return pd.DataFrame(self._rows, columns=list(_INDEX_DTYPES)).astype(_INDEX_DTYPES)

    def _put(self, name: str, content: bytes) -> None:
        header = tarfile.TarInfo(name)  # no time, no owner
        header.size = len(content)
        self._tar.addfile(header, io.BytesIO(content))


def write_index(folder: Path, by_shard: Mapping[str, pd.DataFrame]) -> None:
    """Write the index of a folder's shards from those of each, as `ShardWriter` gives them.

    And `_info.json`, from which timm's reader knows the splits.
    """
    table = pd.concat([rows.assign(shard=shard) for shard, rows in by_shard.items()])
    table = table.astype({"shard": "category"}).sort_values("name_hash", ignore_index=True)
    assert table["name_hash"].is_unique
    table.to_parquet(folder / INDEX, index=False)
    splits: dict[str, dict[str, Any]] = {}
    for shard, rows in sorted(by_shard.items()):
        name = shard.rsplit("-", 1)[0]
        of = splits.setdefault(
            name, {"name": name, "num_samples": 0, "filenames": [], "shard_lengths": []}
        )
        of["num_samples"] += len(rows)
        of["filenames"].append(shard)
        of["shard_lengths"].append(len(rows))
    write_json(folder / INFO, {"splits": splits})


def read_index(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the index of each shard of a folder."""
    table = _read_table(folder / INDEX)
    by_shard = table.groupby("shard", observed=True)
    return {str(shard): rows.drop(columns="shard") for shard, rows in by_shard}


def _read_table(path: Path) -> pd.DataFrame:
    """Read an index; UserError where it names no shard beside it, as one from elsewhere may."""
    with undamaged(path, made_anew(path.parent)):
        table = pd.read_parquet(path).astype({"shard": "category"})
    for shard in table["shard"].cat.categories:
        if not _SHARD.fullmatch(str(shard)):
            raise UserError(
                f"{path} names {shard}, which is no shard beside it. {made_anew(path.parent)}"
            )
    return table
