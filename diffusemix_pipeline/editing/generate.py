"""The second stage: every training image gets its edits, from the store or from the editor.

In three steps, so that shards can share the second: plan (`planning.py`), make what the store
lacks, collect all of them into the stage folder.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffusemix_pipeline.datasets.images import read_square
from diffusemix_pipeline.datasets.manifest import (
    REJECTED,
    Stage,
    finished_stage,
    read_stage,
    write_stage,
)
from diffusemix_pipeline.editing.editor import edits_at_once, load_editor
from diffusemix_pipeline.editing.gate import ACCEPTED, Judge
from diffusemix_pipeline.editing.planning import Plan, PlannedEdit, plan_edits
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import Ledger, link_or_copy
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings

_REJECTED_COLUMNS = ["source_id", "label", "prompt", "copy", "attempt", "edit_key", "verdict"]
_JUDGED_AT_ONCE = 64


@dataclass(frozen=True)
class Generated:
    """The finished stage, and how many edits were sampled for it now."""

    stage: Stage
    made: int


@dataclass(frozen=True)
class LabelGate:
    """What judges edits, and where its verdicts are kept; see `Plan.gate`."""

    judge: Judge
    verdicts: Ledger
    teacher_accuracy: float
    """Top-1, 0 to 1, of its teachers on originals that they did not see."""


def generate(
    raw: Stage,
    settings: Settings,
    out: Path,
    *,
    store: EditStore,
    aside: Path,
    device: str,
    fit_gate: Callable[[Plan], LabelGate] | None = None,
    progress: Progress = silent,
) -> Generated:
    """Edit the training images of `raw`; only edits that the store lacks cost UNet evaluations.

    `fit_gate` is asked for the label gate where it is on and there is something to do.
    """
    plan = plan_edits(raw, settings)
    finished = finished_stage(out, plan.fingerprint)
    if finished:
        return Generated(finished, 0)
    gate = fit_gate(plan) if fit_gate and plan.gate else None
    made = make_edits(plan, store=store, device=device, gate=gate, progress=progress)
    verdicts = gate.verdicts if gate else None
    return Generated(collect_edits(plan, out, store, verdicts, aside, progress), made)


def make_edits(
    plan: Plan,
    *,
    store: EditStore,
    device: str,
    gate: LabelGate | None = None,
    shard: int = 0,
    shards: int = 1,
    progress: Progress = silent,
) -> int:
    """Make the edits of one shard that the store lacks or holds damaged; return how many.

    An edit's shard follows from its key, so that shards may run at once, anywhere, in any order.
    What the gate rejects is made anew from another seed, as often as the settings allow.
    """
    wanted = [edit for edit in plan.edits if int(edit.key, 16) % shards == shard]
    judged = _said(gate.verdicts) if gate else {}
    made = 0
    while wanted:
        of_use = [edit for edit in wanted if judged.get(edit.key, ACCEPTED) == ACCEPTED]
        made += _make_missing(plan, of_use, store, device, progress)
        if gate is None:
            break
        verdicts = judge_edits(plan, wanted, store, gate, progress)
        rejected = [edit for edit in wanted if verdicts[edit.key] != ACCEPTED]
        wanted = [plan.next_attempt(edit) for edit in rejected if _may_try_again(plan, edit)]
    return made


def collect_edits(
    plan: Plan,
    out: Path,
    store: EditStore,
    verdicts: Ledger | None,
    aside: Path,
    progress: Progress = silent,
) -> Stage:
    """Write the stage folder from the store, which holds every edit of the plan.

    With a gate, an edit is the first accepted attempt; `rejected.parquet` has a row for each of the
    others. Raises UserError where nothing was accepted.
    """
    accepted, rejected = _chosen(plan, verdicts)
    if not accepted:
        raise UserError(
            f"The label gate rejected all {len(rejected)} edits: look at them with `diffusemix "
            "preview`, choose other prompts, or change editing.gate."
        )
    said = store.said({edit.key for edit, _ in accepted})
    with write_stage(out, name="generated", fingerprint=plan.fingerprint, aside=aside) as stage:
        for done, (edit, verdict) in enumerate(accepted, start=1):
            row = _row(edit, verdict, plan.settings.size)
            link_or_copy(store.path(edit.key), stage.folder / row["file_name"])
            stage.add({**row, "sha256": said[edit.key].sha256})
            progress("Linking edits", done, len(accepted))
        stage.notes["editor"] = plan.weights
        if verdicts:
            rows = [_row(edit, verdict, plan.settings.size) for edit, verdict in rejected]
            table = pd.DataFrame(rows, columns=_REJECTED_COLUMNS)
            table.to_parquet(stage.folder / REJECTED, index=False)
    return read_stage(out)


def judged_edits(stage: Stage) -> pd.DataFrame:
    """Return label, prompt and verdict of every edit that the gate judged for a stage."""
    columns = ["label", "prompt", "verdict"]
    rejected = stage.folder / REJECTED
    rows = [stage.manifest()[columns]]
    if rejected.exists():
        rows.append(pd.read_parquet(rejected)[columns])
    return pd.concat(rows, ignore_index=True).dropna(subset="verdict")


def _make_missing(
    plan: Plan,
    wanted: Sequence[PlannedEdit],
    store: EditStore,
    device: str,
    progress: Progress,
) -> int:
    from diffusemix_pipeline.editing.sampling import Sampler

    by_key = {edit.key: edit for edit in wanted}
    there = [key for key in by_key if key in store]
    sound = store.checked(there, progress)
    if damaged := [key for key in there if key not in sound]:
        warnings.warn(
            f"{len(damaged)} stored edits are not as they were stored: they are set aside in "
            f"{store.quarantine} and made anew, the first is {damaged[0]}.",
            stacklevel=2,
        )
    missing = [edit for key, edit in by_key.items() if key not in sound]
    if missing:
        editor = load_editor(plan.editor, plan.settings.editing, device)
        at_once = edits_at_once(plan.editor, plan.settings.editing)
        Sampler(editor, device, plan.settings, at_once).make(missing, store, progress)
    return len(missing)


def judge_edits(
    plan: Plan,
    wanted: Sequence[PlannedEdit],
    store: EditStore,
    gate: LabelGate,
    progress: Progress,
) -> dict[str, str]:
    """Return the verdicts by key, asking the gate for those that it did not give before."""
    verdicts = _said(gate.verdicts)
    open_ = [edit for edit in wanted if edit.key not in verdicts]
    for start in range(0, len(open_), _JUDGED_AT_ONCE):
        batch = open_[start : start + _JUDGED_AT_ONCE]
        sources = [edit.source for edit in batch]
        size = plan.settings.size
        originals = np.stack([read_square(source.path, size) for source in sources])
        edits = np.stack([read_square(store.path(edit.key), size) for edit in batch])
        for edit, verdict in zip(batch, gate.judge(sources, originals, edits), strict=True):
            verdicts[edit.key] = verdict
            gate.verdicts.add({"key": edit.key, "verdict": verdict})
        progress("Judging edits", start + len(batch), len(open_))
    return verdicts


def _said(verdicts: Ledger) -> dict[str, str]:
    return {said["key"]: said["verdict"] for said in verdicts}


def _may_try_again(plan: Plan, edit: PlannedEdit) -> bool:
    return edit.attempt + 1 < plan.settings.editing.gate.max_attempts


def _chosen(
    plan: Plan, verdicts: Ledger | None
) -> tuple[list[tuple[PlannedEdit, str | None]], list[tuple[PlannedEdit, str]]]:
    """Return the edits that are used and those that were rejected, each with its verdict."""
    if verdicts is None:
        return [(edit, None) for edit in plan.edits], []
    said = _said(verdicts)
    accepted: list[tuple[PlannedEdit, str | None]] = []
    rejected: list[tuple[PlannedEdit, str]] = []
    for edit in plan.edits:
        while said[edit.key] != ACCEPTED:
            rejected.append((edit, said[edit.key]))
            if not _may_try_again(plan, edit):
                break
            edit = plan.next_attempt(edit)
        else:
            accepted.append((edit, ACCEPTED))
    return accepted, rejected


def numeric_profiles(stage: Stage, store: EditStore) -> dict[str, int]:
    """Count a stage's edits by the numeric profile that made them, written as `name=value, ...`.

    Edits that came with the data, from another machine's store, are "not known here".
    """
    records, known = store.records(), store.profiles()
    keys = [key for key in stage.manifest()["edit_key"] if key in records]
    made_by = Counter(records[key][0].profile for key in keys)
    counted = {
        ", ".join(f"{name}={value}" for name, value in known[profile].items()): count
        for profile, count in made_by.most_common()
    }
    elsewhere = stage.counts["images"] - sum(counted.values())
    return counted | ({"not known here": elsewhere} if elsewhere else {})


def _row(edit: PlannedEdit, verdict: str | None, size: int) -> dict[str, Any]:
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
        "verdict": verdict,
    }
