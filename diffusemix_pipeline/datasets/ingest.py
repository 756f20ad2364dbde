"""The first stage: a source's images, checked, become `data/raw/{train,val,test}/<class>/`."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from diffusemix_pipeline.datasets.copies import copies_across_splits, outline
from diffusemix_pipeline.datasets.dropped import NOTHING, Dropped
from diffusemix_pipeline.datasets.images import UnreadableImageError, pixels_digest
from diffusemix_pipeline.datasets.items import Item
from diffusemix_pipeline.datasets.manifest import (
    SPLITS,
    Stage,
    finished_stage,
    read_stage,
    write_stage,
)
from diffusemix_pipeline.datasets.published import PUBLISHED
from diffusemix_pipeline.datasets.sources import NAMES, list_items, source_digest
from diffusemix_pipeline.datasets.splits import assign_splits, thin_train
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import link_or_copy
from diffusemix_pipeline.identity import digest
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings

CODE_VERSION = "7"


def ingest(
    source: str,
    settings: Settings,
    out: Path,
    *,
    aside: Path,
    archives: Path | None = None,
    dropped: Dropped = NOTHING,
    train_only: bool = False,
    progress: Progress = silent,
) -> Stage:
    """Copy a source into a stage folder; do nothing where the same content is there already.

    A file that cannot be read as an image, or that repeats another of its class and split, is set
    aside: named with its reason in the stage's notes, never fatal. With `train_only` the source is
    a folder of class folders and nothing is held out. `archives` is where a published dataset lies
    or is put; no other source needs it. What is `dropped` is left out last: no other image moves to
    another split, or takes its place.
    """
    items = list_items(source, archives, progress)
    if train_only and {item.split for item in items} != {None}:
        raise UserError(
            f"{source} holds train/val/test folders; give the train folder alone: "
            "val and test are never augmented."
        )
    where = {"path", "archives"}  # this shapes nothing
    shape = settings.source.model_dump(exclude=where)
    content = source_digest(items)
    named = {sha256 for sha256, _ in dropped.sources}
    present = {item.sha256 for item in items if item.sha256 in named}
    left_out = sorted(source for source in dropped.sources if source[0] in present)
    fingerprint = digest("raw", CODE_VERSION, train_only, settings.seed, shape, content, left_out)
    finished = finished_stage(out, fingerprint)
    if finished:
        return finished
    readable, set_aside = _readable(items, settings.source.max_pixels, progress)
    if train_only:
        for_training = (replace(item, split="train") for item in readable)
        used = thin_train(list(for_training), settings.source.train_per_class, settings.seed)
    else:
        used = assign_splits(readable, settings.source, settings.seed)
    left_out_by_train_per_class = len(readable) - len(used)
    used, notes_of_dropped = _without(used, dropped, settings.source.max_pixels)
    with write_stage(out, name="raw", fingerprint=fingerprint, aside=aside) as stage:
        stage.notes["content"] = source if source in PUBLISHED else content  # as source_version
        stage.notes["set_aside"] = set_aside
        stage.notes["dropped"] = notes_of_dropped
        stage.notes["left_out_by_train_per_class"] = left_out_by_train_per_class
        stage.notes["copies_across_splits"] = copies_across_splits(used)
        # What was asked of the source, for whoever has data/ without it.
        stage.notes["source"] = {"kind": _kind(source), "seed": settings.seed, **shape}
        del readable  # like the rest of the listing, not to be held beside the manifest
        for done, item in enumerate(used, start=1):
            stage.add(_copied(item, stage.folder, settings.source.max_pixels))
            progress("Copying images", done, len(used))
        used.clear()
    return read_stage(out)


def _readable(
    items: list[Item], max_pixels: int, progress: Progress
) -> tuple[list[Item], list[dict[str, str]]]:
    """Part the items: those that can be read and are no repetition, the rest with reasons.

    `items` is empty afterwards: of a large source, it is not to be held twice.
    """
    total = len(items)
    items.reverse()
    kept: list[Item] = []
    set_aside: list[dict[str, str]] = []
    seen: defaultdict[tuple[str | None, str], dict[bytes, str]] = defaultdict(dict)
    for done in range(1, total + 1):
        item = items.pop()
        try:
            image = item.read(max_pixels)
            pixels = pixels_digest(image)
            first = seen[item.split, item.label]
            if pixels in first:
                raise UnreadableImageError(f"the same picture as {first[pixels]}")
        except UnreadableImageError as reason:
            set_aside.append({"source_id": item.source_id, "reason": str(reason)})
        else:
            first[pixels] = item.source_id
            kept.append(replace(item, pixels=pixels, outline=outline(image), size=image.size))
        progress("Checking images", done, total)
    if not kept:
        raise UserError(
            f"None of the {total} files can be read as an image; "
            f"the first: {set_aside[0]['source_id']}: {set_aside[0]['reason']}."
        )
    return kept, set_aside


def _without(
    items: list[Item], dropped: Dropped, max_pixels: int
) -> tuple[list[Item], list[dict[str, str]]]:
    """Leave out what was dropped; return the rest, and the rows of what was left out."""
    gone = [(item.sha256, f"{item.split}/{item.label}") in dropped.sources for item in items]
    kept = [item for item, is_gone in zip(items, gone, strict=True) if not is_gone]
    notes = [
        {
            "label": item.label,
            "split": item.split or "",
            "sha256": hashlib.sha256(item.stored(max_pixels)[0]).hexdigest(),
        }
        for item, is_gone in zip(items, gone, strict=True)
        if is_gone
    ]
    check_left({item.label for item in items}, [(i.split or "", i.label) for i in kept])
    return kept, notes


def leave_out(stage: Stage, dropped: Dropped, *, aside: Path) -> Stage:
    """Return a raw stage that came from elsewhere, written anew where it holds what was dropped."""
    rows = stage.manifest()
    where = rows["split"] + "/" + rows["label"]
    gone = pd.Series(zip(rows["source_sha256"], where, strict=True)).isin(list(dropped.sources))
    if not gone.any():
        return stage
    check_left(set(rows["label"]), rows.loc[~gone, ["split", "label"]].itertuples(index=False))
    fingerprint = digest("raw", stage.fingerprint, sorted(rows.loc[gone, "source_sha256"]))
    with write_stage(stage.folder, name="raw", fingerprint=fingerprint, aside=aside) as written:
        columns = ["label", "split", "sha256"]
        notes = rows.loc[gone, columns].to_dict("records")
        left = set(rows.loc[~gone, "source_id"])
        copies = stage.notes["copies_across_splits"]
        written.notes |= stage.notes | {
            "dropped": [*stage.notes.get("dropped", []), *notes],
            "copies_across_splits": [c for c in copies if {c["image"], c["held_out"]} <= left],
        }
        for row in rows[~gone].to_dict("records"):
            target = written.folder / row["file_name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(stage.folder / row["file_name"], target)
            written.add(row)
    return read_stage(stage.folder)


def check_left(labels: set[str], left: Iterable[tuple[str, str]]) -> None:
    """Raise UserError for a class that is dropped whole from train, and for an empty split."""
    present = set(left)
    bare = sorted(label for label in labels if ("train", label) not in present)
    empty = [split for split in SPLITS if not any(split == where for where, _ in present)]
    if bare or (empty and empty != ["val", "test"]):
        what = f"class {bare[0]} without a training image" if bare else f"{empty[0]} without images"
        raise UserError(f"What was dropped leaves {what}: take a line out of the file of it.")


def _copied(item: Item, folder: Path, max_pixels: int) -> dict[str, Any]:
    """Write one image below `folder` and return its manifest row."""
    content, suffix = item.stored(max_pixels)
    image_id = f"{item.split}/{item.label}/{_stem(item)}"
    target = folder / f"{image_id}{suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return {
        "image_id": image_id,
        "file_name": f"{image_id}{suffix}",
        "label": item.label,
        "split": item.split,
        "source_id": item.source_id,
        "source_sha256": item.sha256,
        "sha256": hashlib.sha256(content).hexdigest(),
        "width": item.size[0],
        "height": item.size[1],
    }


def _stem(item: Item) -> str:
    """Name a file so that a person finds the source and no two collide."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(item.source_id).stem).strip(".-")[:60]
    return f"{stem or 'image'}-{item.sha256[:8]}"


def _kind(source: str) -> str:
    return source if source in NAMES else "folder"
