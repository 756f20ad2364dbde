"""How Dagster runs the steps of a run that the UI, a schedule or `dagster` launches."""

import dagster as dg

from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Executor


def executor_of(name: Executor, project: Project) -> dg.ExecutorDefinition:
    """Return Dagster's executor; Ray is loaded for those who chose it alone."""
    if name == "ray":
        from diffusemix_pipeline.orchestration.ray_cluster import ray_executor

        return ray_executor(project)
    if name == "multiprocess":
        return dg.multiprocess_executor  # shards run at once, as far as the pool "gpu" lets
    return dg.in_process_executor  # no start-up of torch for every step
