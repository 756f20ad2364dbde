"""`raw_dataset`: the labelled images, copied, checked and split."""

from typing import TYPE_CHECKING

import dagster as dg

from diffusemix_pipeline.orchestration.metadata import picture, stage_metadata, stage_sheet
from diffusemix_pipeline.orchestration.resources import RESOURCE_KEYS

if TYPE_CHECKING:
    from diffusemix_pipeline.datasets.manifest import Stage


@dg.asset(
    group_name="diffusemix",
    kinds={"python", "dvc"},
    code_version="1",
    required_resource_keys=RESOURCE_KEYS,
    description="Labelled images as `data/raw/{train,val,test}/<class>/`, RGB and upright. "
    "Guarantees: source files are only read; what cannot be read is set aside by name; "
    "a picture that lies in two splits is told.",
)
def raw_dataset(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    from diffusemix_pipeline.pictures import class_histogram
    from diffusemix_pipeline.preflight import check_run

    check_run(context.resources.settings)
    stage, origin = _bring(context)
    set_aside = stage.notes["set_aside"]
    for item in set_aside[:20]:
        context.log.warning(f"Set aside: {item['source_id']}: {item['reason']}")
    histogram = class_histogram(stage.counts["by_split"])
    return dg.MaterializeResult(
        data_version=dg.DataVersion(stage.version),
        metadata={
            **stage_metadata(stage),
            "origin": origin,
            "classes": len(stage.counts["by_split"]["train"]),
            "set_aside": len(set_aside),
            "first_set_aside": "; ".join(f"{x['source_id']}: {x['reason']}" for x in set_aside[:3]),
            "left_out_by_train_per_class": stage.notes["left_out_by_train_per_class"],
            "train_copies_of_held_out": len(stage.notes["train_copies_of_held_out"]),
            "class_histogram": picture(histogram, "images a class and split"),
            "contact_sheet": stage_sheet(stage, "label"),
        },
    )


def _bring(context: dg.AssetExecutionContext) -> "tuple[Stage, str]":
    """Return the raw stage and its origin: the source, else what data.dvc pins, else digits."""
    from diffusemix_pipeline.datasets.ingest import ingest
    from diffusemix_pipeline.datasets.manifest import read_stage
    from diffusemix_pipeline.versioning import pinned_digest, pull

    project, settings = context.resources.project, context.resources.settings
    source = settings.source.path
    if not source:
        if pull(project.root):
            return read_stage(project.raw), f"data.dvc, {pinned_digest(project.root)}"
        context.log.info(
            "No source.path is set and DVC holds no data here: making the digits sample"
        )
    progress = context.resources.progress(context.log)
    source = source or "digits"
    return ingest(source, settings, project.raw, aside=project.aside, progress=progress), source
