"""`raw_dataset`: the labelled images, copied, checked and split."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import dagster as dg

from diffusemix_pipeline.orchestration.assets.source_images import record_source, source_images
from diffusemix_pipeline.orchestration.metadata import picture, stage_metadata, stage_sheet
from diffusemix_pipeline.orchestration.resources import RESOURCE_KEYS
from diffusemix_pipeline.progress import Progress
from diffusemix_pipeline.project import Project

if TYPE_CHECKING:
    from diffusemix_pipeline.datasets.manifest import Stage


@dg.asset(
    deps=[source_images],
    group_name="diffusemix",
    kinds={"python", "dvc"},
    code_version="1",
    required_resource_keys=RESOURCE_KEYS,
    description="Labelled images as `data/raw/{train,val,test}/<class>/`, RGB and upright. "
    "Guarantees: source files are only read; what cannot be read is set aside by name; "
    "a picture that lies in two splits is told.",
)
def raw_dataset(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    from diffusemix_pipeline.datasets.manifest import SPLITS, without_images
    from diffusemix_pipeline.pictures import class_histogram
    from diffusemix_pipeline.preflight import check_outputs, check_run
    from diffusemix_pipeline.tracking import open_tracking

    project, settings = context.resources.project, context.resources.settings
    check_run(project, settings)
    if settings.tracking.uri:
        open_tracking(project, settings.tracking)  # which training needs, after hours perhaps
    started = time.monotonic()
    stage, origin = _bring(context)
    record_source(context, stage)
    check_outputs(project)  # DVC may have had to mend them first
    shown = stage_metadata(stage, time.monotonic() - started)
    set_aside = stage.notes["set_aside"]
    for item in set_aside[:20]:
        context.log.warning(f"Set aside: {item['source_id']}: {item['reason']}")
    by_split = stage.counts["by_split"]
    missing = {split: without_images(by_split, split) for split in ("val", "test")}
    for split, labels in missing.items():
        if labels:
            context.log.warning(f"No {split} image shows {', '.join(labels[:20])}")
    histogram = class_histogram({split: by_split[split] for split in SPLITS if split in by_split})
    return dg.MaterializeResult(
        data_version=dg.DataVersion(stage.version),
        metadata={
            **shown,
            "origin": origin,
            "classes": len(by_split["train"]),
            "set_aside": len(set_aside),
            "first_set_aside": "; ".join(f"{x['source_id']}: {x['reason']}" for x in set_aside[:3]),
            **{f"classes_not_in_{split}": len(labels) for split, labels in missing.items()},
            "dropped": len(stage.notes.get("dropped", [])),
            "left_out_by_train_per_class": stage.notes["left_out_by_train_per_class"],
            "copies_across_splits": len(stage.notes["copies_across_splits"]),
            "class_histogram": picture(histogram, "images a class and split"),
            **stage_sheet(stage, "label", context.resources.settings),
        },
    )


def _bring(context: dg.AssetExecutionContext) -> "tuple[Stage, str]":
    """Return the raw stage and its origin: the source, what is pinned or there, or digits."""
    from diffusemix_pipeline.datasets.dropped import read_dropped
    from diffusemix_pipeline.datasets.ingest import ingest, leave_out
    from diffusemix_pipeline.datasets.published import PUBLISHED, terms
    from diffusemix_pipeline.datasets.sources import DIGITS

    project, settings = context.resources.project, context.resources.settings
    progress = context.resources.progress(context.log)
    source = settings.source.path
    dropped = read_dropped(project.dropped)
    if not source:
        there = _pinned(project, progress)
        if there:
            stage, origin = there
            return leave_out(stage, dropped, settings.storage, aside=project.aside), origin
        source = DIGITS
        context.log.info("No source.path is set and data/ holds no images: making the digits")
    if source in PUBLISHED:
        context.log.info(terms(source))
    stage = ingest(
        source,
        settings,
        project.raw,
        aside=project.aside,
        archives=project.archives(settings.source.archives),
        dropped=dropped,
        progress=progress,
    )
    return stage, source


def _pinned(project: Project, progress: Progress) -> "tuple[Stage, str] | None":
    """Return the images that data.dvc pins, else those that lie in data/, and which it is.

    None where there are none, and where they are the digits, which can be made anew. UserError for
    images that were here and that nobody can give any more.
    """
    from diffusemix_pipeline.datasets.manifest import STAGE, read_stage
    from diffusemix_pipeline.datasets.sources import DIGITS
    from diffusemix_pipeline.errors import UserError
    from diffusemix_pipeline.versioning import basis_digest, pinned_digest, pull

    manifest = project.raw / STAGE
    before = read_stage(project.raw).version if manifest.exists() else None
    progress("Bringing what data.dvc pins", 0, 1)
    pulled = pull(project.root)
    progress("Bringing what data.dvc pins", 1, 1)
    if not manifest.exists():
        pinned = pinned_digest(project.root)
        if pinned and basis_digest(project.root) == pinned:  # they were here
            raise UserError(
                "The images that data.dvc pins are gone from data/raw, and neither DVC's cache nor "
                "a remote has all of them. Name the folder that they came from (source.path), or "
                "add the remote that holds them; without data.dvc, the digits are made."
            )
        return None
    stage = read_stage(project.raw)
    if stage.notes["source"]["kind"] == DIGITS:
        return None
    origin = "data.dvc" if pulled else "data/raw, as neither cache nor remote has what is pinned"
    return replace(stage, reused=stage.version == before), origin
