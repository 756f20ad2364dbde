"""Running the pipeline from a terminal: the same definitions and the same instance as the UI's."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, chdir, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.errors import DagsterAssetCheckFailedError
from dagster._utils.error import SerializableErrorInfo

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import write_bytes
from diffusemix_pipeline.orchestration.build import build_definitions
from diffusemix_pipeline.orchestration.failures import innermost, told_to_user
from diffusemix_pipeline.orchestration.holding import without_runs
from diffusemix_pipeline.orchestration.jobs import MAIN_JOB
from diffusemix_pipeline.orchestration.lost_runs import PROCESS_TAG
from diffusemix_pipeline.processes import this_process
from diffusemix_pipeline.progress import Progress
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Executor, Settings

_CHECK_FAILED = DagsterAssetCheckFailedError.__name__


@dataclass
class Outcome:
    """How a run ended: what each asset showed, what went wrong, whether the user can mend it."""

    run_id: str
    success: bool
    problems: list[str] = field(default_factory=list)
    user_error: bool = False
    metadata: dict[str, Mapping[str, dg.MetadataValue]] = field(default_factory=dict)

    @property
    def reused(self) -> bool:
        """Whether every asset was there already."""
        return all(shown["reused"].value for shown in self.metadata.values())


def prepare_instance(project: Project) -> None:
    """Point Dagster at the project, with its two files made where they are missing.

    UserError names a database that is none.
    """
    from diffusemix_pipeline.preflight import check_databases

    check_databases(project)
    os.environ["DAGSTER_HOME"] = str(project.root)
    for name in ("dagster.yaml", "workspace.yaml"):
        if not (project.root / name).exists():
            packaged = resources.files("diffusemix_pipeline.orchestration") / name
            write_bytes(project.root / name, packaged.read_bytes())


def run_here(project: Project, settings: Settings, progress: Progress) -> Outcome:
    """Materialize every asset by the executor of the settings, wait, and tell how it went.

    Relative paths, those of dagster.yaml among them, are the project's. `progress` is told where
    all steps run in this process; those that are processes or jobs of their own write it to the
    run's log, which under multiprocess comes to the terminal. UserError where there is no such
    executor, and where another run is at work.
    """
    apart = settings.executor != "in_process"
    how: dict[str, Any] = {
        "run_config": {
            "resources": {"settings": {"config": settings.model_dump()}},
            "loggers": {"console": {"config": {"log_level": "INFO" if apart else "CRITICAL"}}},
        },
        "tags": {PROCESS_TAG: this_process()},
        "raise_on_error": False,
    }
    result: dg.ExecuteInProcessResult | dg.JobExecutionResult
    with _instance_without_runs(project, settings.executor) as instance:
        if apart:
            of = {"root": str(project.root.resolve()), "executor": settings.executor}
            name = main_job.__name__
            job = dg.build_reconstructable_job(__name__, name, reconstructable_kwargs=of)
            try:
                result = dg.execute_job(job, instance, **how)
            except dg.Failure as failure:  # of the executor, before any step
                _end_unstarted(instance, str(failure.description))
                raise UserError(str(failure.description)) from failure
        else:
            definitions = build_definitions(project, settings, lambda log: progress)
            main = definitions.resolve_job_def(MAIN_JOB)
            result = main.execute_in_process(instance=instance, **how)
    failed_checks = [
        f"the check {e.check_name} on {e.asset_key.to_user_string()} failed: {e.description}"
        for e in result.get_asset_check_evaluations()
        if not e.passed and e.severity == dg.AssetCheckSeverity.ERROR
    ]
    outcome = Outcome(result.run_id, result.success and not failed_checks, failed_checks)
    for event in result.all_events:
        if event.is_step_failure:
            _explain(event.step_failure_data.error, event.step_key or "", outcome)
        elif event.event_type == dg.DagsterEventType.RESOURCE_INIT_FAILURE:
            _explain(event.engine_event_data.error, "The start", outcome)
        elif event.is_run_failure and not outcome.problems:  # in none of its steps
            _explain(event.job_failure_data.error, "The run", outcome)
    for event in result.get_asset_materialization_events():
        made = event.step_materialization_data.materialization
        outcome.metadata[made.asset_key.to_user_string()] = made.metadata
    return outcome


@contextmanager
def _instance_without_runs(project: Project, executor: Executor) -> Iterator[dg.DagsterInstance]:
    """Open Dagster's instance, in the project's folder; UserError where a run is at work.

    One that hangs, and holds Dagster's database, would be waited for. Ray's executor is not asked
    here, as it first stops the jobs that a killed run left.
    """
    with ExitStack() as opened:
        # Within: two that start at once cannot both make Dagster's databases.
        with nullcontext() if executor == "ray" else without_runs(project):
            prepare_instance(project)
            opened.enter_context(chdir(project.root))
            instance = opened.enter_context(dg.DagsterInstance.get())
        yield instance


def main_job(root: str, executor: Executor) -> dg.JobDefinition:
    """Return the main job of the project in the folder `root`, as each step's process makes it.

    A run's settings come with it; the executor alone has to be known before.
    """
    settings = Settings(executor=executor)
    return build_definitions(Project(Path(root)), settings).resolve_job_def(MAIN_JOB)


def _end_unstarted(instance: dg.DagsterInstance, why: str) -> None:
    """Let this process's runs that did not start be failed ones, which nothing waits for."""
    ours = dg.RunsFilter(
        tags={PROCESS_TAG: this_process()}, statuses=[dg.DagsterRunStatus.NOT_STARTED]
    )
    for run in instance.get_runs(ours):
        instance.report_run_failed(run, why)


def _explain(error: SerializableErrorInfo | None, what: str, outcome: Outcome) -> None:
    """Add what failed: a UserError as it was meant, anything else with its trace."""
    if error is None or innermost(error).cls_name == _CHECK_FAILED:  # which is told by itself
        return
    message = told_to_user(error, what)
    outcome.user_error |= message is not None
    outcome.problems.append(message or f"{what} failed.\n{innermost(error).to_string()}")
