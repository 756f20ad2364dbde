"""The first stage: a source's images, checked, become `data/raw/{train,val,test}/<class>/`."""

import hashlib
import re
import shutil
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from diffusemix_pipeline.datasets.checked import Checked, Facts, note, write_checked
from diffusemix_pipeline.datasets.copies import copies_across_splits, outline
from diffusemix_pipeline.datasets.dropped import NOTHING, Dropped
from diffusemix_pipeline.datasets.images import UnreadableImageError, pixels_digest
from diffusemix_pipeline.datasets.items import Item
from diffusemix_pipeline.datasets.manifest import (
    SPLITS,
    STAGE,
    Stage,
    class_names,
    finished_stage,
    layout_of,
    read_stage,
)
from diffusemix_pipeline.datasets.parts import Image, Part, write_stage
from diffusemix_pipeline.datasets.published import PUBLISHED
from diffusemix_pipeline.datasets.sources import NAMES, list_items, source_digest
from diffusemix_pipeline.datasets.splits import assign_splits, thin_train
from diffusemix_pipeline.datasets.storage import Layout, StoredFiles
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import BEGUN, Ledger
from diffusemix_pipeline.identity import digest
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings, Storage
from diffusemix_pipeline.workers import in_processes

CODE_VERSION = "8"
_CHECKED_AT_ONCE = 500  # images, by a process


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
    finished = _finished(out, fingerprint, settings.storage)
    if finished:
        return finished
    begun = aside / f"{out.name}.checked{BEGUN}"
    readable, copies, set_aside = _readable(
        items, out, Ledger(begun), settings.source.max_pixels, progress
    )
    if train_only:
        for_training = (replace(item, split="train") for item in readable)
        used = thin_train(list(for_training), settings.source.train_per_class, settings.seed)
    else:
        used = assign_splits(readable, settings.source, settings.seed)
    left_out_by_train_per_class = len(readable) - len(used)
    used, notes_of_dropped = _without(used, dropped, settings.source.max_pixels)
    total, labels = len(used), sorted({item.label for item in used})
    layout = Layout.of(Counter(item.split or "" for item in used), settings.storage)
    with write_stage(
        out, name="raw", fingerprint=fingerprint, layout=layout, classes=labels, aside=aside
    ) as stage:
        stage.notes["content"] = source if source in PUBLISHED else content  # as source_version
        stage.notes["set_aside"] = set_aside
        stage.notes["dropped"] = notes_of_dropped
        stage.notes["left_out_by_train_per_class"] = left_out_by_train_per_class
        stage.notes["copies_across_splits"] = copies_across_splits(used)
        # What was asked of the source, for whoever has data/ without it.
        stage.notes["source"] = {"kind": _kind(source), "seed": settings.seed, **shape}
        write_checked(stage.folder, [*readable, *copies], settings.source.max_pixels)
        del readable, copies  # like the rest of the listing, not to be held beside the manifest
        parts = _parts(used, layout, labels, settings.source.max_pixels)
        make = partial(_copied, settings.source.max_pixels)
        stage.write(parts, make, total=total, describe="Copying images", progress=progress)
    shutil.rmtree(begun, ignore_errors=True)
    return read_stage(out)


def _finished(out: Path, fingerprint: str, storage: Storage) -> Stage | None:
    """Return what `ingest` made before, where the images would lie in the same way."""
    if not (out / STAGE).exists():
        return None
    return finished_stage(out, fingerprint, layout_of(read_stage(out), storage))


def _parts(
    items: list[Item], layout: Layout, labels: Sequence[str], max_pixels: int
) -> Iterator[Part]:
    """Give the parts of a raw stage; `items` is empty afterwards."""
    by_part: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_part[layout.part_of(item.split or "", _image_id(item))].append(item)
    items.clear()
    for name in sorted(by_part):
        work = sorted(by_part.pop(name), key=_image_id)
        of = [(item.source_id, item.label, item.sha256) for item in work]
        yield Part(name, _fingerprint(name, layout, labels, max_pixels, of), work, len(work))


def _fingerprint(
    name: str,
    layout: Layout,
    labels: Sequence[str],
    max_pixels: int,
    sources: Iterable[tuple[str, str, str]],
) -> str:
    """Identify a part by the ids, labels and SHA-256 of its sources, in the order of their names.

    In a shard, an image's label is its place among all.
    """
    classes = list(labels) if layout.packed else None
    return digest("raw", CODE_VERSION, name, max_pixels, classes, [list(of) for of in sources])


def _readable(
    items: list[Item], out: Path, begun: Ledger, max_pixels: int, progress: Progress
) -> tuple[list[Item], list[Item], list[dict[str, str]]]:
    """Part the items: those that can be read, those that repeat one of these, what is set aside.

    `items` is empty afterwards: of a large source, it is not to be held twice. Nothing is read of
    those that were checked before, for the stage in `out` or for one that was `begun`.
    """
    checked = Checked.read(out, begun, max_pixels)
    total = len(items)
    items.reverse()
    kept: list[Item] = []
    copies: list[Item] = []
    set_aside: list[dict[str, str]] = []
    seen: defaultdict[tuple[str | None, str], dict[bytes, str]] = defaultdict(dict)
    for item, found in _facts(items, checked, max_pixels):
        if not isinstance(found, str) and item.digest not in checked:
            note(begun, item.digest, found, max_pixels)
        first = seen[item.split, item.label]
        if isinstance(found, str):
            set_aside.append({"source_id": item.source_id, "reason": found})
        elif found.pixels in first:
            copies.append(replace(item, **found._asdict()))
            reason = f"the same picture as {first[found.pixels]}"
            set_aside.append({"source_id": item.source_id, "reason": reason})
        else:
            first[found.pixels] = item.source_id
            kept.append(replace(item, **found._asdict()))
        progress("Checking images", len(kept) + len(set_aside), total)
    if not kept:
        raise UserError(
            f"None of the {total} files can be read as an image; "
            f"the first: {set_aside[0]['source_id']}: {set_aside[0]['reason']}."
        )
    return kept, copies, set_aside


def _facts(
    items: list[Item], checked: Checked, max_pixels: int
) -> Iterator[tuple[Item, Facts | str]]:
    """Take the items, the last first; give each with what is in it, or why it cannot be used."""

    def chunks() -> Iterator[list[Item]]:
        while items:
            chunk = [items.pop() for _ in range(min(_CHECKED_AT_ONCE, len(items)))]
            taken.append(chunk)
            yield [item for item in chunk if item.digest not in checked]

    taken: deque[list[Item]] = deque()
    few = sum(item.digest not in checked for item in items) <= _CHECKED_AT_ONCE
    here, there = partial(_looked_at, max_pixels), partial(_all_looked_at, max_pixels)
    for looked in map(here, chunks()) if few else in_processes(there, chunks()):
        news = iter(looked)
        for item in taken.popleft():
            yield item, checked.get(item.digest) or next(news)


def _all_looked_at(max_pixels: int, items: Sequence[Item]) -> list[Facts | str]:
    return list(_looked_at(max_pixels, items))


def _looked_at(max_pixels: int, items: Sequence[Item]) -> Iterator[Facts | str]:
    for item in items:
        try:
            image = item.read(max_pixels)
        except UnreadableImageError as reason:
            yield str(reason)
        else:
            yield Facts(pixels_digest(image), outline(image), image.size)


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


def leave_out(stage: Stage, dropped: Dropped, storage: Storage, *, aside: Path) -> Stage:
    """Return a raw stage that came from elsewhere, without what was dropped and in our layout."""
    rows = stage.manifest()
    where = rows["split"] + "/" + rows["label"]
    gone = pd.Series(zip(rows["source_sha256"], where, strict=True)).isin(list(dropped.sources))
    if not gone.any() and stage.layout == layout_of(stage, storage).document():
        return stage
    check_left(set(rows["label"]), rows.loc[~gone, ["split", "label"]].itertuples(index=False))
    fingerprint = digest("raw", stage.fingerprint, sorted(rows.loc[gone, "source_sha256"]))
    labels, kept = class_names(stage.counts), rows[~gone]
    layout = Layout.of(kept["split"].value_counts().to_dict(), storage)
    with write_stage(
        stage.folder,
        name="raw",
        fingerprint=fingerprint,
        layout=layout,
        classes=labels,
        aside=aside,
    ) as written:
        columns = ["label", "split", "sha256"]
        notes = rows.loc[gone, columns].to_dict("records")
        left = set(rows.loc[~gone, "source_id"])
        copies = stage.notes["copies_across_splits"]
        written.notes |= stage.notes | {
            "dropped": [*stage.notes.get("dropped", []), *notes],
            "copies_across_splits": [c for c in copies if {c["image"], c["held_out"]} <= left],
        }
        names = [layout.part_of(split, name) for split, name in kept[["split", "image_id"]].values]
        max_pixels, of = (
            stage.notes["source"]["max_pixels"],
            ["source_id", "label", "source_sha256"],
        )
        parts = (
            Part(
                str(name),
                _fingerprint(str(name), layout, labels, max_pixels, few[of].values.tolist()),
                few,
                len(few),
            )
            for name, few in kept.sort_values("image_id").groupby(names)
        )
        make = partial(_taken_over, stage.folder)
        written.write(parts, make, total=len(kept), describe="Linking images")
    return read_stage(stage.folder)


def _taken_over(folder: Path, rows: pd.DataFrame, threads: int) -> Iterator[Image]:
    """Give rows of another stage folder with their files."""
    files = StoredFiles(folder)
    for row in rows.to_dict("records"):
        name = row["file_name"]
        yield row, files.read(name) if files.packed else folder / name


def check_left(labels: set[str], left: Iterable[tuple[str, str]]) -> None:
    """Raise UserError for a class that is dropped whole from train, and for an empty split."""
    present = set(left)
    bare = sorted(label for label in labels if ("train", label) not in present)
    empty = [split for split in SPLITS if not any(split == where for where, _ in present)]
    if bare or (empty and empty != ["val", "test"]):
        what = f"class {bare[0]} without a training image" if bare else f"{empty[0]} without images"
        raise UserError(f"What was dropped leaves {what}: take a line out of the file of it.")


def _copied(max_pixels: int, items: Sequence[Item], threads: int) -> Iterator[Image]:
    """Give each image's manifest row and bytes."""
    for item in items:
        content, suffix = item.stored(max_pixels)
        image_id = _image_id(item)
        row = {
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
        yield row, content


def _image_id(item: Item) -> str:
    return f"{item.split}/{item.label}/{_stem(item)}"


def _stem(item: Item) -> str:
    """Name a file so that a person finds the source and no two collide."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(item.source_id).stem).strip(".-")[:60]
    return f"{stem or 'image'}-{item.sha256[:8]}"


def _kind(source: str) -> str:
    return source if source in NAMES else "folder"
