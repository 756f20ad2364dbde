"""When runs start by themselves, and who hears of those that fail.

All but those that start nothing are off until someone turns them on.
"""

import json
import os
import time
import urllib.request
from typing import Any

import dagster as dg

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.orchestration.failures import innermost, told_to_user
from diffusemix_pipeline.orchestration.jobs import diffusemix
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings

WEBHOOK = "FAILURE_WEBHOOK_URL"
"""The environment variable with the address that hears of failed runs: it is a secret."""
_EVERY_SECONDS = 30
_LOOK_FOR_SILENCE_EVERY_SECONDS = 300
_SILENT_SECONDS = 3600.0
_SILENT_SHARE = 0.05  # progress is told more seldom the longer work goes, see `log_progress`
_TIMEOUT_SECONDS = 10


def retrain_schedule(settings: Settings) -> dg.ScheduleDefinition:
    """Return what starts a run at fixed times; UserError where `retrain_cron` is no cron."""
    try:
        return dg.ScheduleDefinition(
            name="retrain",
            job=diffusemix,
            cron_schedule=settings.retrain_cron,
            execution_timezone="UTC",
            description="Runs at the times of `retrain_cron`, Mondays at 04:00 UTC by default. "
            "Unchanged stages are reused; in a quiet week the checks alone read all files again.",
        )
    except dg.DagsterInvalidDefinitionError as error:
        raise UserError(
            f"retrain_cron: {error} Write it as cron does: '0 4 * * 1' is Mondays at 04:00."
        ) from None


def new_images_sensor(project: Project, settings: Settings) -> dg.SensorDefinition:
    """Return what starts a run when files under `source.path` are new or changed.

    The cursor holds `seen`, the listing at the last look; `compared`, the last one whose bytes were
    read; and `asked`, the content that a run was last asked for.
    """

    def new_images(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        from diffusemix_pipeline.datasets.manifest import STAGE, read_stage
        from diffusemix_pipeline.datasets.sources import NAMES, listing_version, source_version

        source = settings.source.path
        if not source or source in NAMES:
            return dg.SkipReason("source.path names no folder.")
        cursor: dict[str, str] = json.loads(context.cursor or "{}")
        listing = listing_version(source)
        if listing == cursor.get("compared"):
            return dg.SkipReason(f"Nothing changed in {source}.")
        if listing != cursor.get("seen"):
            context.update_cursor(json.dumps({**cursor, "seen": listing}))
            return dg.SkipReason(f"{source} changed: waiting for it to stay as it is.")
        content = source_version(source)
        raw = project.raw
        there = read_stage(raw).notes.get("content") if (raw / STAGE).exists() else None
        cursor["compared"] = listing
        if content in (there, cursor.get("asked")):
            context.update_cursor(json.dumps(cursor))
            return dg.SkipReason(f"Files were touched in {source}, and hold the same bytes.")
        cursor["asked"] = content
        tags = {"diffusemix/why": f"new or changed images in {source}"}
        # Without a key: Dagster would never again start a run of one, and images may come and go.
        return dg.SensorResult([dg.RunRequest(run_key=None, tags=tags)], cursor=json.dumps(cursor))

    return dg.SensorDefinition(
        name="new_images",
        evaluation_fn=new_images,
        job=diffusemix,
        minimum_interval_seconds=_EVERY_SECONDS,
        description="Starts a run when images under source.path are new, changed or gone, once "
        "they stayed the same from one look to the next. New images cost their own edits alone.",
    )


def new_data_sensor(project: Project, settings: Settings) -> dg.SensorDefinition:
    """Return what starts a run when git's HEAD pins other data than `data/` was last made from.

    The cursor is the version that a run was last asked for.
    """

    def new_data(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        from diffusemix_pipeline.versioning import basis_digest, committed_digest, pinned_digest

        if settings.source.path:
            return dg.SkipReason("source.path is set: images come from there, not from data.dvc.")
        committed = committed_digest(project.root)
        if committed is None:
            return dg.SkipReason("git's HEAD has no data.dvc.")
        if pinned_digest(project.root) != committed:
            return dg.SkipReason("data.dvc is not as it is committed.")
        if committed in (basis_digest(project.root), context.cursor):
            return dg.SkipReason(f"data/ was made from the committed version {committed}.")
        tags = {"diffusemix/why": f"git's HEAD pins {committed}"}
        return dg.SensorResult([dg.RunRequest(run_key=None, tags=tags)], cursor=committed)

    return dg.SensorDefinition(
        name="new_data",
        evaluation_fn=new_data,
        job=diffusemix,
        minimum_interval_seconds=_EVERY_SECONDS,
        description="Starts a run when git's HEAD pins another data.dvc, as after `git pull`.",
    )


@dg.run_failure_sensor(
    name="failed_runs",
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=_EVERY_SECONDS,
    description=f"Tells of a failed run in the log, and posts it to ${WEBHOOK} where that is set.",
)
def failed_runs(context: dg.RunFailureSensorContext) -> None:
    run = context.dagster_run
    failed = [
        f"{event.step_key}: {told_to_user(error) or innermost(error).message.strip()}"
        for event in context.get_step_failure_events()
        if (error := event.step_failure_data.error)
    ]
    why = "; ".join(failed) or context.failure_event.message
    message = f"diffusemix: run {run.run_id} of {run.job_name} failed: {why}"
    context.log.error(message)
    if address := os.environ.get(WEBHOOK):
        _post(address, {"text": message, "run_id": run.run_id, "job": run.job_name})


@dg.sensor(
    name="silent_runs",
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=_LOOK_FOR_SILENCE_EVERY_SECONDS,
    description="Starts nothing: tells of a run that has told nothing for an hour, and for a "
    f"twentieth of its time, in the log, and posts it to ${WEBHOOK} where that is set.",
)
def silent_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Tell once of each; the cursor holds those that were told of."""
    told, silent, messages = json.loads(context.cursor or "[]"), [], []
    for run in context.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        newest = context.instance.get_records_for_run(run.run_id, limit=1, ascending=False).records
        began = context.instance.get_run_stats(run.run_id).start_time
        if not newest or not began:
            continue
        last, now = newest[0].timestamp, time.time()
        if now - last < max(_SILENT_SECONDS, _SILENT_SHARE * (now - began)):
            continue
        silent.append(run.run_id)
        if run.run_id not in told:
            message = (
                f"diffusemix: run {run.run_id} of {run.job_name} has told nothing for "
                f"{(now - last) / 3600:.1f} h. If it hangs, terminate it, and start another, which "
                "goes on where it was; that one names the process to end, should it be left."
            )
            context.log.error(message)
            messages.append({"text": message, "run_id": run.run_id, "job": run.job_name})
    if address := os.environ.get(WEBHOOK):
        for content in messages:  # all were told of in the log, whether it takes them or not
            _post(address, content)
    context.update_cursor(json.dumps(silent))
    return dg.SkipReason(f"Silent: {', '.join(silent)}." if silent else "No run is silent.")


def _post(address: str, content: dict[str, Any]) -> None:
    """Send JSON; an address that does not take it fails the sensor's tick, for all to see."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
        pass
