"""`source_images`: what lies where the images come from, which no run makes."""

import warnings
from typing import TYPE_CHECKING

import dagster as dg
from dagster._core.definitions.data_version import DATA_VERSION_TAG

from diffusemix_pipeline.orchestration.resources import RESOURCE_KEYS
from diffusemix_pipeline.project import Project

if TYPE_CHECKING:
    from diffusemix_pipeline.datasets.manifest import Stage

SOURCE_IMAGES = "source_images"
# Dagster is pinned, so it cannot change.
warnings.filterwarnings("ignore", "Function `observable_source_asset`", dg.BetaWarning)


@dg.observable_source_asset(
    name=SOURCE_IMAGES,
    group_name="diffusemix",
    required_resource_keys=RESOURCE_KEYS,
    description="The images at `source.path`, or those that `data.dvc` pins where none is set. "
    "Guarantees: only read; its version follows from names and bytes, not from times, so that a "
    "changed byte makes all that follows stale and a touched file does not.",
)
def source_images(context: dg.OpExecutionContext) -> dg.DataVersion:
    from diffusemix_pipeline.datasets.sources import source_version

    source = context.resources.settings.source.path
    there = source_version(source) if source else _pinned(context.resources.project)
    return dg.DataVersion(there)


def record_source(context: dg.AssetExecutionContext, stage: "Stage") -> None:
    """Record which version of the source images a raw stage is being made from.

    So it is known whether or not someone observed them before.
    """
    from_source = bool(context.resources.settings.source.path)
    there = stage.notes["content"] if from_source else _pinned(context.resources.project)
    seen = dg.AssetObservation(SOURCE_IMAGES, tags={DATA_VERSION_TAG: there})
    context.log_event(seen)
    # Dagster looked up when the step began what it says the stage was made from.
    context.get_step_execution_context().wipe_input_asset_version_info(seen.asset_key)


def _pinned(project: Project) -> str:
    from diffusemix_pipeline.datasets.sources import DIGITS
    from diffusemix_pipeline.versioning import pinned_raw_version

    return pinned_raw_version(project.root) or DIGITS
