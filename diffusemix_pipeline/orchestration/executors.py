"""How Dagster runs the steps of a run."""

import dagster as dg

from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Executor

# What steps would import, some ten seconds each: they are forked where it is there already.
_IMPORTED_ONCE = (
    "diffusemix_pipeline.editing.instruct_pix2pix",
    "diffusemix_pipeline.orchestration.learning",
    "diffusemix_pipeline.training.loop",
    "mlflow",
)


def executor_of(name: Executor, project: Project) -> dg.ExecutorDefinition:
    """Return Dagster's executor; Ray is loaded for those who chose it alone."""
    if name == "ray":
        from diffusemix_pipeline.orchestration.ray_cluster import ray_executor

        return ray_executor(project)
    if name == "multiprocess":  # shards run at once, as far as the pool "gpu" lets
        start = {"forkserver": {"preload_modules": list(_IMPORTED_ONCE)}}
        return dg.multiprocess_executor.configured({"start_method": start})
    return dg.in_process_executor  # no process for every step
