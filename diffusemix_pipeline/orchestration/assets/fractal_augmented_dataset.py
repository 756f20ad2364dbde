"""`fractal_augmented_dataset`: the augmented images, and the version of all data."""

import time

import dagster as dg

from diffusemix_pipeline.orchestration.assets.generated_images import generated_images
from diffusemix_pipeline.orchestration.assets.hybrid_images import hybrid_images
from diffusemix_pipeline.orchestration.assets.raw_dataset import raw_dataset
from diffusemix_pipeline.orchestration.assets.source_images import source_images
from diffusemix_pipeline.orchestration.metadata import stage_metadata, stage_sheet
from diffusemix_pipeline.orchestration.resources import RESOURCE_KEYS


@dg.asset(
    deps=[source_images, raw_dataset, generated_images, hybrid_images],
    group_name="diffusemix",
    kinds={"numpy", "dvc"},
    code_version="1",
    pool="dvc",
    required_resource_keys=RESOURCE_KEYS,
    description="A = (1 - lam) H + lam F: hybrids blended with a fractal, each with its source's "
    "label. Guarantees: mixed in one pass from the decoded source and edit; every row names "
    "source, prompt, seed, mask and fractal; `data.dvc` pins the whole of `data/`.",
)
def fractal_augmented_dataset(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    from diffusemix_pipeline.datasets.manifest import read_stage
    from diffusemix_pipeline.files import write_if_changed
    from diffusemix_pipeline.mixing.stages import make_augmented
    from diffusemix_pipeline.settings import data_settings
    from diffusemix_pipeline.versioning import snapshot

    project, settings = context.resources.project, context.resources.settings
    progress = context.resources.progress(context.log)
    started = time.monotonic()
    stage = make_augmented(
        read_stage(project.raw),
        read_stage(project.generated),
        settings,
        project.augmented,
        fractal_cache=project.fractals,
        aside=project.aside,
        progress=progress,
    )
    shown = stage_metadata(stage, time.monotonic() - started)
    content = data_settings(settings).encode()
    write_if_changed(project.settings, content, aside=project.aside)
    version = snapshot(project.root, progress)
    context.log.info(version.note)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(stage.version),
        metadata={
            **shown,
            "dvc_digest": version.digest,
            "dvc_push": version.note,
            **stage_sheet(stage, "fractal_id", settings),
        },
    )
