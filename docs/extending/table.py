"""A dataset whose classes stand in a table beside its pictures: file,label,split."""

import csv
from collections.abc import Iterator
from pathlib import Path

TABLE = Path(__file__).parent / "labels.csv"


def images() -> Iterator[tuple[str, str, str | None]]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield row["file"], row["label"], row["split"] or None
