"""What a run's edits will cost, before it starts: behind `diffusemix plan`."""

from dataclasses import dataclass

from diffusemix_pipeline.datasets.dropped import read_dropped
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.manifest import STAGE, Stage, read_stage
from diffusemix_pipeline.datasets.sources import DIGITS
from diffusemix_pipeline.devices import choose_device
from diffusemix_pipeline.editing.cost import Forecast, forecast_by_pilot, share_within
from diffusemix_pipeline.editing.generate import adopt_edits, prepare_gate
from diffusemix_pipeline.editing.planning import plan_edits
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.locks import using_edits
from diffusemix_pipeline.preflight import check_augmentation
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings
from diffusemix_pipeline.training.fold_teachers import label_gate


@dataclass(frozen=True)
class CostPlan:
    """How many edits are wanted and stored, and what a pilot says of the others."""

    origin: str
    """Which images were planned for."""
    edits: int
    stored: int
    forecast: Forecast | None
    """What is left after the pilot; None where so few are missing that it would have made them."""
    share: float | None
    """The largest `editing.share` within the budget; None without a budget or a pilot."""


def plan_cost(
    settings: Settings, project: Project, budget: float | None, progress: Progress = silent
) -> CostPlan:
    """Make a pilot of the edits that a run with these settings would make; `budget` in seconds.

    The pilot's edits stay in the store for that run, as do the label gate's teachers.
    """
    check_augmentation(settings)
    device, store = choose_device(settings.device), EditStore(project.edits, settings.storage.edits)
    raw, origin = _raw(settings, project, progress)
    dropped = read_dropped(project.dropped)
    plan = plan_edits(raw, settings, dropped)
    gate = None
    if plan.gate:  # what lies in `project.aside` goes when a run begins
        aside = project.state / "plan" / "aside"
        gate = label_gate(
            plan, raw, folder=project.gate, aside=aside, device=device, progress=progress
        )
        prepare_gate(gate, plan, project.generated)
    with using_edits(project):
        adopt_edits(project.generated, store)  # all: the plan of a share has other parts
        store.exchange({edit.key for edit in plan.shard(0, 1)}, progress)
        stored = [edit.key in store for edit in plan.shard(0, 1)]
        left = forecast_by_pilot(plan, store, device=device, gate=gate, progress=progress)
    share = None
    if left and budget:
        share = share_within(budget, left.cost, raw, settings, store, gate, dropped)
    return CostPlan(origin, len(stored), sum(stored), left, share)


def _raw(settings: Settings, project: Project, progress: Progress) -> tuple[Stage, str]:
    """Return the source's images, else those in `data/`, else digits, and which it is.

    Digits in `data/` are made anew by a run, too. What is pinned and not here is not brought.
    """
    if not settings.source.path and (project.raw / STAGE).exists():
        there = read_stage(project.raw)
        if there.notes["source"]["kind"] != DIGITS:
            return there, "data/raw"
    work = project.state / "plan"
    source = settings.source.path or DIGITS
    archives = project.archives(settings.source.archives)
    raw = ingest(
        source,
        settings,
        work / "raw",
        aside=work / "aside",
        archives=archives,
        dropped=read_dropped(project.dropped),
        progress=progress,
    )
    return raw, source
