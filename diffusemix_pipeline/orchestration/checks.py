"""Promises that are checked on every run; a blocking one that fails stops what comes after it."""

from typing import Any

import dagster as dg
import pandas as pd

from diffusemix_pipeline.orchestration.assets.fractal_augmented_dataset import (
    fractal_augmented_dataset,
)
from diffusemix_pipeline.orchestration.assets.generated_images import generated_images
from diffusemix_pipeline.orchestration.assets.hybrid_images import hybrid_images
from diffusemix_pipeline.orchestration.assets.raw_dataset import raw_dataset

_STAGES = {
    "raw": raw_dataset,
    "generated": generated_images,
    "hybrid": hybrid_images,
    "augmented": fractal_augmented_dataset,
}


def _files_match_manifest(name: str, asset: dg.AssetsDefinition) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=asset,
        blocking=True,
        required_resource_keys={"project"},
        description="Every image file has its row in the manifest, and every row its file.",
    )
    def files_match_manifest(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        from diffusemix_pipeline.datasets.manifest import TABLES, read_manifest

        folder = getattr(context.resources.project, name)
        rows = set(read_manifest(folder, ["file_name"])["file_name"])
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        files -= TABLES
        strays, missing = sorted(files - rows), sorted(rows - files)
        found = [f"{len(rows)} rows, {len(files)} files"]
        if strays:
            found.append(f"not the pipeline's, take out: {', '.join(strays[:5])}")
        if missing:
            found.append(f"missing: {', '.join(missing[:5])}")
        return _result(
            rows == files,
            f"{folder.name}: {'; '.join(found)}",
            {"rows_without_file": len(missing), "files_without_row": len(strays)},
        )

    return files_match_manifest


def _labels_kept(name: str, asset: dg.AssetsDefinition) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=asset,
        blocking=True,
        required_resource_keys={"project"},
        description="Every image has its source's label, and every source is a training image.",
    )
    def labels_kept(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        from diffusemix_pipeline.datasets.manifest import read_manifest

        project = context.resources.project
        wrong = wrong_labels(read_manifest(project.raw), read_manifest(getattr(project, name)))
        return _result(not wrong, f"{len(wrong)} images with a wrong label", {"wrong": wrong[:20]})

    return labels_kept


def wrong_labels(raw: pd.DataFrame, made: pd.DataFrame) -> list[str]:
    """List the images whose source is no training image of their own label."""
    train = raw[raw["split"] == "train"].set_index("image_id")["label"]
    expected = made["source_id"].map(train)
    return list(made.loc[made["label"] != expected, "image_id"])


@dg.asset_check(
    asset=raw_dataset,
    blocking=False,
    required_resource_keys={"project"},
    description="No training image is the picture of a val or test image, nor val of a test image.",
)
def splits_disjoint(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    from diffusemix_pipeline.datasets.manifest import read_stage

    copies = read_stage(context.resources.project.raw).notes["copies_across_splits"]
    return _result(
        not copies,
        f"{len(copies)} images are copies of images of another split; the report names them",
        {"copies": copies[:20]},
        severity=dg.AssetCheckSeverity.WARN,
    )


def _result(
    passed: bool,
    description: str,
    metadata: dict[str, Any],
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=passed, description=description, metadata=metadata, severity=severity
    )


ALL = [
    *(_files_match_manifest(name, asset) for name, asset in _STAGES.items()),
    *(_labels_kept(name, asset) for name, asset in _STAGES.items() if name != "raw"),
    splits_disjoint,
]
