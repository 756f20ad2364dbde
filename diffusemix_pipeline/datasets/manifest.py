"""A stage folder's tables: `manifest.parquet`, a row an image, and `stage.json`, what made it.

Both hold only what the inputs determine. Times, hosts and run ids would change the version.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import replaced_folder, write_json
from diffusemix_pipeline.identity import digest_of_text

MANIFEST = "manifest.parquet"
STAGE = "stage.json"
REJECTED = "rejected.parquet"
"""What a label gate kept out of the stage."""
TABLES = {MANIFEST, STAGE, REJECTED}
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
    reused: bool = False

    def manifest(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Read the stage's rows, or some columns of them."""
        return read_manifest(self.folder, columns)


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
    )


def finished_stage(folder: Path, fingerprint: str) -> Stage | None:
    """Return the stage in `folder` if the same fingerprint made it and no file is missing."""
    if not (folder / STAGE).exists():
        return None
    stage = read_stage(folder)
    if stage.fingerprint != fingerprint:
        return None
    whole = all((folder / name).exists() for name in stage.manifest(["file_name"])["file_name"])
    return replace(stage, reused=True) if whole else None


class StageWriter:
    """Collects the rows of a stage while its files are written into `folder`.

    They wait in files: kept in memory, they would lie between the buffers of images that come and
    go, and the heap would grow by several times their size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: dict[str, Any] = {}
        self._rows: list[dict[str, Any]] = []
        self._waiting = folder / "rows.partial"
        self._files = 0

    def add(self, row: dict[str, Any]) -> None:
        """Add the row of one image; what it does not say is missing."""
        self._rows.append(row)
        if len(self._rows) == CHUNK_ROWS:
            self._put_aside()

    def table(self) -> pd.DataFrame:
        """Return the rows, sorted by file name, typed and checked; no more can be added."""
        self._put_aside()
        rows = pd.read_parquet(self._waiting).astype(_DTYPES)
        shutil.rmtree(self._waiting)
        rows = rows.sort_values("file_name", ignore_index=True)  # this lets the unsorted go
        return _schema().validate(rows, inplace=True)

    def _put_aside(self) -> None:
        self._waiting.mkdir(exist_ok=True)
        _typed(self._rows).to_parquet(self._waiting / f"{self._files:06d}.parquet", index=False)
        self._files += 1
        self._rows = []


@contextmanager
def write_stage(folder: Path, *, name: str, fingerprint: str, aside: Path) -> Iterator[StageWriter]:
    """Fill a stage folder aside, then put it in the place of the old one: manifest last, rename.

    `read_stage(folder)` gives the result afterwards.
    """
    with replaced_folder(folder, mark=STAGE, aside=aside) as partial:
        writer = StageWriter(partial)
        yield writer
        rows = writer.table()
        rows.to_parquet(partial / MANIFEST, index=False, row_group_size=CHUNK_ROWS)
        content = {
            "stage": name,
            "fingerprint": fingerprint,
            "version": version_of(rows),
            "counts": counts_of(rows),
            "notes": writer.notes,
        }
        write_json(partial / STAGE, content)


def _typed(rows: list[dict[str, Any]]) -> pd.DataFrame:
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
    columns["edit_key"].checks = [pa.Check.str_matches(r"[0-9a-f]+\Z")]
    return pa.DataFrameSchema(columns, strict=True, ordered=True)
