"""`generated_images`: the edits of the training images."""

import time

import dagster as dg

from diffusemix_pipeline.orchestration.assets.raw_dataset import raw_dataset
from diffusemix_pipeline.orchestration.metadata import stage_metadata, stage_sheet
from diffusemix_pipeline.orchestration.resources import RESOURCE_KEYS


@dg.asset(
    deps=[raw_dataset],
    group_name="diffusemix",
    kinds={"diffusers", "pytorch"},
    code_version="1",
    pool="gpu",
    required_resource_keys=RESOURCE_KEYS,
    description="G(I, p): each training image edited by a diffusion model under its prompts. "
    "Guarantees: train only; an edit that was made before is taken from the store; "
    "its seed follows from what it is, never from order.",
)
def generated_images(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    from diffusemix_pipeline.datasets.manifest import read_stage
    from diffusemix_pipeline.devices import choose_device
    from diffusemix_pipeline.editing.generate import generate
    from diffusemix_pipeline.editing.store import EditStore

    project, settings = context.resources.project, context.resources.settings
    started = time.monotonic()
    result = generate(
        read_stage(project.raw),
        settings,
        project.generated,
        store=EditStore(project.edits),
        aside=project.aside,
        device=choose_device(settings.device),
        progress=context.resources.progress(context.log),
    )
    seconds = time.monotonic() - started
    return dg.MaterializeResult(
        data_version=dg.DataVersion(result.stage.version),
        metadata={
            **stage_metadata(result.stage, started),
            "edits_made": result.made,
            "edits_from_store": result.stage.counts["images"] - result.made,
            "edits_per_second": result.made / seconds,
            "contact_sheet": stage_sheet(result.stage, "prompt"),
        },
    )
