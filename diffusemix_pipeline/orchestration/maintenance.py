"""Housekeeping: what months of runs leave behind, counted first, and removed where one says so.

What belongs here: which runs, trainings and edits nobody needs. What does not: data versions, which
are DVC's (`dvc gc`), and logs of ticks, which `dagster.yaml` keeps short.
"""

import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg
from dagster._core.storage.dagster_run import FINISHED_STATUSES

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import BEGUN
from diffusemix_pipeline.locks import alone_with_edits
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings

_DAY_SECONDS = 24 * 3600


class UnusedEdits(NamedTuple):
    """What a project's edit store holds: how many in all, and the keys that no dataset uses."""

    every: int
    old: list[str]
    young: list[str]
    """Of the last day: they may be of a run that is still going on."""


def unused_edits(project: Project, *, remove: bool) -> UnusedEdits:
    """Find the edits that no present dataset uses and nobody dropped; remove the old ones.

    UserError where somebody uses the store, and where there is no dataset to tell by.
    """
    from diffusemix_pipeline.datasets.dropped import read_dropped
    from diffusemix_pipeline.datasets.manifest import MANIFEST, read_manifest
    from diffusemix_pipeline.editing.store import EditStore

    store = EditStore(project.edits)
    stages = [project.generated, *project.augment.glob("*/generated")]
    present = [stage for stage in stages if (stage / MANIFEST).exists()]
    if not present:
        raise UserError(
            f"No dataset is in {project.data}, so none of the {len(list(store)):,} edits is used: "
            "bring it back with `diffusemix data pull` or a run first."
        )
    with alone_with_edits(project):
        used = set(read_dropped(project.dropped).edits)  # whoever wants one back does not pay again
        for stage in present:
            used.update(read_manifest(stage, ["edit_key"])["edit_key"])
        every = list(store)
        since = time.time() - _DAY_SECONDS
        found = UnusedEdits(len(every), [], [])
        for key in every:
            if key not in used:
                is_old = store.path(key).stat().st_mtime < since
                (found.old if is_old else found.young).append(key)
        if remove:
            store.remove(found.old)
    return found


def old_runs(instance: dg.DagsterInstance, days: int) -> Iterator[dg.DagsterRun]:
    """Give the ended runs that began so long ago and made nothing that is an asset's newest."""
    before = datetime.now(UTC) - timedelta(days=days)
    keys = instance.all_asset_keys()
    newest = {
        event.run_id for key in keys if (event := instance.get_latest_materialization_event(key))
    }
    filters = dg.RunsFilter(statuses=list(FINISHED_STATUSES), created_before=before)
    for run in instance.get_runs(filters):
        if run.run_id not in newest:
            yield run


def begun_long_ago(project: Project, days: int) -> Iterator[Path]:
    """Give what runs that were cut off so long ago would go on from."""
    since = time.time() - days * _DAY_SECONDS
    for folder in (project.checkpoints, project.evidence, project.aside):
        for path in folder.glob(f"*{BEGUN}"):
            if path.stat().st_mtime < since:
                yield path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_files(folder: Path, run_ids: set[str]) -> None:
    """Remove what Dagster leaves of deleted runs: logs, values and, with SQLite, emptied files."""
    for path in [path for path in folder.rglob("*") if path.name.split(".")[0] in run_ids]:
        _remove(path)


def _tidying_op(description: str) -> Any:
    """Return a decorator for an op that counts, and removes where it is told to."""
    remove = dg.Field(
        bool, default_value=False, description="Remove them; without, they are counted."
    )
    return dg.op(out=dg.Out(dg.Nothing), config_schema={"remove": remove}, description=description)


def _say(context: dg.OpExecutionContext, count: int, what: str) -> None:
    removed = context.op_config["remove"]
    context.log.info(f"{count} {what} {'removed' if removed else 'could be removed'}")
    context.add_output_metadata({"count": count, "removed": removed})


def maintenance_job(project: Project, settings: Settings) -> dg.JobDefinition:
    """Return the job that tidies up a project, its Dagster and its MLflow."""

    @_tidying_op("Dagster's runs that ended long ago, with their logs; not the newest assets'.")
    def dagster_runs(context: dg.OpExecutionContext) -> None:
        runs = list(old_runs(context.instance, settings.keep_runs_days))
        if context.op_config["remove"]:
            for run in runs:
                context.instance.delete_run(run.run_id)
            _remove_files(project.dagster, {run.run_id for run in runs})
        _say(context, len(runs), "Dagster runs")

    @_tidying_op("MLflow's runs that failed or were killed long ago; dead processes' are ended.")
    def mlflow_runs(context: dg.OpExecutionContext) -> None:
        from diffusemix_pipeline.tracking import open_tracking

        tracker = open_tracking(project, settings.tracking)
        tracker.reconcile()
        left = tracker.unfinished(settings.keep_runs_days, remove=context.op_config["remove"])
        _say(context, len(left), "MLflow runs")

    @_tidying_op("Edits that no present dataset uses, older than a day.")
    def edits(context: dg.OpExecutionContext) -> None:
        there = project.edits.exists()
        found = unused_edits(project, remove=context.op_config["remove"]) if there else None
        _say(context, len(found.old) if found else 0, "edits")

    @_tidying_op(
        "What stages, trainings and evaluations that were cut off long ago would go on from."
    )
    def begun(context: dg.OpExecutionContext) -> None:
        paths = list(begun_long_ago(project, settings.keep_runs_days))
        if context.op_config["remove"]:
            for path in paths:
                _remove(path)
        _say(context, len(paths), "unfinished stages, trainings and evaluations")

    @dg.job(
        name="maintenance",
        description="Counts what months of runs left behind, and removes it where `remove` is true "
        "in the launchpad. Datasets, models and reports stay.",
    )
    def maintenance() -> None:
        dagster_runs()
        mlflow_runs()
        edits()
        begun()

    return maintenance


def maintenance_schedule(job: dg.JobDefinition) -> dg.ScheduleDefinition:
    """Return what tidies up once a week, for real."""
    remove = {"config": {"remove": True}}
    return dg.ScheduleDefinition(
        name="tidy_up",
        job=job,
        cron_schedule="0 2 * * 0",
        execution_timezone="UTC",
        run_config={"ops": {node.name: remove for node in job.nodes}},
        description="Sundays at 02:00 UTC. Run the job `maintenance` by hand first: it only counts "
        "then.",
    )
