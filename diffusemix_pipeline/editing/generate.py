"""The second stage: every training image gets its edits, from the store or from the editor.

In three steps, so that shards can share the second: plan (`planning.py`), make what the store
lacks, collect all of them into the stage folder.
"""

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diffusemix_pipeline.datasets.columns import tuples
from diffusemix_pipeline.datasets.images import read_square
from diffusemix_pipeline.datasets.manifest import (
    REJECTED,
    STAGE,
    Stage,
    finished_stage,
    read_manifest,
    read_stage,
)
from diffusemix_pipeline.datasets.parts import Part, StoredRow, write_stage
from diffusemix_pipeline.datasets.storage import made_anew
from diffusemix_pipeline.editing.editor import edits_at_once, load_editor
from diffusemix_pipeline.editing.gate import ACCEPTED, Judge
from diffusemix_pipeline.editing.planning import (
    CODE_VERSION,
    PARTS,
    Plan,
    PlannedEdit,
    case,
    instruction,
    plan_edits,
)
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.editing.verdicts import Verdicts
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import Ledger, undamaged
from diffusemix_pipeline.identity import digest
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings

if TYPE_CHECKING:
    from diffusemix_pipeline.editing.sampling import Sampler

_REJECTED_COLUMNS = ["source_id", "label", "prompt", "copy", "attempt", "edit_key", "verdict"]
_JUDGED_AT_ONCE = 64
_ELSEWHERE = {"made": "elsewhere, and came with the data"}


@dataclass(frozen=True)
class Generated:
    """The finished stage, and how many edits were sampled for it now."""

    stage: Stage
    made: int


@dataclass(frozen=True)
class Prepared:
    """What is left to be done for a stage folder."""

    lacking: Plan
    """The plan of the parts that the folder lacks."""
    there: int
    """Images in its other parts."""
    accuracy: float | None
    """See `LabelGate.fit`; None where nothing is to be judged."""


@dataclass(frozen=True)
class LabelGate:
    """What judges edits, and where its verdicts are kept; see `Plan.gate`."""

    judge: Judge
    verdicts: Ledger
    fit: Callable[[], float]
    """Makes it ready to judge, or fails before an edit is paid for.

    Returns the top-1, 0 to 1, of its teachers on originals that they did not see.
    """


def generate(
    raw: Stage,
    settings: Settings,
    out: Path,
    *,
    store: EditStore,
    aside: Path,
    device: str,
    gate_of: Callable[[Plan], LabelGate] | None = None,
    progress: Progress = silent,
) -> Generated:
    """Edit the training images of `raw`; only edits that the store lacks cost UNet evaluations.

    `gate_of` is asked for the label gate where it is on.
    """
    plan = plan_edits(raw, settings)
    finished = finished_stage(out, plan.fingerprint, plan.layout)
    if finished:
        return Generated(finished, 0)
    gate = None
    if plan.gate:
        assert gate_of  # without it, what nobody judged would count as judged
        gate = gate_of(plan)
    lacking = prepare(plan, out, store, gate).lacking
    made = make_edits(lacking, store=store, device=device, gate=gate, progress=progress)
    verdicts = gate.verdicts if gate else None
    return Generated(collect_edits(plan, out, store, verdicts, aside, progress), made)


def prepare(plan: Plan, out: Path, store: EditStore, gate: LabelGate | None) -> Prepared:
    """Get ready to make what the stage folder `out` lacks: a gate is fitted where it has to judge.

    What else the folder holds is taken into the store: what comes may be made of it.
    """
    there = plan.parts_in(out)
    adopt_edits(out, store, staying=there)
    lacking = plan.without_parts(there)
    accuracy = prepare_gate(gate, lacking, out) if gate else None
    return Prepared(lacking, sum(of.images for of in there.values() if of), accuracy)


def prepare_gate(gate: LabelGate, plan: Plan, out: Path) -> float | None:
    """Take the verdicts that came with `out`, and fit the gate if edits of the plan are without.

    Returns what `LabelGate.fit` does, or None where nothing is to be judged.
    """
    _adopt_verdicts(out, plan, gate.verdicts)
    judged = Verdicts(gate.verdicts)
    return gate.fit() if next(open_edits(plan, judged), None) else None


def adopt_edits(folder: Path, store: EditStore, staying: Collection[str] = ()) -> None:
    """Take the edits of a stage folder into a store that lacks them.

    They came with the data, to a clone or to CI, and are not to be paid for again there. The parts
    that are `staying` are not touched by what comes.
    """
    if not (folder / STAGE).exists():
        return
    stage = read_stage(folder)
    columns, gone = ["edit_key", "file_name", "sha256"], stage.parts.keys() - set(staying)
    tables = (
        (stage.rows_of(part, columns) for part in sorted(gone))
        if stage.parts  # an older stage tells of none
        else [stage.manifest(columns)]
    )
    for key, name, sha256 in chain.from_iterable(map(tuples, tables)):
        if key in store:
            continue
        with suppress(FileNotFoundError):
            content = stage.files.read(name)
            if hashlib.sha256(content).hexdigest() == sha256:
                store.put_file(key, content, store.add_profile(_ELSEWHERE))


def _adopt_verdicts(folder: Path, plan: Plan, verdicts: Ledger) -> None:
    """Take the verdicts of a stage folder that the plan's gate gave, as `adopt_edits`.

    What was rejected where the data come from is not made here, to be rejected again.
    """
    if not (folder / STAGE).exists() or read_stage(folder).notes.get("gate") != plan.gate:
        return
    known = Verdicts(verdicts)
    columns = ["edit_key", "label", "verdict"]
    for rows in (read_manifest(folder, columns), _rejected(folder, columns)):
        for key, label, verdict in tuples(rows):
            if case(key, label) not in known:
                verdicts.add({"key": key, "label": label, "verdict": verdict})


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

    An edit's shard follows from its source, so that shards may run at once, anywhere, in any order.
    What the gate rejects is made anew from another seed, as often as the settings allow.
    """
    wanted: Iterable[PlannedEdit] = plan.shard(shard, shards)
    judged = Verdicts(gate.verdicts if gate else [])
    sampler = cache(lambda: load_sampler(plan, device))  # once, for all attempts, if at all
    made = 0
    while wanted:
        made += _make_missing(wanted, judged, store, sampler, progress)
        if gate is None:
            break
        rejected = judge_edits(plan, wanted, judged, store, gate, progress)
        again = (plan.next_attempt(edit) for edit in rejected if _may_try_again(plan, edit))
        wanted = [edit for edit in again if edit.key not in plan.dropped]
        del rejected  # not to be held while the next ones are made
    return made


def collect_edits(
    plan: Plan,
    out: Path,
    store: EditStore,
    verdicts: Ledger | None,
    aside: Path,
    progress: Progress = silent,
) -> Stage:
    """Write the stage folder from the store, which holds every edit that the folder lacks.

    With a gate, an edit is the first accepted attempt; `rejected.parquet` has a row for each of the
    others. Raises UserError where nothing was accepted, or where an edit is missing: the plan of
    those who made them left it out, or it was pruned.
    """
    collected = _Collected(store, verdicts)
    with write_stage(
        out,
        name="generated",
        fingerprint=plan.fingerprint,
        layout=plan.layout,
        classes=plan.classes,
        aside=aside,
    ) as stage:
        stage.write(
            collected.parts(plan, out),
            partial(_stored, store),
            total=len(plan),
            describe="Linking edits",
            progress=progress,
        )
        rejected = pd.DataFrame(collected.rejected, columns=_REJECTED_COLUMNS)
        if not collected.accepted and not collected.rejected:
            raise UserError("Every edit is dropped: take a line out of dropped.txt.")
        if not collected.accepted:
            raise UserError(
                f"The label gate rejected all {len(rejected)} edits: look at them with `diffusemix "
                "preview`, choose other prompts, or change editing.gate."
            )
        stage.notes["editor"] = plan.weights
        stage.notes[PARTS] = plan.part_fingerprints
        if verdicts:
            stage.notes["gate"] = plan.gate
            rejected.to_parquet(stage.folder / REJECTED, index=False)
        del collected  # not to be held beside the manifest
    return read_stage(out)


class _Collected:
    """Which edits of a plan are used: the rows of each part, and what is counted meanwhile."""

    def __init__(self, store: EditStore, verdicts: Ledger | None) -> None:
        self._gated = verdicts is not None
        self._judged = Verdicts(verdicts or [])
        self._store, self._records = store, store.records()
        self.accepted = 0
        self.rejected: list[dict[str, Any]] = []

    def parts(self, plan: Plan, out: Path) -> Iterator[Part]:
        """Give the parts that have an edit that is used; `out` may hold some already."""
        there = plan.parts_in(out)
        labels = plan.classes if plan.layout.packed else None  # their places are in the shards
        for name, of_part in plan.by_part():
            if name in there:
                if old := there[name]:  # or else all its edits were dropped
                    self.accepted += old.images
                    yield Part(name, old.fingerprint, [], len(of_part))
                continue
            rows = list(self._rows(of_part))
            self.accepted += len(rows)
            if rows:
                fingerprint = digest("generated", CODE_VERSION, name, rows, labels)
                yield Part(name, fingerprint, rows, len(of_part))

    def _rows(self, plan: Plan) -> Iterator[dict[str, Any]]:
        for first in plan:
            for edit in attempts(plan, first, self._judged):
                if edit.key in plan.dropped:
                    continue
                verdict = self._judged.get(edit.case) if self._gated else ACCEPTED
                if not verdict or (verdict == ACCEPTED and not self._is_stored(edit)):
                    raise UserError(
                        f"{edit.source.image_id} lacks its edit to '{edit.prompt}': dropped.txt, "
                        "the store or a file that is the editor changed during the run. Run it "
                        "again: what was made is kept."
                    )
                row = _row(edit, verdict if self._gated else None, plan.settings.size)
                if verdict == ACCEPTED:
                    yield {**row, "sha256": self._records[edit.key].sha256}
                else:
                    self.rejected.append({name: row[name] for name in _REJECTED_COLUMNS})

    def _is_stored(self, edit: PlannedEdit) -> bool:
        # What was pruned keeps its record.
        return edit.key in self._records and edit.key in self._store


def _stored(store: EditStore, rows: Sequence[dict[str, Any]], threads: int) -> Iterator[StoredRow]:
    """Give edits' rows with their files in the store."""
    for row in rows:
        yield row, store.path(row["edit_key"])


def _read(store: EditStore, edit: PlannedEdit, size: int) -> np.ndarray:
    """Return an edit's pixels as uint8 (size, size, 3)."""
    path = store.path(edit.key)
    with undamaged(path, "Run `diffusemix store verify`, which sets it aside, and run again."):
        return read_square(path, size)


def judged_edits(stage: Stage) -> pd.DataFrame:
    """Return label, prompt and verdict of every edit that the gate judged for a stage."""
    columns = ["label", "prompt", "verdict"]
    rows = [stage.manifest(columns)]
    if (stage.folder / REJECTED).exists():
        rows.append(_rejected(stage.folder, columns))
    return pd.concat(rows, ignore_index=True).dropna(subset="verdict")


def _rejected(folder: Path, columns: list[str]) -> pd.DataFrame:
    """Read some columns of what a gate kept out of a stage folder."""
    path = folder / REJECTED
    with undamaged(path, made_anew(folder)):
        return pd.read_parquet(path, columns=columns)


def _make_missing(
    wanted: Iterable[PlannedEdit],
    judged: Verdicts,
    store: EditStore,
    sampler: Callable[[], "Sampler"],
    progress: Progress,
) -> int:
    """Make those of `wanted` that are of use and not stored as they were made; return how many."""
    missing = {edit.key for edit in wanted if judged.get(edit.case, ACCEPTED) == ACCEPTED}
    store.exchange(missing, progress)
    there = {key for key in missing if key in store}
    missing -= there
    if damaged := there - store.checked(there, progress):
        warnings.warn(
            f"{len(damaged)} stored edits are not as they were stored: they are set aside in "
            f"{store.quarantine} and made anew, the first is {min(damaged)}.",
            stacklevel=2,
        )
        missing |= damaged
    del there  # keys alone are held for long, a third of what edits take
    total = len(missing)
    if missing:
        sampler().make(taken(wanted, missing), total, store, progress)
    return total


def taken(wanted: Iterable[PlannedEdit], keys: set[str]) -> Iterator[PlannedEdit]:
    """Give the edits of `keys`, each once, and take the keys away."""
    for edit in wanted:
        if edit.key in keys:
            keys.remove(edit.key)
            yield edit


def load_sampler(plan: Plan, device: str) -> "Sampler":
    """Load a plan's editor; UserError where it cannot read one of the plan's instructions whole."""
    from diffusemix_pipeline.editing.sampling import Sampler

    editing = plan.settings.editing
    editor = load_editor(plan.editor, editing, device)
    for prompt in editing.prompts:
        editor.check_instruction(instruction(prompt, editing))
    return Sampler(editor, device, plan.settings, edits_at_once(plan.editor, editing))


def judge_edits(
    plan: Plan,
    wanted: Iterable[PlannedEdit],
    judged: Verdicts,
    store: EditStore,
    gate: LabelGate,
    progress: Progress,
) -> list[PlannedEdit]:
    """Ask the gate for the verdicts on `wanted` that `judged` lacks; return what is rejected."""
    rejected, total = [], 0
    for edit in wanted:
        if edit.case not in judged:
            total += 1
        elif judged.get(edit.case) != ACCEPTED:
            rejected.append(edit)
    unjudged = (edit for edit in wanted if edit.case not in judged)
    done = 0
    while batch := list(islice(unjudged, _JUDGED_AT_ONCE)):
        sources = [edit.source for edit in batch]
        size = plan.settings.size
        originals = np.stack([source.read(size) for source in sources])
        edits = np.stack([_read(store, edit, size) for edit in batch])
        for edit, verdict in zip(batch, gate.judge(sources, originals, edits), strict=True):
            if verdict != ACCEPTED:
                rejected.append(edit)
            fact = {"key": edit.key, "label": edit.source.label, "verdict": verdict}
            gate.verdicts.add(fact)
        done += len(batch)
        progress("Judging edits", done, total)
    return rejected


def _may_try_again(plan: Plan, edit: PlannedEdit) -> bool:
    return edit.attempt + 1 < plan.settings.editing.gate.max_attempts


def attempts(plan: Plan, first: PlannedEdit, judged: Verdicts) -> Iterator[PlannedEdit]:
    """Walk from a first attempt to the one that was dropped or not rejected, or to the last."""
    yield first
    while (
        first.key not in plan.dropped
        and judged.get(first.case, ACCEPTED) != ACCEPTED
        and _may_try_again(plan, first)
    ):
        first = plan.next_attempt(first)
        yield first


def open_edits(plan: Plan, judged: Verdicts) -> Iterator[PlannedEdit]:
    """Give the edits without a verdict: first attempts, or the ones after what was rejected."""
    for first in plan:
        *_, edit = attempts(plan, first, judged)
        if edit.case not in judged and edit.key not in plan.dropped:
            yield edit


def numeric_profiles(stage: Stage, store: EditStore) -> dict[str, int]:
    """Count a stage's edits by the numeric profile that made them, written as `name=value, ...`.

    Edits that came with the data, from another machine's store, are "not known here".
    """
    known = store.profiles()
    made_by = Counter(store.records().count_by_profile(stage.manifest(["edit_key"])["edit_key"]))
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
    stem = PurePosixPath(source.file_name).stem
    image_id = f"{source.label}/{stem}.{slug}.{edit.copy}.{edit.key[:8]}"
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
