"""Tombstones: the images and edits that a person took out of the dataset.

They lie in a text file in the project's root, a line each, to be committed with the settings:
`source SHA256 IMAGE_ID` or `edit KEY IMAGE_ID`. Who wants one back deletes its line. A source is
known by its bytes, split and class: copies of it under another label or in another split stay.
What does not belong here: leaving them out, which is the stages' business.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from diffusemix_pipeline.datasets.manifest import STAGE, read_manifest
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import write_bytes

_LINE = re.compile(r"source ([0-9a-f]{64}) (\S.*/.*/.*)|edit ([0-9a-f]{32})( .*)?")


class Dropped(NamedTuple):
    """What is left out: sources by the SHA-256 of their files and split/class, edits by key."""

    sources: frozenset[tuple[str, str]] = frozenset()
    edits: frozenset[str] = frozenset()


NOTHING = Dropped()


def read_dropped(path: Path) -> Dropped:
    """Read the tombstones; none where there is no file. UserError names a line that is none."""
    sources, edits = set(), set()
    for number, line in enumerate(_lines(path), 1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if not found:
            raise UserError(
                f"{path}, line {number}: write 'source SHA256 SPLIT/CLASS/NAME' or 'edit KEY'."
            )
        if found[1]:
            sources.add((found[1], found[2].rpartition("/")[0]))
        else:
            edits.add(found[3])
    return Dropped(frozenset(sources), frozenset(edits))


def drop(path: Path, image_ids: Iterable[str], stages: Iterable[Path]) -> list[str]:
    """Add a tombstone for each image of the stage folders; return the new lines.

    An image of `raw` is a source, which goes with all that was made of it; any other is an edit. A
    source may also be named by its `source_id`, as the report names it. UserError names an image
    that no stage has: nothing is written then.
    """
    known = _lines(path)
    columns = ["image_id", "source_id", "source_sha256", "edit_key"]
    tables = [read_manifest(f, columns) for f in stages if (f / STAGE).exists()]
    tables = [table.set_index("image_id", drop=False) for table in tables]
    tables += [table[table["edit_key"].isna()].set_index("source_id") for table in tables]
    added: list[str] = []
    for name in image_ids:
        table = next((table for table in tables if name in table.index), None)
        if table is None:
            raise UserError(
                f"No stage in data/ has an image '{name}'. An image_id is a file's path below "
                "its stage folder, without the suffix: it is in the stage's manifest.parquet. "
                "A source may be named by its file in the source folder, too."
            )
        row = table.loc[name]
        is_edit = isinstance(row["edit_key"], str)
        kind, key = ("edit", row["edit_key"]) if is_edit else ("source", row["source_sha256"])
        line = f"{kind} {key} {row['image_id']}"
        if line not in known and line not in added:
            added.append(line)
    if added:
        write_bytes(path, "".join(f"{line}\n" for line in (*known, *added)).encode())
    return added


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text. Save it as such, or restore it.") from None
    # Not by splitlines: a class's name may hold what that takes for the end of a line.
    return [line.strip() for line in text.split("\n")]
