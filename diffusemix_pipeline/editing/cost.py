"""The cost plan: what edits will cost, from a pilot of some tens of them on the device at hand.

The pilot is of the wanted edits themselves, and they stay in the store: it is paid for anyway.
"""

import heapq
import math
import time
from dataclasses import dataclass, replace

from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.editing.editor import edits_at_once, load_editor
from diffusemix_pipeline.editing.gate import ACCEPTED
from diffusemix_pipeline.editing.generate import LabelGate, judge_edits
from diffusemix_pipeline.editing.planning import Plan, plan_edits
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings


@dataclass(frozen=True)
class Cost:
    """What is wanted and there, and what a round (a batch for each worker) of the rest costs."""

    edits: int
    """Wanted, a first attempt each."""
    stored: int
    """Of those, how many are in the store, the pilot's among them."""
    pilot: int
    round_edits: int
    round_seconds: float
    edit_bytes: float
    """Mean size of an edit's file."""
    accepted: float | None
    """Share of the pilot's edits that the label gate let through, 0 to 1; None without a gate."""

    def missing(self, max_attempts: int) -> int:
        """Predict how many edits are still to be made, those after a rejection among them."""
        if self.accepted is None:
            return self.edits - self.stored
        tries = sum((1 - self.accepted) ** attempt for attempt in range(max_attempts))
        return round((self.edits - self.stored) * tries + self.stored * (tries - 1))

    def seconds(self, edits: int) -> float:
        """Predict how long so many edits take on this device."""
        return math.ceil(edits / self.round_edits) * self.round_seconds


def pilot_size(plan: Plan, device: str) -> int:
    """Return how many edits a pilot takes: two rounds, of which the second is timed."""
    from diffusemix_pipeline.editing.sampling import workers_on

    return 2 * edits_at_once(plan.editor, plan.settings.editing) * workers_on(device)


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
    from diffusemix_pipeline.editing.sampling import Sampler

    stored = stored_edits(plan, store)
    missing = (edit for edit in plan if edit.key not in store)
    chosen = heapq.nsmallest(pilot_size(plan, device), missing, key=lambda edit: edit.key)
    if len(chosen) < pilot_size(plan, device):
        return None
    progress("Editing a pilot", 0, len(chosen))
    editing = plan.settings.editing
    editor = load_editor(plan.editor, editing, device)
    sampler = Sampler(editor, device, plan.settings, edits_at_once(plan.editor, editing))
    half = len(chosen) // 2
    sampler.make(chosen[:half], store, silent)  # the first calls of anything are slower
    progress("Editing a pilot", half, len(chosen))
    started = time.perf_counter()
    sampler.make(chosen[half:], store, silent)
    seconds = time.perf_counter() - started
    progress("Editing a pilot", len(chosen), len(chosen))
    accepted = None
    if gate:
        verdicts = judge_edits(plan, chosen, store, gate, progress)
        accepted = sum(verdicts[edit.key] == ACCEPTED for edit in chosen) / len(chosen)
    return Cost(
        edits=len(plan),
        stored=stored + len(chosen),
        pilot=len(chosen),
        round_edits=half,
        round_seconds=seconds,
        edit_bytes=sum(store.path(edit.key).stat().st_size for edit in chosen) / len(chosen),
        accepted=accepted,
    )


def stored_edits(plan: Plan, store: EditStore) -> int:
    """Count the edits of a plan that need not be made."""
    return sum(edit.key in store for edit in plan)


def share_within(
    seconds: float, cost: Cost, raw: Stage, settings: Settings, store: EditStore
) -> float:
    """Return the largest `editing.share`, in hundredths, whose edits take at most so long.

    0 where not even a hundredth does.
    """
    low, high = 0, 100
    while low < high:
        tried = (low + high + 1) // 2
        editing = settings.editing.model_copy(update={"share": tried / 100})
        plan = plan_edits(raw, settings.model_copy(update={"editing": editing}))
        trimmed = replace(cost, edits=len(plan), stored=stored_edits(plan, store))
        if trimmed.seconds(trimmed.missing(settings.editing.gate.max_attempts)) <= seconds:
            low = tried
        else:
            high = tried - 1
    return low / 100
