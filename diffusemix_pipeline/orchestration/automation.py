"""When runs start by themselves."""

import dagster as dg

from diffusemix_pipeline.orchestration.jobs import diffusemix

weekly_retrain = dg.ScheduleDefinition(
    name="weekly_retrain",
    job=diffusemix,
    cron_schedule="0 4 * * 1",
    execution_timezone="UTC",
    description="Mondays at 04:00 UTC. Unchanged stages are reused, so a quiet week costs seconds.",
)
