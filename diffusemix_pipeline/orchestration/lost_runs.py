"""Runs whose process is gone, as after a power cut: they would hold queue and pools for ever.

A run within one process says which in its tags. Of one that a server started, Dagster notes the
number of its process, which means something on the server's machine alone.
"""

import dagster as dg

from diffusemix_pipeline.processes import is_gone, is_of_this_host, lived_at

PROCESS_TAG = "diffusemix/process"
_EVERY_SECONDS = 30
_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,  # killed, or its database locked, before it noted its start
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_GONE = "Its process is gone: it was killed, or the machine stopped."


def end_lost_runs(instance: dg.DagsterInstance, *, on_server: bool) -> list[str]:
    """Mark lost runs as failed, and give back what they held; return their ids.

    Where this is not the server's machine (`on_server` False), the server's runs are left alone.
    """
    ended = []
    for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)):
        process = _process_of(run)
        lost = is_gone(process) if process else on_server and _has_lost(instance, run)
        # Its process may have written its end and gone since the runs were listed.
        now = instance.get_run_by_id(run.run_id) if lost else None
        if now and now.status in _UNFINISHED:
            instance.report_run_failed(now, _GONE)
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            ended.append(run.run_id)
    return ended


def living_process(instance: dg.DagsterInstance, run_id: str, *, here: bool) -> int | None:
    """Return the process of a run that goes on; None where it does not, or is another machine's.

    A server's run is of this machine if `here` says so.
    """
    run = instance.get_run_by_id(run_id)
    if run is None or run.status not in _UNFINISHED:
        return None
    if process := _process_of(run):
        lives = is_of_this_host(process) and not is_gone(process)
        return int(process.split()[1]) if lives else None
    started = _started(instance, run) if here else None
    return started[0] if started and lived_at(*started) else None


def _process_of(run: dg.DagsterRun) -> str | None:
    # Run again from the UI, a run keeps the tags, and has a parent.
    return None if run.parent_run_id else run.tags.get(PROCESS_TAG)


def _has_lost(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Tell whether the process that Dagster's server started for a run is gone."""
    started = _started(instance, run)
    return started is not None and not lived_at(*started)


def _started(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[int, float] | None:
    """Return the process that Dagster's server started for a run, if it has said, and when."""
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.get_dagster_event()
        pid = event.engine_event_data.metadata.get("pid")
        if pid and event.step_key is None:
            return int(str(pid.value)), entry.timestamp
    return None


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
