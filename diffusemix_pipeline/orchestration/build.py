"""Puts `Definitions` together, explicitly: what the UI, the command line and the tests all run."""

import dagster as dg

from diffusemix_pipeline.orchestration import automation, checks, jobs
from diffusemix_pipeline.orchestration.assets.champion import champion
from diffusemix_pipeline.orchestration.assets.fractal_augmented_dataset import (
    fractal_augmented_dataset,
)
from diffusemix_pipeline.orchestration.assets.generated_images import generated_images
from diffusemix_pipeline.orchestration.assets.hybrid_images import hybrid_images
from diffusemix_pipeline.orchestration.assets.raw_dataset import raw_dataset
from diffusemix_pipeline.orchestration.assets.robustness_report import robustness_report
from diffusemix_pipeline.orchestration.assets.source_images import source_images
from diffusemix_pipeline.orchestration.assets.trained_classifier import trained_classifier
from diffusemix_pipeline.orchestration.executors import executor_of
from diffusemix_pipeline.orchestration.lost_runs import lost_runs
from diffusemix_pipeline.orchestration.maintenance import maintenance_job, maintenance_schedule
from diffusemix_pipeline.orchestration.resources import (
    MakeProgress,
    log_progress,
    progress_resource,
    project_resource,
    settings_resource,
    values_resource,
)
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings

_DATA = ("raw_dataset", "generated_images", "hybrid_images", "fractal_augmented_dataset")
_MADE = (
    raw_dataset,
    generated_images,
    hybrid_images,
    fractal_augmented_dataset,
    trained_classifier,
    robustness_report,
    champion,
)


def build_definitions(
    project: Project, settings: Settings, make_progress: MakeProgress = log_progress
) -> dg.Definitions:
    """Return the pipeline of a project: `settings` are what the launchpad starts from."""
    maintenance = maintenance_job(project, settings)

    def signed(spec: dg.AssetSpec) -> dg.AssetSpec:
        tags = {"kept_by": "dvc" if spec.key.to_user_string() in _DATA else "mlflow"}
        return spec.replace_attributes(owners=settings.owners, tags={**spec.tags, **tags})

    return dg.Definitions(
        assets=[source_images, *(asset.map_asset_specs(signed) for asset in _MADE)],
        asset_checks=checks.ALL,
        jobs=[jobs.diffusemix, maintenance],
        schedules=[automation.retrain_schedule(settings), maintenance_schedule(maintenance)],
        sensors=[
            automation.new_images_sensor(project, settings),
            automation.new_data_sensor(project, settings),
            automation.failed_runs,
            automation.silent_runs,
            lost_runs,
        ],
        executor=executor_of(settings.executor, project),
        resources={
            "settings": settings_resource(settings),
            "project": project_resource(project, settings.executor),
            "progress": progress_resource(make_progress),
            "io_manager": values_resource(project),
        },
    )
