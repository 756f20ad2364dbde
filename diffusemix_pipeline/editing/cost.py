"""The cost plan: what edits will cost, from a pilot of some of them on the device at hand.

The pilot is of the wanted edits themselves, and they stay in the store: it is paid for anyway.
"""

import heapq
import math
import time
from dataclasses import dataclass

from diffusemix_pipeline.datasets.dropped import NOTHING, Dropped
from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.editing.editor import edits_at_once
from diffusemix_pipeline.editing.gate import ACCEPTED
from diffusemix_pipeline.editing.generate import (
    LabelGate,
    attempts,
    judge_edits,
    load_sampler,
    open_edits,
    taken,
)
from diffusemix_pipeline.editing.planning import Plan, plan_edits
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.editing.verdicts import Verdicts
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings

_LEAST_TIMED = 12
"""Edits: fewer tell little of a gate's yield."""


@dataclass(frozen=True)
class Cost:
    """What a round of edits (a batch for each worker) costs, and how many of them count."""

    pilot: int
    """Edits made to know this."""
    round_edits: int
    round_seconds: float
    edit_bytes: float
    """Mean size of an edit's file."""
    accepted: float | None
    """Share of the pilot's edits that the label gate let through, 0 to 1; None without a gate."""

    def seconds(self, edits: int) -> float:
        """Predict how long so many edits take on this device."""
        return math.ceil(edits / self.round_edits) * self.round_seconds


@dataclass(frozen=True)
class Forecast:
    """What is still to be done for a plan, if the rest is as the pilot was."""

    cost: Cost
    edits: int
    """Still to be made, those after a rejection among them."""
    seconds: float
    """How long these take on this device."""
    images: int
    """Edits that the stage will hold, those that are stored already among them."""

    @property
    def megabytes(self) -> float:
        """Size of the stage."""
        return self.images * self.cost.edit_bytes / 1e6

    @property
    def disk_megabytes(self) -> float:
        """What the disk will hold more after the run.

        That is the new edits, to which the stage links, and for each that the stage holds a hybrid
        and an augmented image of about its size.
        """
        return (self.edits + 2 * self.images) * self.cost.edit_bytes / 1e6


def forecast_by_pilot(
    plan: Plan,
    store: EditStore,
    *,
    device: str,
    gate: LabelGate | None,
    progress: Progress = silent,
) -> Forecast | None:
    """Run a pilot and predict what is left after it; None where `run_pilot` gives none."""
    cost = run_pilot(plan, store, device=device, gate=gate, progress=progress)
    return forecast(plan, store, _judged(gate), cost) if cost else None


def forecast(plan: Plan, store: EditStore, judged: Verdicts, cost: Cost) -> Forecast:
    """Predict what is left of a plan, if as large a share gets through the gate as of the pilot."""
    rejected = 0.0 if cost.accepted is None else 1 - cost.accepted
    most = plan.settings.editing.gate.max_attempts
    edits = [0.0] * most  # by how many rejections come before: each of these waits for the last
    images = 0.0
    for first in plan:
        *_, edit = attempts(plan, first, judged)
        if edit.key in plan.dropped:
            continue
        if edit.case in judged:
            images += judged.get(edit.case) == ACCEPTED
        else:
            tries = most - edit.attempt
            for before in range(tries):
                edits[before] += rejected**before
            edits[0] -= edit.key in store
            images += 1 - rejected**tries
    seconds = sum(cost.seconds(round(each)) for each in edits)
    return Forecast(cost, round(sum(edits)), seconds, round(images))


def _pilot_rounds(plan: Plan, device: str) -> tuple[int, int]:
    """Return how many edits a round of the pilot has, and how many rounds are timed.

    As many are made before, untimed: the first calls of anything are slower.
    """
    from diffusemix_pipeline.editing.sampling import workers_on

    # Two batches show how an accelerator samples one while the other is written.
    batches = max(2, workers_on(device))
    edits = batches * edits_at_once(plan.editor, plan.settings.editing)
    return edits, math.ceil(_LEAST_TIMED / edits)


def run_pilot(
    plan: Plan,
    store: EditStore,
    *,
    device: str,
    gate: LabelGate | None = None,
    progress: Progress = silent,
) -> Cost | None:
    """Make some of the missing edits and time them; None where fewer than a pilot are missing.

    Which ones follows from their keys, and so is a fair draw of images and prompts.
    """
    round_edits, rounds = _pilot_rounds(plan, device)
    half = round_edits * rounds
    judged = _judged(gate)
    missing = {edit.key for edit in open_edits(plan, judged)}
    store.exchange(missing, progress)
    missing = {key for key in missing if key not in store}
    if len(missing) < 2 * half:
        return None
    fair = set(heapq.nsmallest(2 * half, missing))
    chosen = list(taken(open_edits(plan, judged), fair))
    progress("Editing a pilot", 0, len(chosen))
    sampler = load_sampler(plan, device)
    sampler.make(chosen[:half], half, store, silent)
    progress("Editing a pilot", half, len(chosen))
    started = time.perf_counter()
    sampler.make(chosen[half:], half, store, silent)
    seconds = time.perf_counter() - started
    progress("Editing a pilot", len(chosen), len(chosen))
    accepted = None
    if gate:
        rejected = judge_edits(plan, chosen, judged, store, gate, progress)
        accepted = 1 - len(rejected) / len(chosen)
    return Cost(
        pilot=len(chosen),
        round_edits=round_edits,
        round_seconds=seconds / rounds,
        edit_bytes=sum(store.path(edit.key).stat().st_size for edit in chosen) / len(chosen),
        accepted=accepted,
    )


def share_within(
    seconds: float,
    cost: Cost,
    raw: Stage,
    settings: Settings,
    store: EditStore,
    gate: LabelGate | None,
    dropped: Dropped = NOTHING,
) -> float:
    """Return the largest `editing.share`, in hundredths, whose edits take at most so long.

    0 where not even a hundredth does.
    """
    judged = _judged(gate)
    low, high = 0, 100
    while low < high:
        tried = (low + high + 1) // 2
        editing = settings.editing.model_copy(update={"share": tried / 100})
        plan = plan_edits(raw, settings.model_copy(update={"editing": editing}), dropped)
        if forecast(plan, store, judged, cost).seconds <= seconds:
            low = tried
        else:
            high = tried - 1
    return low / 100


def _judged(gate: LabelGate | None) -> Verdicts:
    return Verdicts(gate.verdicts if gate else [])
