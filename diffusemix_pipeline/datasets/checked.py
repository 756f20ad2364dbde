"""What was found in each image of a source when it was first read: it is not read for that again.

`checked.parquet` lies beside a raw stage's manifest, a row a file by its SHA-256. Until there is
one, a ledger keeps what was found so far.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from diffusemix_pipeline.datasets.items import Item
from diffusemix_pipeline.files import Ledger

CHECKED = "checked.parquet"
CODE_VERSION = 1  # of what is found
_COLUMNS = ["digest", "pixels", "outline", "width", "height", "max_pixels", "version"]


class Facts(NamedTuple):
    """What is in a picture."""

    pixels: bytes
    """Identifies it: see `images.pixels_digest`."""
    outline: bytes
    """See `copies.outline`."""
    size: tuple[int, int]
    """Width and height in px."""


class Checked:
    """The facts of the files that were read before, by the digest of their bytes."""

    def __init__(self, table: pd.DataFrame) -> None:
        self._columns = [
            table[name].to_numpy() for name in ("pixels", "outline", "width", "height")
        ]
        self._rows = dict(zip(table["digest"], range(len(table)), strict=True))

    @classmethod
    def read(cls, folder: Path, begun: Ledger, max_pixels: int) -> "Checked":
        """Read what lies in a raw stage's folder and was `begun`, as far as the limit is the same.

        What was found for another is of no use.
        """
        path = folder / CHECKED
        before = pd.read_parquet(path) if path.exists() else pd.DataFrame(columns=_COLUMNS)
        told = pd.DataFrame(map(_from_json, begun), columns=_COLUMNS)
        table = pd.concat([of for of in (before, told) if len(of)] or [before])
        same = (table["max_pixels"] == max_pixels) & (table["version"] == CODE_VERSION)
        return cls(table[same])

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def get(self, digest: bytes) -> Facts | None:
        """Return the facts of a file; None for one that was not read."""
        if digest not in self._rows:
            return None
        pixels, outline, width, height = (of[self._rows[digest]] for of in self._columns)
        return Facts(pixels, outline, (int(width), int(height)))


def note(begun: Ledger, digest: bytes, facts: Facts, max_pixels: int) -> None:
    """Keep what was found in a file, for a run that goes on after a cut-off."""
    width, height = facts.size
    values = digest.hex(), facts.pixels.hex(), facts.outline.hex(), width, height
    begun.add(dict(zip(_COLUMNS, (*values, max_pixels, CODE_VERSION), strict=True)))


def _from_json(said: dict[str, Any]) -> dict[str, Any]:
    return said | {name: bytes.fromhex(said[name]) for name in ("digest", "pixels", "outline")}


def write_checked(folder: Path, items: Iterable[Item], max_pixels: int) -> None:
    """Write the facts of images that were read, in the order of their digests."""
    rows = {item.digest: (item.pixels, item.outline, *item.size) for item in items}
    found = [(digest, *rows[digest], max_pixels, CODE_VERSION) for digest in sorted(rows)]
    pd.DataFrame(found, columns=_COLUMNS).to_parquet(folder / CHECKED, index=False)
