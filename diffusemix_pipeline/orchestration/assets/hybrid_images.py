"""`hybrid_images`: half original, half edit."""

import time

import dagster as dg

from diffusemix_pipeline.orchestration.assets.generated_images import generated_images
from diffusemix_pipeline.orchestration.assets.raw_dataset import raw_dataset
from diffusemix_pipeline.orchestration.assets.source_images import source_images
from diffusemix_pipeline.orchestration.metadata import stage_metadata, stage_sheet
from diffusemix_pipeline.orchestration.resources import RESOURCE_KEYS


@dg.asset(
    deps=[source_images, raw_dataset, generated_images],
    group_name="diffusemix",
    kinds={"numpy"},
    code_version="1",
    required_resource_keys=RESOURCE_KEYS,
    description="H = M I + (1 - M) G: one half of each image is the original, the other its edit. "
    "Guarantees: the half is drawn from a seed; the fractal stage does not read these files.",
)
def hybrid_images(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    from diffusemix_pipeline.datasets.manifest import read_stage
    from diffusemix_pipeline.mixing.stages import make_hybrids

    project = context.resources.project
    started = time.monotonic()
    stage = make_hybrids(
        read_stage(project.raw),
        read_stage(project.generated),
        context.resources.settings,
        project.hybrid,
        aside=project.aside,
        progress=context.resources.progress(context.log),
    )
    return dg.MaterializeResult(
        data_version=dg.DataVersion(stage.version),
        metadata={
            **stage_metadata(stage, time.monotonic() - started),
            **stage_sheet(stage, "mask", context.resources.settings),
        },
    )
