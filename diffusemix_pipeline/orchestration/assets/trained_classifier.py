"""`trained_classifier`: a classifier an arm and seed, each an MLflow run and a model."""

import dagster as dg

from diffusemix_pipeline.orchestration.assets.fractal_augmented_dataset import (
    fractal_augmented_dataset,
)
from diffusemix_pipeline.orchestration.assets.raw_dataset import raw_dataset
from diffusemix_pipeline.orchestration.assets.source_images import source_images
from diffusemix_pipeline.orchestration.metadata import picture
from diffusemix_pipeline.orchestration.resources import RESOURCE_KEYS


@dg.asset(
    deps=[source_images, raw_dataset, fractal_augmented_dataset],
    group_name="diffusemix",
    kinds={"timm", "mlflow"},
    code_version="2",
    pool="gpu",
    required_resource_keys=RESOURCE_KEYS,
    description="A timm classifier for each arm, on originals alone and with augmented images. "
    "Guarantees: the same model, recipe, seeds and optimiser steps for every arm; "
    "weights chosen on val; test is not read.",
)
def trained_classifier(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    from diffusemix_pipeline.identity import digest
    from diffusemix_pipeline.orchestration.learning import train_arms
    from diffusemix_pipeline.pictures import learning_curves
    from diffusemix_pipeline.preflight import check_processes

    progress = context.resources.progress(context.log)
    project, settings = context.resources.project, context.resources.settings
    check_processes(settings)
    trained = train_arms(project, settings, context.run.run_id, progress)
    names = list(trained.run_urls)
    curves = {name: fit.curve for name, fit in zip(names, trained.fits, strict=True)}
    return dg.MaterializeResult(
        data_version=dg.DataVersion(digest([fit.fingerprint for fit in trained.fits])),
        metadata={
            "reused": trained.reused,
            "optimiser_steps": settings.training.steps,
            "learning_curves": picture(learning_curves(curves), "loss and val accuracy by step"),
            **{
                f"val_accuracy {name}": fit.best["val_accuracy"]
                for name, fit in zip(names, trained.fits, strict=True)
            },
            **{
                f"mlflow {name}": dg.MetadataValue.url(url)
                for name, url in trained.run_urls.items()
            },
        },
    )
