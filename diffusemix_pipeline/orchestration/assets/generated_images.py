"""`generated_images`: the edits of the training images, made in shards that share a store."""

import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dagster as dg

from diffusemix_pipeline.devices import choose_device
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.locks import own_device
from diffusemix_pipeline.orchestration.metadata import picture, stage_metadata, stage_sheet
from diffusemix_pipeline.orchestration.resources import RESOURCE_KEYS
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings

if TYPE_CHECKING:
    from diffusemix_pipeline.datasets.manifest import Stage
    from diffusemix_pipeline.editing.generate import LabelGate, Prepared
    from diffusemix_pipeline.editing.planning import Plan

# The only way for an op to give its asset a data version; dagster is pinned, so it cannot change.
warnings.filterwarnings("ignore", "Parameter `data_version`", dg.BetaWarning)
RETRY_AFTER_SECONDS = 5


@dg.op(
    ins={"source_images": dg.In(dg.Nothing), "raw_dataset": dg.In(dg.Nothing)},
    out={"shards": dg.DynamicOut(dict), "predicted": dg.Out(dict)},
    required_resource_keys=RESOURCE_KEYS,
    pool="gpu",
    description="Which edits are wanted; a step for each shard of them, if any has work to do. "
    "Where edits are to be judged, the label gate's teachers are trained here, once for all. "
    "A pilot tells the cost.",
)
def plan_edits(
    context: dg.OpExecutionContext,
) -> Iterator[dg.DynamicOutput[dict] | dg.Output[dict]]:
    from diffusemix_pipeline.datasets.manifest import finished_stage
    from diffusemix_pipeline.editing.generate import prepare
    from diffusemix_pipeline.editing.store import EditStore

    project, settings = context.resources.project, context.resources.settings
    plan = _plan(project, settings)
    if finished_stage(project.generated, plan.fingerprint, plan.layout):
        context.log.info(f"{project.generated} is there already")
        yield dg.Output({}, "predicted")
        return
    gate = _gate(context, plan, choose_device(settings.device))
    prepared = prepare(plan, project.generated, EditStore(project.edits), gate)
    predicted = _predicted(context, prepared, gate)
    accuracy = prepared.accuracy
    observed = {} if accuracy is None else {"gate_teachers_accuracy": accuracy}
    if observed or predicted:
        metadata = {**observed, **predicted}
        context.log_event(dg.AssetObservation("generated_images", metadata=metadata))
    yield dg.Output(predicted, "predicted")
    for shard in range(settings.editing.shards):
        what = {"number": shard, "plan": plan.fingerprint}
        yield dg.DynamicOutput(what, mapping_key=f"shard_{shard}", output_name="shards")


@dg.op(
    required_resource_keys=RESOURCE_KEYS,
    pool="gpu",
    description="Makes those edits of a shard that the store lacks; tried twice, as a device may "
    "fail once; run again, it goes on.",
)
def edit_shard(context: dg.OpExecutionContext, shard: dict[str, Any]) -> dict[str, Any]:
    from diffusemix_pipeline.editing.generate import make_edits, prepare
    from diffusemix_pipeline.editing.store import EditStore

    project, settings = context.resources.project, context.resources.settings
    plan = _plan(project, settings)
    try:
        with own_device(project, settings.device) as device:
            began = time.time()  # shards may be processes, so by one clock for all
            store = EditStore(project.edits, settings.storage.edits)
            if plan.fingerprint == shard["plan"]:  # for which `plan_edits` looked at what is there
                lacking = plan.without_parts(plan.parts_in(project.generated))
            else:  # something was dropped meanwhile, for which no gate is fitted
                lacking = prepare(plan, project.generated, store, gate=None).lacking
            made = make_edits(
                lacking,
                store=store,
                device=device,
                gate=_gate(context, plan, device),
                shard=shard["number"],
                shards=settings.editing.shards,
                progress=context.resources.progress(context.log),
            )
    except UserError as error:  # it would fail again
        raise dg.Failure(str(error), allow_retries=False) from error
    except Exception as error:  # a policy would let Dagster try again when a person stops the run
        raise dg.RetryRequested(max_retries=1, seconds_to_wait=RETRY_AFTER_SECONDS) from error
    return {"made": made, "began": began, "ended": time.time()}


@dg.op(
    out=dg.Out(dg.Nothing),
    required_resource_keys=RESOURCE_KEYS,
    description="Links all edits from the store into the stage folder.",
)
def collect_edits(
    context: dg.OpExecutionContext, predicted: dict[str, Any], shards: list[dict[str, Any]]
) -> dg.Output[None]:
    from diffusemix_pipeline.datasets.manifest import finished_stage
    from diffusemix_pipeline.editing import generate
    from diffusemix_pipeline.editing.store import EditStore

    project, settings = context.resources.project, context.resources.settings
    store = EditStore(project.edits)
    plan = _plan(project, settings)
    finished = finished_stage(project.generated, plan.fingerprint, plan.layout)
    stage = finished or generate.collect_edits(
        plan,
        project.generated,
        store,
        plan.verdicts(project.gate) if plan.gate else None,
        project.aside,
        context.resources.progress(context.log),
    )
    made = sum(shard["made"] for shard in shards)
    if shards:
        took = max(shard["ended"] for shard in shards) - min(shard["began"] for shard in shards)
    return dg.Output(
        None,
        data_version=dg.DataVersion(stage.version),
        metadata={
            **stage_metadata(stage, None),
            "edits_made": made + predicted.get("pilot_edits", 0),
            **predicted,
            **({"actual_seconds": took} if predicted else {}),
            # Shards may be of machines whose clocks differ.
            **({"edits_per_second": made / took} if made and took > 0 else {}),
            "numeric_profiles": generate.numeric_profiles(stage, store),
            **_yield_metadata(stage),
            **stage_sheet(stage, "prompt", settings),
        },
    )


def _plan(project: Project, settings: Settings) -> "Plan":
    from diffusemix_pipeline.datasets.dropped import read_dropped
    from diffusemix_pipeline.datasets.manifest import read_stage
    from diffusemix_pipeline.editing import planning

    raw, dropped = read_stage(project.raw), read_dropped(project.dropped)
    return planning.plan_edits(raw, settings, dropped)


def _gate(context: dg.OpExecutionContext, plan: "Plan", device: str) -> "LabelGate | None":
    from diffusemix_pipeline.datasets.manifest import read_stage
    from diffusemix_pipeline.training.fold_teachers import label_gate

    if not plan.gate:
        return None
    project = context.resources.project
    return label_gate(
        plan,
        read_stage(project.raw),
        folder=project.gate,
        aside=project.aside,
        device=device,
        progress=context.resources.progress(context.log),
    )


def _predicted(
    context: dg.OpExecutionContext, prepared: "Prepared", gate: "LabelGate | None"
) -> dict[str, Any]:
    """Run a pilot of what is lacking, and return what it predicts, with the images that are there.

    Nothing where too few edits are missing.
    """
    from diffusemix_pipeline.editing.cost import forecast_by_pilot
    from diffusemix_pipeline.editing.store import EditStore

    settings = context.resources.settings
    left = forecast_by_pilot(
        prepared.lacking,
        EditStore(context.resources.project.edits, settings.storage.edits),
        device=choose_device(settings.device),
        gate=gate,
        progress=context.resources.progress(context.log),
    )
    if left is None:
        return {}
    left = replace(left, images=left.images + prepared.there)
    cost = left.cost
    return {
        "pilot_edits": cost.pilot,
        "predicted_edits": left.edits,
        "predicted_seconds": left.seconds,
        "predicted_images": left.images,
        "predicted_megabytes": left.megabytes,
        **({} if cost.accepted is None else {"predicted_yield": cost.accepted}),
    }


def _yield_metadata(stage: "Stage") -> dict[str, Any]:
    """Return what the label gate let through, in all and by class and prompt."""
    from diffusemix_pipeline.editing.gate import ACCEPTED, yield_table
    from diffusemix_pipeline.editing.generate import judged_edits
    from diffusemix_pipeline.evaluation.written_report import plain_markdown
    from diffusemix_pipeline.pictures import yield_map

    judged = judged_edits(stage)
    if judged.empty:
        return {}
    table = yield_table(judged)
    shown = table.round(3).rename(index=plain_markdown, columns=plain_markdown)
    return {
        "gate_yield": float((judged["verdict"] == ACCEPTED).mean()),
        "gate_verdicts": judged["verdict"].value_counts().to_dict(),
        "gate_yield_table": dg.MetadataValue.md(shown.to_markdown()),
        "gate_yield_map": picture(yield_map(table), "share of accepted edits"),
    }


@dg.graph_asset(
    ins={name: dg.AssetIn(dagster_type=dg.Nothing) for name in ("source_images", "raw_dataset")},
    group_name="diffusemix",
    kinds={"diffusers", "pytorch"},
    code_version="2",
    description="G(I, p): each training image edited by a diffusion model under its prompts. "
    "Guarantees: train only; an edit that was made before is taken from the store; "
    "its seed follows from what it is, never from order, shard or worker.",
)
def generated_images(source_images: None, raw_dataset: None) -> None:
    shards, predicted = plan_edits(source_images=source_images, raw_dataset=raw_dataset)
    return collect_edits(predicted, shards.map(edit_shard).collect())
