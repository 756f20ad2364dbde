"""The second stage: every training image gets its edits, from the store or from the editor."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diffusemix_pipeline.datasets.manifest import Stage, finished_stage, read_stage, write_stage
from diffusemix_pipeline.editing.editor import (
    editor_fingerprint,
    edits_at_once,
    load_editor,
    locate_editor,
    locate_lora,
)
from diffusemix_pipeline.editing.sampling import PlannedEdit, Sampler
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.files import link_or_copy
from diffusemix_pipeline.identity import digest, draw, seed_from
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings

CODE_VERSION = "1"
# Speed and place change no edit's identity; the editor is known by the bytes of its weights,
# its LoRA's among them.
_NOT_IDENTITY = {"editor", "revision", "lora", "batch_size", "dtype", "compile"}


@dataclass(frozen=True)
class Generated:
    """The finished stage, and how many edits were sampled for it now."""

    stage: Stage
    made: int


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
    weights = editor_fingerprint(folder, locate_lora(settings.editing.lora))
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
        editor = load_editor(folder, settings.editing, device)
        at_once = edits_at_once(folder, settings.editing)
        sampler = Sampler(editor, device, settings.size, at_once)
        kept |= sampler.make(missing, store, progress)
    with write_stage(out, name="generated", fingerprint=fingerprint, aside=aside) as stage:
        for edit in planned:
            target = stage.folder / edit.row["file_name"]
            link_or_copy(store.path(edit.key), target)
            stage.rows.append({**edit.row, "sha256": kept[edit.key].sha256})
            progress("Linking edits", len(stage.rows), len(planned))
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
    sampling = [
        editing.sampler,
        editing.steps,
        editing.guidance,
        editing.image_guidance,
        editing.guidance_until,
    ]
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
