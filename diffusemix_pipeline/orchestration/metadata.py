"""What a person wants to see of a stage in the UI: counts as numbers, pictures as pictures."""

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from diffusemix_pipeline.settings import Settings

if TYPE_CHECKING:
    from diffusemix_pipeline.datasets.manifest import Stage

_SHEET_ROWS = 4
_SHEET_COLUMNS = 6


def picture(png: bytes, alt: str) -> dg.MarkdownMetadataValue:
    """Show a PNG inside Dagster's UI; it is kept in the event log, so it should be small."""
    encoded = base64.b64encode(png).decode()
    return dg.MetadataValue.md(f"![{alt}](data:image/png;base64,{encoded})")


def stage_metadata(stage: "Stage", seconds: float | None) -> dict[str, Any]:
    """Return what every stage shows: images, their size, whether made anew, where they lie.

    `seconds` is what its making took; a stage that was there has no speed, nor one of which parts
    were there (None).
    """
    made = seconds and not stage.reused
    names = stage.manifest(["file_name"])["file_name"]
    return {
        "images": stage.counts["images"],
        "megabytes": stage.files.sizes(names) / 1e6,
        "reused": stage.reused,
        **({"images_per_second": stage.counts["images"] / seconds} if made else {}),
        "folder": dg.MetadataValue.path(str(stage.folder)),
    }


def stage_sheet(stage: "Stage", by: str, settings: Settings) -> dict[str, dg.MarkdownMetadataValue]:
    """Show a few images of a stage, a row for each of some values of column `by`.

    Nothing is shown where the settings say so.
    """
    if not settings.thumbnails:
        return {}
    from diffusemix_pipeline.pictures import contact_sheet

    rows, labels = [], []
    for value, group in list(stage.manifest([by, "file_name"]).groupby(by))[:_SHEET_ROWS]:
        names = group["file_name"].head(_SHEET_COLUMNS)
        rows.append([stage.files.pixels(name, 64) for name in names])
        labels.append(str(value))
    sheet = contact_sheet(rows, row_labels=labels, cell=64)
    return {"contact_sheet": picture(sheet, f"some {stage.name} images")}


def stages_picture(stages: "Mapping[str, Stage]") -> bytes:
    """Draw four images going through the stages, a row an image; PNG.

    `stages` maps raw, generated, hybrid and augmented to their stages.
    """
    from diffusemix_pipeline.pictures import contact_sheet

    columns = ["source_id", "label", "prompt", "file_name", "width"]
    augmented = stages["augmented"].manifest(columns)
    few = augmented.iloc[:: max(1, len(augmented) // _SHEET_ROWS)].head(_SHEET_ROWS)
    raw = stages["raw"].manifest(["image_id", "file_name"])
    wanted = raw[raw["image_id"].isin(few["source_id"])]
    originals = dict(wanted.itertuples(index=False, name=None))
    rows = []
    for row in few.itertuples():
        names = {"raw": originals[row.source_id]}
        rows.append(
            [
                stage.files.pixels(names.get(key, row.file_name), row.width)
                for key, stage in stages.items()
            ]
        )
    return contact_sheet(
        rows,
        row_labels=[f"{row.label}: {row.prompt}" for row in few.itertuples()],
        column_labels=["original", "edit", "hybrid", "augmented"],
    )
