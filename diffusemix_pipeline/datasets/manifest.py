"""A stage folder's tables: `manifest.parquet`, a row an image, and `stage.json`, what made it.

Both hold only what the inputs determine. Times, hosts and run ids would change the version.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow

from diffusemix_pipeline.datasets.checked import CHECKED
from diffusemix_pipeline.datasets.storage import (
    INDEX,
    INFO,
    Differences,
    Layout,
    StoredFiles,
    differences,
)
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import write_json
from diffusemix_pipeline.identity import digest_of_text
from diffusemix_pipeline.settings import Storage

MANIFEST = "manifest.parquet"
STAGE = "stage.json"
REJECTED = "rejected.parquet"
"""What a label gate kept out of the stage."""
TABLES = {MANIFEST, STAGE, REJECTED, CHECKED, INDEX, INFO}
"""The files of a stage folder that are no images."""
SPLITS = ("train", "val", "test")
CHUNK_ROWS = 1024  # held as Python objects at a time

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
# Arrow's own allocator keeps what pandas frees; the system's gives it back.
pyarrow.set_memory_pool(pyarrow.system_memory_pool())


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
    parts: dict[str, str] = field(default_factory=dict)
    """Name -> fingerprint; see `parts.Part`."""
    reused: bool = False

    def manifest(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Read the stage's rows, or some columns of them."""
        return read_manifest(self.folder, columns)

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
        rows = self.manifest(["file_name", "sha256"]).itertuples(index=False, name=None)
        return differences(self.folder, dict(rows), TABLES)


def read_manifest(folder: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Read and check a stage folder's manifest, or some columns of it.

    UserError names a folder that holds none.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} holds no {MANIFEST}: run the stage that makes it first.")
    schema = _schema().select_columns(columns or list(_DTYPES))
    dtypes = {name: _DTYPES[name] for name in schema.columns}
    return schema.validate(pd.read_parquet(path, columns=columns).astype(dtypes))


def read_stage(folder: Path) -> Stage:
    """Return what a stage folder says of itself; UserError names a folder that holds no stage."""
    path = folder / STAGE
    if not path.exists():
        raise UserError(f"{folder} holds no {STAGE}: run the stage that makes it first.")
    content = json.loads(path.read_text(encoding="utf-8"))
    return Stage(
        folder,
        content["stage"],
        content["fingerprint"],
        content["version"],
        content["counts"],
        content["notes"],
        content.get("layout", {}),
        content.get("parts", {}),
    )


def layout_of(raw: Stage, storage: Storage) -> Layout:
    """Return the layout of a raw stage's dataset, and of all that is made of it."""
    by_split = raw.counts["by_split"]
    return Layout.of({split: sum(of.values()) for split, of in by_split.items()}, storage)


def finished_stage(folder: Path, fingerprint: str, layout: Layout) -> Stage | None:
    """Return the stage in `folder` if the same fingerprint made it and no file is missing."""
    if not (folder / STAGE).exists():
        return None
    stage = read_stage(folder)
    if stage.fingerprint != fingerprint or stage.layout != layout.document():
        return None
    names = [*stage.image_files(), *([INDEX] if layout.packed else [])]
    whole = all((folder / name).exists() for name in names)
    return replace(stage, reused=True) if whole else None


def write_tables(folder: Path, rows: pd.DataFrame, facts: Mapping[str, Any]) -> None:
    """Write a stage folder's tables: the rows, and what is said of the stage, the last of all."""
    rows = rows.sort_values("file_name", ignore_index=True)
    rows = _schema().validate(rows, inplace=True)
    rows.to_parquet(folder / MANIFEST, index=False, row_group_size=CHUNK_ROWS)
    write_json(folder / STAGE, {**facts, "version": version_of(rows), "counts": counts_of(rows)})


def typed(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows as a table; what one does not say is missing."""
    return pd.DataFrame(rows, columns=list(_DTYPES)).astype(_DTYPES)


def version_of(rows: pd.DataFrame) -> str:
    """Return a digest of every value of every row, whatever library wrote the file."""
    starts = range(0, max(len(rows), 1), CHUNK_ROWS)
    pieces = (rows[at : at + CHUNK_ROWS].to_csv(index=False, header=at == 0) for at in starts)
    return digest_of_text(pieces)


def counts_of(rows: pd.DataFrame) -> dict[str, Any]:
    """Count images in all and by split and class."""
    by_split: dict[str, dict[str, int]] = {}
    for (split, label), number in rows.groupby(["split", "label"]).size().items():
        by_split.setdefault(str(split), {})[str(label)] = int(number)
    return {"images": len(rows), "by_split": by_split}


def class_names(counts: Mapping[str, Any]) -> list[str]:
    """Return the sorted class names of a stage's counts; a label's index is its place here."""
    return sorted({label for labels in counts["by_split"].values() for label in labels})


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
