"""The second stage: every training image gets its edits, from the store or from the editor.

In three steps, so that shards can share the second: plan (`planning.py`), make what the store
lacks, collect all of them into the stage folder.
"""

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusemix_pipeline.datasets.manifest import Stage, finished_stage, read_stage, write_stage
from diffusemix_pipeline.editing.editor import load_editor
from diffusemix_pipeline.editing.planning import Plan, PlannedEdit, plan_edits
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.files import link_or_copy
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings


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
    plan = plan_edits(raw, settings)
    finished = finished_stage(out, plan.fingerprint)
    if finished:
        return Generated(finished, 0)
    made = make_edits(plan, store=store, device=device, progress=progress)
    return Generated(collect_edits(plan, out, store, aside, progress), made)


def make_edits(
    plan: Plan,
    *,
    store: EditStore,
    device: str,
    shard: int = 0,
    shards: int = 1,
    progress: Progress = silent,
) -> int:
    """Make the edits of one shard that the store lacks or holds damaged; return how many.

    An edit's shard follows from its key, so that shards may run at once, anywhere, in any order.
    """
    from diffusemix_pipeline.editing.sampling import Sampler

    wanted = {edit.key: edit for edit in plan.edits if int(edit.key, 16) % shards == shard}
    there = [key for key in wanted if key in store]
    sound = store.checked(there, progress)
    if damaged := [key for key in there if key not in sound]:
        warnings.warn(
            f"{len(damaged)} stored edits are not as they were stored: they are set aside in "
            f"{store.quarantine} and made anew, the first is {damaged[0]}.",
            stacklevel=2,
        )
    missing = [edit for key, edit in wanted.items() if key not in sound]
    if missing:
        editor = load_editor(plan.editor, plan.settings.editing, device)
        Sampler(editor, device, plan.settings).make(missing, store, progress)
    return len(missing)


def collect_edits(
    plan: Plan,
    out: Path,
    store: EditStore,
    aside: Path,
    progress: Progress = silent,
) -> Stage:
    """Write the stage folder from the store, which holds every edit of the plan."""
    said = store.said({edit.key for edit in plan.edits})
    with write_stage(out, name="generated", fingerprint=plan.fingerprint, aside=aside) as stage:
        for edit in plan.edits:
            row = _row(edit, plan.settings.size)
            link_or_copy(store.path(edit.key), stage.folder / row["file_name"])
            stage.rows.append({**row, "sha256": said[edit.key].sha256})
            progress("Linking edits", len(stage.rows), len(plan.edits))
        stage.notes["editor"] = plan.weights
    return read_stage(out)


def numeric_profiles(stage: Stage, store: EditStore) -> dict[str, int]:
    """Count a stage's edits by the numeric profile that made them, written as `name=value, ...`."""
    said = store.said(set(stage.manifest()["edit_key"]))
    known = store.profiles()
    counted = Counter(record.profile for record in said.values())
    return {
        ", ".join(f"{name}={value}" for name, value in known[profile].items()): count
        for profile, count in counted.most_common()
    }


def _row(edit: PlannedEdit, size: int) -> dict[str, Any]:
    """Return the edit's manifest row, but for the SHA-256 of its file."""
    source = edit.source
    slug = re.sub(r"[^a-z0-9]+", "-", edit.prompt.lower()).strip("-")[:40]
    image_id = f"{source.label}/{source.path.stem}.{slug}.{edit.copy}.{edit.key[:8]}"
    return {
        "image_id": image_id,
        "file_name": f"{image_id}.png",
        "label": source.label,
        "split": "train",
        "source_id": source.image_id,
        "source_sha256": source.source_sha256,
        "prompt": edit.prompt,
        "copy": edit.copy,
        "attempt": edit.attempt,
        "edit_key": edit.key,
        "seed": edit.seed,
        "width": size,
        "height": size,
    }
