"""What was found in each image of a source when it was first read: it is not read for that again.

`checked.parquet` lies beside a raw stage's manifest, a row a file by its SHA-256. Until there is
one, a ledger keeps what was found so far.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from diffusemix_pipeline.datasets.columns import places_in
from diffusemix_pipeline.datasets.storage import made_anew
from diffusemix_pipeline.files import Ledger, undamaged

CHECKED = "checked.parquet"
CODE_VERSION = 3  # of what is found
_OUTLINE = 64  # numbers
_SCHEMA = pa.schema(
    {
        "sha256": pa.string(),
        "pixels": pa.string(),
        "outline": pa.binary(2 * _OUTLINE),
        "width": pa.int32(),
        "height": pa.int32(),
        "max_pixels": pa.int64(),
        "version": pa.int32(),
    }
)
_AT_ONCE = 4096  # facts that are held as Python's objects


class Facts(NamedTuple):
    """What is in a picture."""

    pixels: str
    """Identifies it: see `images.pixels_digest`."""
    outline: bytes
    """See `copies.outline`."""
    width: int
    height: int
    """In px."""


class Checked:
    """The facts of files."""

    def __init__(self, table: pa.Table) -> None:
        """Take a table of facts; of one file's, the first count."""
        self._table = table

    @classmethod
    def read(cls, folder: Path, begun: Ledger, max_pixels: int) -> "Checked":
        """Read what lies in a raw stage's folder and was `begun`, as far as the limit is the same.

        What was found for another is of no use.
        """
        tables, path = [_SCHEMA.empty_table(), *_told(begun)], folder / CHECKED
        if path.exists():
            with undamaged(path, made_anew(folder)):
                if parquet.read_schema(path).equals(_SCHEMA):
                    tables.append(parquet.ParquetFile(path).read(use_threads=False))
        table = pa.concat_tables(tables)
        same_limit = pc.equal(table["max_pixels"], max_pixels)
        return cls(table.filter(pc.and_(same_limit, pc.equal(table["version"], CODE_VERSION))))

    def joined(self, found: Sequence[pa.Table]) -> "Checked":
        """Return these facts and others: see `told`."""
        return Checked(pa.concat_tables([self._table, *found]))

    def of(self, digests: pd.Series) -> "Checked":
        """Return the facts of some files alone, as far as there are any."""
        places = self._places(digests)
        return Checked(self._table.take(pa.array(np.unique(places[places >= 0]))))

    def knows(self, digests: pd.Series) -> np.ndarray:
        """Return bool (N,): which files were read before."""
        return self._places(digests) >= 0

    def facts(self, digests: pd.Series) -> pd.DataFrame:
        """Return `pixels`, `width` and `height` of files that were read, in rows as theirs."""
        found = self._of(digests, ["pixels", "width", "height"]).to_pandas()
        return found.set_index(digests.index)

    def outlines(self, digests: pd.Series) -> np.ndarray:
        """Return the outlines of files that were read as float16 (N, 64)."""
        [found] = self._of(digests, ["outline"])["outline"].combine_chunks().buffers()[1:]
        return np.frombuffer(found, np.float16)[: len(digests) * _OUTLINE].reshape(-1, _OUTLINE)

    def write(self, folder: Path) -> None:
        """Write all, in the order of the digests."""
        parquet.write_table(self._table.sort_by("sha256"), folder / CHECKED)

    def _of(self, digests: pd.Series, columns: list[str]) -> pa.Table:
        return self._table.select(columns).take(pa.array(self._places(digests)))

    def _places(self, digests: pd.Series) -> np.ndarray:
        return places_in(self._table["sha256"], digests)


def told(facts: Mapping[str, Facts], max_pixels: int, begun: Ledger) -> pa.Table:
    """Return what was found in files, by digest; keep it for a run that goes on after a cut-off."""
    rows = [
        {"sha256": sha256, **of._asdict(), "max_pixels": max_pixels, "version": CODE_VERSION}
        for sha256, of in facts.items()
    ]
    begun.add(*(row | {"outline": row["outline"].hex()} for row in rows))
    return pa.Table.from_pylist(rows, _SCHEMA)


def _told(begun: Ledger) -> Iterator[pa.Table]:
    facts = iter(begun)
    while some := list(islice(facts, _AT_ONCE)):
        rows = [said | {"outline": bytes.fromhex(said["outline"])} for said in some]
        yield pa.Table.from_pylist(rows, _SCHEMA)
