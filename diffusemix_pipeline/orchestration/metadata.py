"""What a person wants to see of a stage in the UI: counts as numbers, pictures as pictures."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np

from diffusemix_pipeline.datasets.manifest import Stage

_SHEET_ROWS = 4
_SHEET_COLUMNS = 6


def picture(png: bytes, alt: str) -> dg.MarkdownMetadataValue:
    """Show a PNG inside Dagster's UI; it is kept in the event log, so it should be small."""
    encoded = base64.b64encode(png).decode()
    return dg.MetadataValue.md(f"![{alt}](data:image/png;base64,{encoded})")


def stage_metadata(stage: Stage) -> dict[str, Any]:
    """Return what every stage shows: how many images, whether it was made anew, and where it lies."""
    return {
        "images": stage.counts["images"],
        "reused": stage.reused,
        "folder": dg.MetadataValue.path(str(stage.folder)),
    }


def stage_sheet(stage: Stage, by: str) -> dg.MarkdownMetadataValue:
    """Show a few images of a stage, a row for each of some values of column `by`."""
    from diffusemix_pipeline.datasets.images import read_square
    from diffusemix_pipeline.pictures import contact_sheet

    rows, labels = [], []
    for value, group in list(stage.manifest().groupby(by))[:_SHEET_ROWS]:
        names = group["file_name"].head(_SHEET_COLUMNS)
        rows.append([read_square(stage.folder / name, 64) for name in names])
        labels.append(str(value))
    return picture(contact_sheet(rows, row_labels=labels, cell=64), f"some {stage.name} images")


def side_by_side(columns: Sequence[tuple[str, list[Path]]], size: int) -> bytes:
    """Draw one image going through the stages: a column a stage, a row an image."""
    from diffusemix_pipeline.datasets.images import read_square
    from diffusemix_pipeline.pictures import contact_sheet

    rows: list[list[np.ndarray]] = [
        [read_square(path, size) for path in paths]
        for paths in zip(*(paths for _, paths in columns), strict=True)
    ]
    return contact_sheet(rows, column_labels=[name for name, _ in columns])
