"""Runs whose process is gone, as after a power cut: they would hold queue and pools for ever.

A run within one process says which in its tags. Of one that a server started, Dagster notes the
number of its process, which means something on the server's machine alone.
"""

import dagster as dg
from dagster._core.storage.dagster_run import IN_PROGRESS_RUN_STATUSES

from diffusemix_pipeline.processes import is_gone, started_between

PROCESS_TAG = "diffusemix/process"
_EVERY_SECONDS = 30
_GONE = "Its process is gone: it was killed, or the machine stopped."


def end_lost_runs(instance: dg.DagsterInstance, *, on_server: bool) -> list[str]:
    """Mark lost runs as failed, and give back what they held; return their ids.

    Where this is not the server's machine (`on_server` False), the server's runs are left alone.
    """
    running = instance.get_runs(dg.RunsFilter(statuses=IN_PROGRESS_RUN_STATUSES))
    lost = [
        run
        for run in running
        if is_gone(run.tags.get(PROCESS_TAG, "")) or (on_server and _has_lost(instance, run))
    ]
    for run in lost:
        instance.report_run_failed(run, _GONE)
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return [run.run_id for run in lost]


def _has_lost(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Tell whether the process that Dagster's server started for a run is gone."""
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.get_dagster_event()
        pid = event.engine_event_data.metadata.get("pid")
        if pid and event.step_key is None:
            return not started_between(int(str(pid.value)), 0, entry.timestamp + 1)
    return False  # it has not said yet


@dg.sensor(
    name="lost_runs",
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=_EVERY_SECONDS,
    description="Starts nothing: ends the runs whose process is gone, as after a power cut, so "
    "that those who wait for them can start.",
)
def lost_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    ended = end_lost_runs(context.instance, on_server=True)
    return dg.SkipReason(f"Ended: {', '.join(ended)}." if ended else "No run is lost.")
