"""`raw_dataset`: the labelled images, copied, checked and split."""

import dagster as dg

from diffusemix_pipeline.orchestration.metadata import picture, stage_metadata, stage_sheet
from diffusemix_pipeline.orchestration.resources import RESOURCE_KEYS


@dg.asset(
    group_name="data",
    kinds={"python", "dvc"},
    code_version="1",
    required_resource_keys=RESOURCE_KEYS,
    description="Labelled images as `data/raw/{train,val,test}/<class>/`, RGB and upright. "
    "Guarantees: source files are only read; what cannot be read is set aside by name; "
    "the three splits share no file.",
)
def raw_dataset(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    from diffusemix_pipeline.datasets.ingest import ingest
    from diffusemix_pipeline.datasets.manifest import read_stage
    from diffusemix_pipeline.pictures import class_histogram
    from diffusemix_pipeline.versioning import pull_if_pinned

    project, settings = context.resources.project, context.resources.settings
    progress = context.resources.progress(context.log)
    source = settings.source.path
    origin = source or pull_if_pinned(project.root)
    if source or origin is None:
        chosen = source or "digits"
        stage = ingest(chosen, settings, project.raw, aside=project.aside, progress=progress)
    else:
        stage = read_stage(project.raw)
    set_aside = stage.notes["set_aside"]
    for item in set_aside[:20]:
        context.log.warning(f"Set aside: {item['source_id']}: {item['reason']}")
    histogram = class_histogram(stage.counts["by_split"])
    return dg.MaterializeResult(
        data_version=dg.DataVersion(stage.version),
        metadata={
            **stage_metadata(stage),
            "origin": origin or "digits",
            "classes": len(stage.counts["by_split"]["train"]),
            "set_aside": len(set_aside),
            "train_copies_of_held_out": len(stage.notes["train_copies_of_held_out"]),
            "class_histogram": picture(histogram, "images a class and split"),
            "contact_sheet": stage_sheet(stage, "label"),
        },
    )
