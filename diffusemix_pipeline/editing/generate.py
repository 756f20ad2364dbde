"""The second stage: every training image gets its edits, from the store or from the editor."""

import re
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffusemix_pipeline.datasets.images import read_square
from diffusemix_pipeline.datasets.manifest import Stage, finished_stage, read_stage, write_stage
from diffusemix_pipeline.editing.editor import (
    InstructPix2PixEditor,
    editor_fingerprint,
    locate_editor,
)
from diffusemix_pipeline.editing.store import EditStore, Record
from diffusemix_pipeline.files import link_or_copy
from diffusemix_pipeline.identity import digest, draw, seed_from
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings

CODE_VERSION = "1"
# Speed and place change no edit's identity; the editor is known by the bytes of its weights.
_NOT_IDENTITY = {"editor", "revision", "batch_size"}


@dataclass(frozen=True)
class Generated:
    """The finished stage, and how many edits were sampled for it now."""

    stage: Stage
    made: int


@dataclass(frozen=True)
class PlannedEdit:
    """One wanted edit: `key` identifies its bytes, `row` goes into the manifest."""

    key: str
    source: Path
    instruction: str
    seed: int
    row: dict[str, Any]


def generate(
    raw: Stage,
    settings: Settings,
    out: Path,
    *,
    store: EditStore,
    aside: Path,
    device: str,
    progress: Progress = silent,
) -> Generated:
    """Edit the training images of `raw`; only edits that the store lacks cost UNet evaluations."""
    folder = locate_editor(settings.editing.editor, settings.editing.revision)
    weights = editor_fingerprint(folder)
    shape = settings.editing.model_dump(exclude=_NOT_IDENTITY)
    fingerprint = digest(
        "generated", CODE_VERSION, raw.version, settings.seed, settings.size, shape, weights
    )
    finished = finished_stage(out, fingerprint)
    if finished:
        return Generated(finished, 0)
    planned = plan_edits(raw.manifest(), raw.folder, settings, weights)
    wanted = {edit.key: edit for edit in planned}
    there = [key for key in wanted if key in store]
    kept = store.checked(there, progress)
    if damaged := [key for key in there if key not in kept]:
        warnings.warn(
            f"{len(damaged)} stored edits are not as they were stored: they are set aside in "
            f"{store.quarantine} and made anew, the first is {damaged[0]}.",
            stacklevel=2,
        )
    missing = [edit for key, edit in wanted.items() if key not in kept]
    if missing:
        editor = InstructPix2PixEditor(folder, settings.editing, device)
        kept |= make_edits(missing, editor, settings, store, progress)
    with write_stage(out, name="generated", fingerprint=fingerprint, aside=aside) as stage:
        for done, edit in enumerate(planned, start=1):
            target = stage.folder / edit.row["file_name"]
            link_or_copy(store.path(edit.key), target)
            stage.add({**edit.row, "sha256": kept[edit.key].sha256})
            progress("Linking edits", done, len(planned))
        stage.notes["editor"] = weights
    return Generated(read_stage(out), len(missing))


def plan_edits(
    rows: pd.DataFrame, folder: Path, settings: Settings, weights: str
) -> list[PlannedEdit]:
    """List the edits that the training images among `rows` want, in the order of their names."""
    train = rows[rows["split"] == "train"]
    return [
        _planned(source, prompt, copy, folder, settings, weights)
        for source in train.to_dict("records")
        for copy in range(settings.editing.copies)
        for prompt in _prompts(source["sha256"], copy, settings)
    ]


def make_edits(
    planned: Sequence[PlannedEdit],
    editor: InstructPix2PixEditor,
    settings: Settings,
    store: EditStore,
    progress: Progress,
) -> dict[str, Record]:
    """Sample edits in batches and keep each in the store; return their records by key.

    A batch is encoded and written while the next one is sampled: files never hold the device.
    """
    for instruction in sorted({edit.instruction for edit in planned}):
        editor.check_instruction(instruction)
    size = settings.editing.batch_size
    profile = store.add_profile(editor.profile())
    records: dict[str, Record] = {}
    writing: Future[dict[str, Record]] | None = None

    def write(batch: Sequence[PlannedEdit], edited: np.ndarray) -> dict[str, Record]:
        pairs = zip(batch, edited, strict=True)
        return {edit.key: store.put(edit.key, pixels, profile) for edit, pixels in pairs}

    progress("Editing images", 0, len(planned))
    with ThreadPoolExecutor(1) as writer:
        for start in range(0, len(planned), size):
            batch = planned[start : start + size]
            images = np.stack([read_square(edit.source, settings.size) for edit in batch])
            edited = editor.edit(
                images, [edit.instruction for edit in batch], [edit.seed for edit in batch]
            )
            if writing:
                records |= writing.result()
            writing = writer.submit(write, batch, edited)
            progress("Editing images", start + len(batch), len(planned))
        if writing:
            records |= writing.result()
    return records


def _prompts(source_sha256: str, copy: int, settings: Settings) -> Sequence[str]:
    prompts = settings.editing.prompts
    if settings.editing.prompts_per_image == "all":
        return prompts
    return [draw(prompts, settings.seed, "prompt", source_sha256, copy)]


def _planned(
    source: dict[str, Any],
    prompt: str,
    copy: int,
    folder: Path,
    settings: Settings,
    weights: str,
) -> PlannedEdit:
    editing = settings.editing
    instruction = editing.template.format(prompt=prompt)
    attempt = 0
    seed = seed_from(settings.seed, "edit", source["sha256"], prompt, copy, attempt)
    sampling = [editing.sampler, editing.steps, editing.guidance, editing.image_guidance]
    key = digest(source["sha256"], instruction, weights, settings.size, sampling, seed)
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    stem = Path(source["file_name"]).stem
    image_id = f"{source['label']}/{stem}.{slug}.{copy}.{key[:8]}"
    row = {
        "image_id": image_id,
        "file_name": f"{image_id}.png",
        "label": source["label"],
        "split": "train",
        "source_id": source["image_id"],
        "source_sha256": source["source_sha256"],
        "prompt": prompt,
        "copy": copy,
        "attempt": attempt,
        "edit_key": key,
        "seed": seed,
        "width": settings.size,
        "height": settings.size,
    }
    return PlannedEdit(key, folder / source["file_name"], instruction, seed, row)
