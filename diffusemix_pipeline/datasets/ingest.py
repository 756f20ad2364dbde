"""The first stage: a source's images, checked, become `data/raw/{train,val,test}/<class>/`."""

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from diffusemix_pipeline.datasets.checked import CHECKED, Checked, Facts, told
from diffusemix_pipeline.datasets.columns import first_alike, text_column, tuples, values
from diffusemix_pipeline.datasets.copies import copies_across_splits, outline
from diffusemix_pipeline.datasets.dropped import NOTHING, Dropped
from diffusemix_pipeline.datasets.images import UnreadableImageError, pixels_digest
from diffusemix_pipeline.datasets.items import Listing
from diffusemix_pipeline.datasets.manifest import (
    SPLITS,
    STAGE,
    Stage,
    class_names,
    finished_stage,
    layout_of,
    read_stage,
)
from diffusemix_pipeline.datasets.parts import Part, StoredRow, write_stage
from diffusemix_pipeline.datasets.published import PUBLISHED
from diffusemix_pipeline.datasets.sources import NAMES, list_images, source_digest
from diffusemix_pipeline.datasets.splits import assign_splits, thin_train
from diffusemix_pipeline.datasets.storage import Layout, StoredFiles
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import BEGUN, Ledger, link_or_copy
from diffusemix_pipeline.identity import digest
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings, Storage
from diffusemix_pipeline.workers import get_ready, in_processes

CODE_VERSION = "10"
_CHECKED_AT_ONCE = 64  # images
_WORTH_PROCESSES = 500  # images: they start as fast as so few are checked


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
    if not (out / STAGE).exists():
        get_ready(__name__)  # while the source is listed
    listing = list_images(source, archives, progress)
    images, kind = listing.rows, listing.kind
    if train_only and images["split"].notna().any():
        raise UserError(
            f"{source} holds train/val/test folders; give the train folder alone: "
            "val and test are never augmented."
        )
    content = source_digest(images)
    left_out = _present(dropped, images["sha256"])
    asked = [train_only, settings.seed, _shape(settings)]
    fingerprint = digest("raw", CODE_VERSION, *asked, content, left_out)
    finished = _finished(out, fingerprint, settings.storage)
    if finished:
        return finished
    begun, max_pixels = aside / f"{out.name}.checked{BEGUN}", settings.source.max_pixels
    checked, reasons = _checked(listing, out, Ledger(begun), max_pixels, progress)
    readable, set_aside = _readable(images, checked, reasons)
    del listing, images  # not to be held beside what is made of them
    used = _split(readable, settings, train_only)
    thinned = len(readable) - len(used)
    gone = _is_dropped(used["sha256"], used["split"], used["label"], dropped)
    kept, left = used[~gone], used[gone]
    _check_left(set(used["label"].unique()), tuples(kept[["split", "label"]].drop_duplicates()))
    del readable, used
    labels = sorted(kept["label"].unique())
    layout = Layout.of(kept["split"].value_counts().to_dict(), settings.storage)
    with write_stage(
        out, name="raw", fingerprint=fingerprint, layout=layout, classes=labels, aside=aside
    ) as stage:
        stage.notes |= {
            "content": source if source in PUBLISHED else content,  # as source_version
            "set_aside": set_aside,
            "left_out_by_train_per_class": thinned,
        }
        stage.notes |= _notes(source, settings, kept, left, kind, checked)
        checked.write(stage.folder)
        named, total = kept.assign(image_id=text_column(_image_ids(kept), kept.index)), len(kept)
        parts = _parts(named, "sha256", layout, labels, max_pixels)
        del kept, checked, named  # the rows go with the parts
        make = partial(_copied, max_pixels, kind)
        stage.write(parts, make, total=total, describe="Copying images", progress=progress)
    shutil.rmtree(begun, ignore_errors=True)
    return read_stage(out)


def _shape(settings: Settings) -> dict[str, Any]:
    """Return what is asked of the source, without where it lies, which shapes nothing."""
    return settings.source.model_dump(exclude={"path", "archives"})


def _present(dropped: Dropped, sha256: pd.Series) -> list[tuple[str, str]]:
    """Return those of the dropped sources that are among files with such digests."""
    present = set(sha256[sha256.isin({of for of, _ in dropped.sources})])
    return sorted(source for source in dropped.sources if source[0] in present)


def _split(readable: pd.DataFrame, settings: Settings, train_only: bool) -> pd.DataFrame:
    """Return the images that are used, each with its split."""
    if not train_only:
        return assign_splits(readable, settings.source, settings.seed)
    for_training = readable.assign(split="train")
    return thin_train(for_training, settings.source.train_per_class, settings.seed)


def _notes(
    source: str,
    settings: Settings,
    kept: pd.DataFrame,
    left: pd.DataFrame,
    kind: Any,
    checked: Checked,
) -> dict[str, Any]:
    """Return what the stage tells of what was dropped (`left`), of copies and of the source.

    `kind` is that of a `Listing`.
    """
    dropped = [
        {"label": row["label"], "split": row["split"], "sha256": row["sha256"]}
        for row, _ in _copied(settings.source.max_pixels, kind, left, threads=1)
    ]
    return {
        "dropped": dropped,
        "copies_across_splits": copies_across_splits(kept, checked),
        # What was asked of the source, for whoever has data/ without it.
        "source": {"kind": _kind(source), "seed": settings.seed, **_shape(settings)},
    }


def _finished(out: Path, fingerprint: str, storage: Storage) -> Stage | None:
    """Return what `ingest` made before, where the images would lie in the same way."""
    if not (out / STAGE).exists():
        return None
    return finished_stage(out, fingerprint, layout_of(read_stage(out), storage))


def _parts(
    images: pd.DataFrame, sha256: str, layout: Layout, labels: Sequence[str], max_pixels: int
) -> Iterator[Part]:
    """Give the parts of a raw stage, each with its rows as work, in the order of their names.

    `sha256` names the column with the digests of the sources' files.
    """
    names = map(layout.part_of, values(images["split"]), values(images["image_id"]))
    of = ["source_id", "label", sha256]
    for name, rows in images.groupby(text_column(names, images.index)):
        rows = rows.sort_values("image_id")
        fingerprint = _fingerprint(str(name), layout, labels, max_pixels, rows[of].values.tolist())
        yield Part(str(name), fingerprint, rows, len(rows))


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


def _checked(
    listing: Listing, out: Path, begun: Ledger, max_pixels: int, progress: Progress
) -> tuple[Checked, dict[int, str]]:
    """Look at what was not read before, for the stage in `out` or for one that was `begun`.

    Returns what is in all images, and by row why one cannot be used.
    """
    rows = listing.rows
    checked = Checked.read(out, begun, max_pixels)
    new = rows[~checked.knows(rows["sha256"])]

    def chunks() -> Iterator[Listing]:
        for start in range(0, len(new), _CHECKED_AT_ONCE):
            yield Listing(new[start : start + _CHECKED_AT_ONCE], listing.kind)

    look, done = partial(_looked_at, max_pixels), len(rows) - len(new)
    reasons: dict[int, str] = {}
    tables = []
    few = len(new) <= _WORTH_PROCESSES
    with nullcontext(map(look, chunks())) if few else in_processes(look, chunks()) as looked:
        for chunk, found in zip(chunks(), looked, strict=True):
            named = dict(zip(values(chunk.rows["sha256"]), found, strict=True))
            usable = {sha256: of for sha256, of in named.items() if not isinstance(of, str)}
            tables.append(told(usable, max_pixels, begun))
            pairs = zip(chunk.rows.index, found, strict=True)
            reasons |= {number: of for number, of in pairs if isinstance(of, str)}
            done += len(found)
            progress("Checking images", done, len(rows))
    return checked.joined(tables).of(rows["sha256"]), reasons


def _looked_at(max_pixels: int, listing: Listing) -> list[Facts | str]:
    """Return what is in each image, or why it cannot be used."""
    found: list[Facts | str] = []
    for sha256, picture in zip(values(listing.rows["sha256"]), listing.pictures(), strict=True):
        try:
            image = picture.read(max_pixels)
        except UnreadableImageError as reason:
            found.append(str(reason))
        else:
            facts = Facts(pixels_digest(image), outline(image), *image.size)
            found.append(facts if sha256 else "it could not be read when it was listed")
    return found


def _readable(
    images: pd.DataFrame, checked: Checked, reasons: dict[int, str]
) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """Return the images that can be read and repeat no other, with their facts; name the others."""
    readable = images.drop(index=list(reasons)) if reasons else images
    if readable.empty:
        first = images["source_id"][min(reasons)]
        raise UserError(
            f"None of the {len(images)} files can be read as an image; "
            f"the first: {first}: {reasons[min(reasons)]}."
        )
    readable = readable.join(checked.facts(readable["sha256"]))
    names = images["source_id"]
    firsts = first_alike(readable["split"], readable["label"], readable["pixels"])
    repeated = firsts != np.arange(len(readable))
    same_as = readable["source_id"].iloc[firsts[repeated]]
    for number, first in zip(readable.index[repeated], same_as, strict=True):
        reasons[number] = f"the same picture as {first}"
    set_aside = [{"source_id": names[n], "reason": reasons[n]} for n in sorted(reasons)]
    return readable[~repeated], set_aside


def _is_dropped(
    sha256: pd.Series, split: pd.Series, label: pd.Series, dropped: Dropped
) -> pd.Series:
    """Tell which images are dropped, by the digests, splits and labels of their files."""
    named = sha256.isin({of_file for of_file, _ in dropped.sources})
    place = split + "/" + label
    sources = zip(sha256[named], place[named], strict=True)
    return named & pd.Series(
        [source in dropped.sources for source in sources], sha256.index[named], dtype=bool
    ).reindex(sha256.index, fill_value=False)


def leave_out(stage: Stage, dropped: Dropped, storage: Storage, *, aside: Path) -> Stage:
    """Return a raw stage that came from elsewhere, without what was dropped and in our layout."""
    rows = stage.manifest()
    gone = _is_dropped(rows["source_sha256"], rows["split"], rows["label"], dropped)
    if not gone.any() and stage.layout == layout_of(stage, storage).document():
        return stage
    _check_left(set(rows["label"]), tuples(rows.loc[~gone, ["split", "label"]]))
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
        without = set(rows.loc[gone, "source_id"])
        copies = stage.notes["copies_across_splits"]
        written.notes |= stage.notes | {
            "dropped": [*stage.notes.get("dropped", []), *notes],
            "copies_across_splits": [
                c for c in copies if without.isdisjoint({c["image"], c["held_out"]})
            ],
        }
        if (stage.folder / CHECKED).exists():  # an older stage may have none
            link_or_copy(stage.folder / CHECKED, written.folder / CHECKED)
        max_pixels = stage.notes["source"]["max_pixels"]
        parts = _parts(kept, "source_sha256", layout, labels, max_pixels)
        make = partial(_taken_over, stage.folder)
        written.write(parts, make, total=len(kept), describe="Linking images")
    return read_stage(stage.folder)


def _taken_over(folder: Path, rows: pd.DataFrame, threads: int) -> Iterator[StoredRow]:
    """Give rows of another stage folder with their files."""
    files = StoredFiles(folder)
    for row in rows.to_dict("records"):
        name = row["file_name"]
        yield row, files.read(name) if files.packed else folder / name


def _check_left(labels: set[str], left: Iterable[tuple[str, str]]) -> None:
    """Raise UserError for a class that is dropped whole from train, and for an empty split."""
    present = set(left)
    bare = sorted(label for label in labels if ("train", label) not in present)
    empty = [split for split in SPLITS if not any(split == where for where, _ in present)]
    if bare or (empty and empty != ["val", "test"]):
        what = f"class {bare[0]} without a training image" if bare else f"{empty[0]} without images"
        raise UserError(f"Dropping leaves {what}: remove a line from dropped.txt.")


def _copied(max_pixels: int, kind: Any, images: pd.DataFrame, threads: int) -> Iterator[StoredRow]:
    """Give each image's manifest row and bytes."""
    columns = ["label", "split", "source_id", "sha256", "width", "height"]
    rows, pictures = tuples(images[columns]), Listing(images, kind).pictures()
    for image_id, row, picture in zip(_image_ids(images), rows, pictures, strict=True):
        label, split, source_id, source_sha256, width, height = row
        content, suffix = picture.stored(max_pixels)
        made = {
            "image_id": image_id,
            "file_name": f"{image_id}{suffix}",
            "label": label,
            "split": split,
            "source_id": source_id,
            "source_sha256": source_sha256,
            "sha256": hashlib.sha256(content).hexdigest(),
            "width": width,
            "height": height,
        }
        yield made, content


def _image_ids(images: pd.DataFrame) -> Iterator[str]:
    """Name files so that a person finds the source and no two collide."""
    columns = ["split", "label", "source_id", "sha256"]
    for split, label, source_id, sha256 in tuples(images[columns]):
        stem = PurePosixPath(source_id).stem
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-")[:60]
        yield f"{split}/{label}/{stem or 'image'}-{sha256[:16]}"


def _kind(source: str) -> str:
    return source if source in NAMES else "folder"
