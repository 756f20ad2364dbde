"""Promises that are checked on every run; a blocking one that fails stops what comes after it."""

from typing import TYPE_CHECKING, Any

import dagster as dg

from diffusemix_pipeline.orchestration.assets.fractal_augmented_dataset import (
    fractal_augmented_dataset,
)
from diffusemix_pipeline.orchestration.assets.generated_images import generated_images
from diffusemix_pipeline.orchestration.assets.hybrid_images import hybrid_images
from diffusemix_pipeline.orchestration.assets.raw_dataset import raw_dataset
from diffusemix_pipeline.orchestration.assets.robustness_report import robustness_report
from diffusemix_pipeline.orchestration.assets.trained_classifier import trained_classifier

if TYPE_CHECKING:
    import pandas as pd

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
        description="Every image file has its row in the manifest, and every row its file, with "
        "the bytes that were decoded and written.",
    )
    def files_match_manifest(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        from diffusemix_pipeline.datasets.manifest import read_stage

        stage = read_stage(getattr(context.resources.project, name))
        found = stage.differences()
        said = [f"{stage.counts['images']} images expected, {found.files} files there"]
        if found.changed:
            said.append(f"other bytes than were written: {', '.join(found.changed[:5])}")
        if found.strays:
            said.append(f"not the pipeline's, take out: {', '.join(found.strays[:5])}")
        if found.missing:
            said.append(f"missing: {', '.join(found.missing[:5])}")
        return _result(
            not (found.changed or found.strays or found.missing),
            f"{name}: {'; '.join(said)}",
            {
                "rows_without_file": len(found.missing),
                "files_without_row": len(found.strays),
                "changed_files": len(found.changed),
            },
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
        raw = read_manifest(project.raw, ["image_id", "label", "split"])
        made = read_manifest(getattr(project, name), ["image_id", "label", "source_id"])
        wrong = _wrong_labels(raw, made)
        told = f"{len(wrong)} images with a wrong label"
        if wrong:
            told += f". Remove data/{name} and run again, which makes it anew."
        return _result(not wrong, told, {"wrong": wrong[:20]})

    return labels_kept


def _wrong_labels(raw: "pd.DataFrame", made: "pd.DataFrame") -> list[str]:
    """List the images whose source is no training image of their own label."""
    train = raw[raw["split"] == "train"].set_index("image_id")["label"]
    expected = made["source_id"].map(train)
    return list(made.loc[made["label"] != expected, "image_id"])


@dg.asset_check(
    asset=raw_dataset,
    blocking=False,
    required_resource_keys={"project"},
    description="No training image is, or nearly, the picture of a val or test image, nor one of "
    "val that of a test image.",
)
def splits_disjoint(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    from diffusemix_pipeline.datasets.manifest import read_stage

    copies = read_stage(context.resources.project.raw).notes["copies_across_splits"]
    return _result(
        not copies,
        f"{len(copies)} images are copies, or nearly, of images of another split: the report names "
        "them",
        {"copies": copies[:20]},
        severity=dg.AssetCheckSeverity.WARN,
    )


@dg.asset_check(
    asset=generated_images,
    blocking=True,
    required_resource_keys={"project", "settings"},
    description="The label gate, where it is on, let through a larger share than the least.",
)
def gate_yield_above_floor(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    from diffusemix_pipeline.datasets.manifest import read_stage
    from diffusemix_pipeline.editing.gate import ACCEPTED
    from diffusemix_pipeline.editing.generate import judged_edits

    judged = judged_edits(read_stage(context.resources.project.generated))["verdict"]
    if judged.empty:
        return _result(True, "The label gate is off.", {})
    share, least = float((judged == ACCEPTED).mean()), context.resources.settings.checks.gate_yield
    return _result(
        share >= least,
        f"The gate let through {share:.0%} of {len(judged)} edits; checks.gate_yield asks for "
        f"{least:.0%}. Its yield by prompt says which prompts to leave out.",
        {"gate_yield": share, "least": least},
    )


@dg.asset_check(
    asset=trained_classifier,
    blocking=True,
    required_resource_keys={"project", "settings"},
    description="Every weight of every classifier is a finite number.",
)
def weights_finite(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    from diffusemix_pipeline.orchestration.learning import trained_fits
    from diffusemix_pipeline.training.classifier import broken_weights

    fits = trained_fits(context.resources.project, context.resources.settings)
    broken = {f"{fit.arm}, seed {fit.seed}": broken_weights(fit.folder) for fit in fits}
    broken = {name: weights for name, weights in broken.items() if weights}
    found = f"{len(fits)} classifiers" + "".join(f"; {name}: {w[0]}" for name, w in broken.items())
    if broken:
        found += (
            ". Training diverged: lower training.learning_rate and run again, which trains anew."
        )
    return _result(not broken, found, {"broken": broken})


@dg.asset_check(
    asset=robustness_report,
    blocking=True,
    required_resource_keys={"project", "settings"},
    description="The best classifier's val accuracy is above the floor: no chance result, or "
    "what the settings ask for. Without it no model is promoted.",
)
def val_accuracy_above_floor(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    from diffusemix_pipeline.datasets.manifest import read_stage
    from diffusemix_pipeline.evaluation.promotion import best_by_chance
    from diffusemix_pipeline.orchestration.learning import trained_fits

    project, settings = context.resources.project, context.resources.settings
    reached = max(fit.best["val_accuracy"] for fit in trained_fits(project, settings))
    floor = settings.checks.val_accuracy
    if floor is None:
        floor = best_by_chance(read_stage(project.raw).counts["by_split"]["val"].values())
    return _result(
        reached >= floor,
        f"The best val accuracy is {reached:.1%}, the floor {floor:.1%}. Look at the labels and at "
        "the learning curves.",
        {"val_accuracy": reached, "floor": floor},
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
    gate_yield_above_floor,
    weights_finite,
    val_accuracy_above_floor,
]
