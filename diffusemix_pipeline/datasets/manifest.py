"""A stage folder's tables: `manifest.parquet`, a row an image, and `stage.json`, what made it.

Both hold only what the inputs determine. Times, hosts and run ids would change the version. The
rows of a part are a row group, in the order of the parts' names, so that a part is read and written
without the others.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from diffusemix_pipeline.datasets.checked import CHECKED
from diffusemix_pipeline.datasets.storage import (
    INDEX,
    INFO,
    Differences,
    Layout,
    StoredFiles,
    differences,
    made_anew,
)
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import undamaged, write_json
from diffusemix_pipeline.settings import Storage

MANIFEST = "manifest.parquet"
STAGE = "stage.json"
REJECTED = "rejected.parquet"
"""What a label gate kept out of the stage."""
TABLES = {MANIFEST, STAGE, REJECTED, CHECKED, INDEX, INFO}
"""The files of a stage folder that are no images."""
SPLITS = ("train", "val", "test")
_FORMAT = 2  # of both tables; what an earlier version wrote is read, and taken over by no other
_VERSION_BITS = 128

# What each column holds, for a person: docs/data.md.
_DTYPES = {
    "image_id": "str",
    "file_name": "str",
    "label": "str",
    "split": "str",
    "source_id": "str",
    "source_sha256": "str",
    "prompt": "str",
    "copy": "Int32",
    "attempt": "Int32",
    "edit_key": "str",
    "seed": "Int64",
    "mask": "str",
    "fractal_id": "str",
    "lam": "Float64",
    "sha256": "str",
    "width": "Int32",
    "height": "Int32",
    "verdict": "str",
}
_REQUIRED = ("image_id", "file_name", "label", "split", "source_id", "source_sha256", "sha256")
_ARROW_TYPES = {
    "str": pa.string(),
    "Int32": pa.int32(),
    "Int64": pa.int64(),
    "Float64": pa.float64(),
}
_SCHEMA = pa.schema({name: _ARROW_TYPES[dtype] for name, dtype in _DTYPES.items()})
# Arrow's own allocator keeps what pandas frees; the system's gives it back.
pa.set_memory_pool(pa.system_memory_pool())


class PartFacts(NamedTuple):
    """What is known of a part without reading its rows."""

    fingerprint: str
    """See `parts.Part`."""
    version: str
    """See `rows_version`."""
    images: int


@dataclass(frozen=True)
class Stage:
    """One finished stage folder: `version` follows from every row of its manifest."""

    folder: Path
    name: str
    fingerprint: str
    version: str
    counts: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    """See `Layout.document`; empty where an earlier version wrote the folder."""
    parts: dict[str, PartFacts] = field(default_factory=dict)
    """By name, in the order of the names."""
    reused: bool = False

    def manifest(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Read the stage's rows, or some columns of them, in the order of their files' names."""
        return read_manifest(self.folder, columns)

    def rows_of(self, part: str, columns: list[str] | None = None) -> pd.DataFrame:
        """Read the rows of one part, or some columns of them."""
        path = self.folder / MANIFEST
        with undamaged(path, made_anew(self.folder)), parquet.ParquetFile(path) as file:
            number = list(self.parts).index(part)
            rows = file.read_row_group(number, columns=columns, use_threads=False)
        return _checked(rows.to_pandas(), columns)

    @cached_property
    def files(self) -> StoredFiles:
        """Its image files."""
        return StoredFiles(self.folder)

    def image_files(self) -> Iterable[str]:
        """Return the names of the files that hold images: they themselves, or shards."""
        if self.layout.get("packed"):
            return [f"{name}.tar" for name in self.parts]
        return self.manifest(["file_name"])["file_name"]

    def differences(self) -> Differences:
        """Read all images, and compare them with what the manifest says."""
        return differences(self.folder, self.manifest(["file_name", "sha256"]), TABLES)


def read_manifest(folder: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Read and check a stage folder's manifest, or some columns of it, in the order of file names.

    UserError names a folder that holds none.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} holds no {MANIFEST}: run the stage that makes it first.")
    names = None if columns is None else list(dict.fromkeys([*columns, "file_name"]))
    with undamaged(path, made_anew(folder)), parquet.ParquetFile(path) as file:
        read = file.read(names, use_threads=False).to_pandas()
    rows = _checked(read, names)
    return rows.sort_values("file_name", ignore_index=True)[columns or list(_DTYPES)]


def _checked(rows: pd.DataFrame, columns: list[str] | None) -> pd.DataFrame:
    """Return rows of a manifest, or some columns of them, as what they must be; or raise."""
    schema = _schema().select_columns(columns or list(_DTYPES))
    dtypes = {name: _DTYPES[name] for name in schema.columns}
    return schema.validate(rows.astype(dtypes))


def read_stage(folder: Path) -> Stage:
    """Return what a stage folder says of itself; UserError names a folder that holds no stage."""
    path = folder / STAGE
    if not path.exists():
        raise UserError(f"{folder} holds no {STAGE}: run the stage that makes it first.")
    with undamaged(path, made_anew(folder)):
        content = json.loads(path.read_text(encoding="utf-8"))
        layout = {}
        if content.get("format") == _FORMAT:
            parts = {name: PartFacts(**of) for name, of in content["parts"].items()}
            layout = {"layout": content["layout"], "parts": parts}
        return Stage(
            folder,
            content["stage"],
            content["fingerprint"],
            content["version"],
            content["counts"],
            content["notes"],
            **layout,
        )


def layout_of(raw: Stage, storage: Storage) -> Layout:
    """Return the layout of a raw stage's dataset, and of all that is made of it."""
    by_split = raw.counts["by_split"]
    return Layout.of({split: sum(of.values()) for split, of in by_split.items()}, storage)


def finished_stage(folder: Path, fingerprint: str, layout: Layout) -> Stage | None:
    """Return the stage in `folder` if the same fingerprint made it and no file is missing."""
    stage = whole_stage(folder, layout)
    return stage if stage and stage.fingerprint == fingerprint else None


def whole_stage(folder: Path, layout: Layout) -> Stage | None:
    """Return the stage in `folder` if its images lie in such a layout and no file is missing."""
    if not (folder / STAGE).exists():
        return None
    stage = read_stage(folder)
    if stage.layout != layout.document():
        return None
    for table in (CHECKED, REJECTED, INDEX):
        if (folder / table).exists():
            with undamaged(folder / table, made_anew(folder)):
                parquet.read_metadata(folder / table)
    names = [*stage.image_files(), *([INDEX] if layout.packed else [])]
    whole = all((folder / name).exists() for name in names)
    return replace(stage, reused=True) if whole else None


class TablesWriter:
    """Writes a stage folder's tables, one part after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = parquet.ParquetWriter(folder / MANIFEST, _SCHEMA)
        self._parts: dict[str, PartFacts] = {}
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, fingerprint: str, rows: pa.Table, version: str | None) -> None:
        """Write the rows of a part as `part_table` gives them; parts come in the order of names.

        `version` is that of the rows, where it is known.
        """
        assert len(rows)
        assert not self._parts or name > max(self._parts)
        self._file.write_table(rows, row_group_size=len(rows))
        self._parts[name] = PartFacts(fingerprint, version or rows_version(rows), len(rows))
        by_class = rows.group_by(["split", "label"], use_threads=False)
        for of in by_class.aggregate([([], "count_all")]).to_pylist():
            self._counts[of["split"], of["label"]] += of["count_all"]

    def close(self, facts: Mapping[str, Any]) -> None:
        """Write what is said of the stage, the last of all."""
        self._file.close()
        by_split: dict[str, dict[str, int]] = {}
        for (split, label), number in sorted(self._counts.items()):
            by_split.setdefault(split, {})[label] = number
        said = {
            **facts,
            "format": _FORMAT,
            "version": _sum(int(of.version, 16) for of in self._parts.values()),
            "counts": {"images": self._counts.total(), "by_split": by_split},
            "parts": {name: of._asdict() for name, of in self._parts.items()},
        }
        write_json(self._folder / STAGE, said)


def typed(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows as a table; what one does not say is missing."""
    # As objects first: whole numbers beside missing ones would become fractions.
    return pd.DataFrame(rows, columns=list(_DTYPES), dtype=object).astype(_DTYPES)


def part_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return the rows of a part, checked, in the order of their files' names."""
    ordered = _checked(typed(rows), None).sort_values("file_name")
    return pa.Table.from_pandas(ordered, _SCHEMA, preserve_index=False).replace_schema_metadata()


def rows_version(rows: pa.Table) -> str:
    """Return 32 hex digits that identify rows by every value of each, in whatever order.

    It is the sum of the rows' digests, so that the versions of parts give that of the whole
    (AdHash; Bellare and Micciancio 1997, "A New Paradigm for Collision-Free Hashing").
    """
    values = [column.cast(pa.string()) for column in rows.columns]
    # With their lengths, no two rows are written alike; what is missing has none.
    lengths = [pc.binary_length(column).cast(pa.string()) for column in values]
    lines = pc.binary_join_element_wise(
        *values, *lengths, "\t", null_handling="replace", null_replacement=""
    )
    return _sum(_row_digest(line) for chunk in lines.chunks for line in chunk.to_pylist())


def _row_digest(line: str) -> int:
    hasher = hashlib.blake2b(line.encode(), digest_size=_VERSION_BITS // 8)
    return int.from_bytes(hasher.digest())


def _sum(digests: Iterable[int]) -> str:
    return f"{sum(digests) % (1 << _VERSION_BITS):0{_VERSION_BITS // 4}x}"


def class_names(counts: Mapping[str, Any]) -> list[str]:
    """Return the sorted class names of a stage's counts; a label's index is its place here."""
    return sorted({label for labels in counts["by_split"].values() for label in labels})


def without_images(by_split: Mapping[str, Mapping[str, int]], split: str) -> list[str]:
    """Return the classes of train that a split has no image of."""
    return sorted(set(by_split["train"]) - set(by_split.get(split, {})))


@cache
def _schema() -> Any:
    import pandera.pandas as pa

    columns = {
        name: pa.Column(dtype, nullable=name not in _REQUIRED) for name, dtype in _DTYPES.items()
    }
    columns["image_id"].unique = True
    columns["file_name"].unique = True
    columns["split"].checks = [pa.Check.isin(SPLITS)]
    # A manifest may come from elsewhere: what it names lies in its folder, or in the store's, and
    # a label is the name of a folder in it.
    columns["label"].checks = [pa.Check.str_matches(r"(?s)(?!\.\.?\Z)[^/]+\Z")]
    columns["file_name"].checks = [pa.Check.str_matches(r"(?s)(?!/)(?!(.*/)?\.\.(/|\Z))")]
    columns["edit_key"].checks = [pa.Check.str_matches(r"[0-9a-f]{32}\Z")]
    return pa.DataFrameSchema(columns, strict=True, ordered=True)
