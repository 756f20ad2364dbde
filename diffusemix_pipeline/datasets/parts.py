"""Stage folders are written in parts, each by whichever process is free.

A part is what is made of some source images. It is made anew only where what it follows from has
changed, and is kept where a run was cut off; the rest is taken over from the older folder. Several
parts are made by several processes, a single one and few images by threads.
"""

import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from diffusemix_pipeline.datasets.manifest import (
    MANIFEST,
    STAGE,
    Stage,
    TablesWriter,
    part_table,
    read_stage,
)
from diffusemix_pipeline.datasets.storage import INDEX, Layout, ShardWriter, read_index, write_index
from diffusemix_pipeline.devices import usable_cores
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import BEGUN, link_or_copy, replaced_folder
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.workers import in_processes

_SHARD, _INDEX = "shard.tar", "index.parquet"
_WORTH_PROCESSES = 300  # images: they start as fast as so few are made

StoredRow = tuple[dict[str, Any], bytes | Path]
"""A manifest row, and the image's bytes or the file that holds them."""
Make = Callable[[Any, int], Iterable[StoredRow]]
"""Makes a part's images from its work, with so many threads; can be pickled."""


class Part(NamedTuple):
    """One part of a stage; see `Layout.part_of`."""

    name: str
    fingerprint: str
    """Of all that its rows and files follow from."""
    work: Any
    """What its maker needs to know; can be pickled."""
    images: int
    """How many it makes, for whoever waits."""


class StageWriter:
    """A stage folder that is being written."""

    def __init__(
        self, folder: Path, old: Stage | None, layout: Layout, classes: Sequence[str], begun: Path
    ) -> None:
        self.folder = folder
        self.notes: dict[str, Any] = {}
        self._layout, self._begun = layout, begun
        self._labels = {label: index for index, label in enumerate(classes)}
        alike = old is not None and old.layout.get("packed") == layout.packed
        self._old = _OldParts(old) if old and alike else None
        self._parts: dict[str, str] = {}
        """Name -> fingerprint."""
        self._new: set[str] = set()
        """Names of those whose maker puts their files into the folder."""

    def write(
        self,
        parts: Iterable[Part],
        make: Make,
        *,
        total: int,
        describe: str,
        progress: Progress = silent,
    ) -> None:
        """Make the parts that are not there; `progress` is told of the `total` images."""
        told = 0

        def tell(images: int) -> None:
            nonlocal told
            told += images
            if images:  # a part may hold none, and the end is told once
                progress(describe, told, total)

        maker = _Maker(make, self._layout.packed, self._labels, self._begun, self.folder)
        missing = self._missing(parts, tell)
        first: list[Part] = []
        while sum(part.images for part in first) < _WORTH_PROCESSES or len(first) == 1:
            if (part := next(missing, None)) is None:
                break
            first.append(part)
        else:
            with in_processes(maker, chain(first, missing)) as made:
                for images in made:
                    tell(images)
            return
        for part in first:
            maker.make_here(part, tell)

    def _missing(self, parts: Iterable[Part], tell: Callable[[int], None]) -> Iterator[Part]:
        """Give the parts that neither the older folder nor a run that was cut off has."""
        for part in parts:
            self._parts[part.name] = part.fingerprint
            begun = (self._begun / part.fingerprint / MANIFEST).exists()
            if begun or (self._old and self._old.holds(part.name, part.fingerprint)):
                tell(part.images)
            else:
                self._new.add(part.name)
                yield part

    def put_together(self, facts: dict[str, Any]) -> None:
        """Put all parts' files into the folder, and write its tables with what is said of it."""
        tables, index = TablesWriter(self.folder), {}
        for name, fingerprint in sorted(self._parts.items()):
            part: _MadePart | _OldPart
            if (self._begun / fingerprint / MANIFEST).exists():
                part = _MadePart(self._begun / fingerprint)
            else:
                assert self._old is not None
                part = self._old.part(name)
            rows = part.rows
            tables.add(name, fingerprint, rows, part.version)
            if self._layout.packed:
                index[f"{name}.tar"] = part.index
            if name not in self._new:
                _put_files(name, rows, part, self._layout.packed, self.folder)
        if self._layout.packed:
            write_index(self.folder, index)
        tables.close({**facts, "notes": self.notes, "layout": self._layout.document()})


@contextmanager
def write_stage(
    folder: Path,
    *,
    name: str,
    fingerprint: str,
    layout: Layout,
    classes: Sequence[str],
    aside: Path,
) -> Iterator[StageWriter]:
    """Fill a stage folder aside, then put it in the place of the old one: manifest last, rename.

    `read_stage(folder)` gives the result afterwards. Parts that were made before a cut-off wait in
    `aside`, on the same file system, for the next call.
    """
    old = read_stage(folder) if (folder / STAGE).exists() else None
    begun = aside / f"{folder.name}{BEGUN}"
    for half_written in begun.glob("*.*"):  # parts of writers that were killed, or had no disk left
        shutil.rmtree(half_written)
    with replaced_folder(folder, mark=STAGE, aside=aside) as partial:
        writer = StageWriter(partial, old, layout, classes, begun)
        yield writer
        writer.put_together({"stage": name, "fingerprint": fingerprint})
    shutil.rmtree(begun, ignore_errors=True)
    pa.default_memory_pool().release_unused()  # to the system, before the next stage takes more


@dataclass(frozen=True)
class _MadePart:
    """A part that was made for this stage, in a folder of its own."""

    folder: Path
    version: None = None

    @property
    def rows(self) -> pa.Table:
        return parquet.ParquetFile(self.folder / MANIFEST).read(use_threads=False)

    @property
    def files(self) -> Path:
        return self.folder

    @property
    def shard(self) -> Path:
        return self.folder / _SHARD

    @property
    def index(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / _INDEX)


@dataclass(frozen=True)
class _OldPart:
    """A part of the stage folder that is replaced."""

    version: str
    rows: pa.Table
    files: Path
    shard: Path
    index: pd.DataFrame | None


def _put_files(
    name: str, rows: pa.Table, part: _MadePart | _OldPart, packed: bool, folder: Path
) -> None:
    """Put a part's files into a stage folder."""
    if packed:
        link_or_copy(part.shard, folder / f"{name}.tar")
        return
    for file in rows["file_name"].to_pylist():
        link_or_copy(part.files / file, folder / file)


class _OldParts:
    """The parts of the stage folder that is replaced."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._packed = stage, Layout(**stage.layout).packed
        self._numbers = {name: number for number, name in enumerate(stage.parts)}

    def holds(self, name: str, fingerprint: str) -> bool:
        """Say whether it has a part that follows from the same, with all its files."""
        if name not in self._numbers or self._stage.parts[name].fingerprint != fingerprint:
            return False
        files = [INDEX, f"{name}.tar"] if self._packed else self._names(name)
        return all((self._stage.folder / file).exists() for file in files)

    def part(self, name: str) -> _OldPart:
        folder = self._stage.folder
        index = self._index[f"{name}.tar"] if self._packed else None
        version = self._stage.parts[name].version
        return _OldPart(version, self._rows(name), folder, folder / f"{name}.tar", index)

    def _rows(self, name: str) -> pa.Table:
        return self._manifest.read_row_group(self._numbers[name], use_threads=False)

    def _names(self, name: str) -> list[str]:
        return list(self._rows(name)["file_name"].to_pylist())

    @cached_property
    def _manifest(self) -> parquet.ParquetFile:
        self._stage.manifest(["file_name"])  # checked: no name leads out of the folder
        return parquet.ParquetFile(self._stage.folder / MANIFEST)

    @cached_property
    def _index(self) -> dict[str, pd.DataFrame]:
        return read_index(self._stage.folder)


@dataclass(frozen=True)
class _Maker:
    """Makes parts, each into a folder of its own below `begun`; can be pickled.

    From there their files are put into the stage's `folder`.
    """

    make: Make
    packed: bool
    labels: dict[str, int]
    begun: Path
    folder: Path

    def __call__(self, part: Part) -> int:
        """Make a part, and return how many images it wanted."""
        self._write(part, self.make(part.work, 1))
        return part.images

    def make_here(self, part: Part, tell: Callable[[int], None]) -> None:
        """Make a part by threads; `tell` hears of each image."""

        def told(images: Iterable[StoredRow]) -> Iterator[StoredRow]:
            for image in images:
                yield image
                tell(1)

        made = self._write(part, told(self.make(part.work, usable_cores())))
        tell(part.images - made)  # what was wanted and not made

    def _write(self, part: Part, images: Iterable[StoredRow]) -> int:
        """Write a part's folder, and return how many images it has."""
        self.begun.mkdir(parents=True, exist_ok=True)
        folder = self.begun / f"{part.name}.{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        rows = self._pack(images, folder) if self.packed else self._write_files(images, folder)
        table = part_table(rows)
        parquet.write_table(table, folder / MANIFEST)
        try:
            folder.rename(self.begun / part.fingerprint)
        except OSError:  # whoever was killed had just made the same
            if not (self.begun / part.fingerprint / MANIFEST).exists():
                raise
            shutil.rmtree(folder)
        made = _MadePart(self.begun / part.fingerprint)
        _put_files(part.name, table, made, self.packed, self.folder)
        return len(rows)

    def _write_files(self, images: Iterable[StoredRow], folder: Path) -> list[dict[str, Any]]:
        rows = []
        for row, content in images:
            target = folder / row["file_name"]
            if isinstance(content, Path):
                link_or_copy(content, target)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            rows.append(row)
        return rows

    def _pack(self, images: Iterable[StoredRow], folder: Path) -> list[dict[str, Any]]:
        rows = []
        with (folder / _SHARD).open("wb") as file:
            shard = ShardWriter(file)
            for row, content in images:
                read = content.read_bytes() if isinstance(content, Path) else content
                if hashlib.sha256(read).hexdigest() != row["sha256"]:
                    raise UserError(
                        f"The bytes of {row['image_id']} are no longer those that it is known by. "
                        "Run again; if it stays so, `diffusemix store verify` sets what is damaged "
                        "in the edit store aside."
                    )
                shard.add(row["file_name"], read, self.labels[row["label"]])
                rows.append(row)
            shard.close()
        shard.index().to_parquet(folder / _INDEX, index=False)
        return rows
