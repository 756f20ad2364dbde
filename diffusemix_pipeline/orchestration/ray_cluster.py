"""Steps as jobs of a Ray cluster, whose nodes see this machine's folders at the same paths.

Which node a step gets is Ray's choice: each step takes a core, and a step of the pool "gpu" a GPU
where one is there when it starts or `device` asks for it, or as many as train together. A shard
whose node is lost is edited once more, on another.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar

import dagster as dg
import psutil
from dagster._core.definitions.executor_definition import multiple_process_executor_requirements
from dagster._core.events import DagsterEvent, StepRetryData
from dagster._core.execution.context.system import IStepContext
from dagster._core.execution.plan.state import KnownExecutionState
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.base import Executor
from dagster._core.executor.init import InitExecutorContext
from dagster._core.executor.step_delegating import (
    CheckStepHealthResult,
    StepDelegatingExecutor,
    StepHandlerContext,
)
from dagster._core.system_config.objects import ResolvedRunConfig
from dagster._utils.error import SerializableErrorInfo

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.layers import ENVIRONMENT_PREFIX
from diffusemix_pipeline.orchestration.assets.generated_images import (
    RETRY_AFTER_SECONDS,
    edit_shard,
)
from diffusemix_pipeline.orchestration.lost_runs import end_lost_runs
from diffusemix_pipeline.orchestration.storage import POSTGRES_URL
from diffusemix_pipeline.project import Project

try:
    from dagster_ray.core.executor import RayStepHandler
    from ray.job_submission import JobStatus, JobSubmissionClient
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException
except ModuleNotFoundError as error:
    raise UserError(
        f"executor: ray needs a package that is not here ({error.name}). `make install` brings "
        "it; elsewhere, `pip install '.[ray]'` in a clone. Or choose in_process or multiprocess."
    ) from error

ADDRESS = "RAY_ADDRESS"
"""Names the environment variable with the address of the cluster's dashboard."""
_THREADS = "OMP_NUM_THREADS"
_SHARD = f"generated_images.{edit_shard.name}"
_TRAINING = "trained_classifier"
_RUN_OF_JOB = "dagster/run-id"  # as dagster-ray calls it
_CORES = 1  # of the cluster, for each step that runs at once
Answer = TypeVar("Answer")
_NO_ANSWER = (RuntimeError, OSError, RayStateApiException)
_CHECK_EVERY_SECONDS = 10
_MOST_SILENCE_SECONDS = 600  # of the dashboard, until steps are taken for lost
_ANSWER_SECONDS = 60
_MOST_NODES = 10_000


def ray_executor(project: Project) -> dg.ExecutorDefinition:
    """Return the executor that runs each step as a job of the cluster at `RAY_ADDRESS`."""

    @dg.executor(name="ray", requirements=multiple_process_executor_requirements())
    def ray(init: InitExecutorContext) -> Executor:
        address = os.environ.get(ADDRESS)
        if not address:
            raise dg.Failure(
                f"executor: ray needs {ADDRESS}, the address of the cluster's dashboard, for "
                f"example {ADDRESS}=http://127.0.0.1:8265.",
                allow_retries=False,
            )
        try:
            others = {node.node_ip for node in _nodes(address)} - _own_addresses()
            steps = _Steps(address, project.root.resolve(), alone=not others)
        except _NO_ANSWER as error:
            raise dg.Failure(
                f"executor: ray: no cluster answers at {ADDRESS}={address} ({error}).",
                allow_retries=False,
            ) from error
        if others and not os.environ.get(POSTGRES_URL):
            raise dg.Failure(
                f"executor: ray on another machine ({min(others)}) needs {POSTGRES_URL}, here and "
                "there: every step writes Dagster's events, and SQLite is for one machine.",
                allow_retries=False,
            )
        stop_left_behind(steps.client, init.instance)
        return _Delegating(
            steps,
            retries=RetryMode.ENABLED,
            check_step_health_interval_seconds=_CHECK_EVERY_SECONDS,
            should_verify_step=True,
        )

    return ray


class _Delegating(StepDelegatingExecutor):
    """Starts a step a job, and looks after them."""

    def log_failure_or_retry_event_after_error(
        self,
        step_context: IStepContext,
        err_info: SerializableErrorInfo,
        known_state: KnownExecutionState,
    ) -> DagsterEvent:
        """Let a shard whose job was lost be tried once more; any other step has failed."""
        step = step_context.step.key
        tried = known_state.get_retry_state().get_attempt_count(step)
        if tried or not step.startswith(_SHARD):
            return super().log_failure_or_retry_event_after_error(
                step_context, err_info, known_state
            )
        again = StepRetryData(error=err_info, seconds_to_wait=RETRY_AFTER_SECONDS)
        return DagsterEvent.step_retry_event(step_context, again)


class _Steps(RayStepHandler):
    """dagster-ray's way to start, look after and end a step, with a GPU for those that use one."""

    def __init__(self, address: str, home: Path, *, alone: bool = True) -> None:
        # Whoever sees the dashboard sees these: secrets are to be in the nodes' own environment.
        chosen = {k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT_PREFIX)}
        super().__init__(
            client=_ClientOfProject(address, home),
            env_vars=None,
            runtime_env={"env_vars": {**chosen, "DAGSTER_HOME": str(home)}},
            num_cpus=_CORES,
            num_gpus=None,
            memory=None,
            resources=None,
        )
        self._address, self._alone = address, alone
        self._checked = self._has_gpus = False
        self._silent_since: dict[str, float] = {}  # by job
        self._hung: tuple[float, OSError] | None = None

    def launch_step(self, step_handler_context: StepHandlerContext) -> Iterator[DagsterEvent]:
        """Start a step, on GPUs if it is in the pool of those and there are any, or were."""
        key = self._get_step_key(step_handler_context)
        context = step_handler_context.get_step_context(key)
        config = ResolvedRunConfig.build(context.job.get_definition(), context.run_config)
        settings = config.resources["settings"].config
        most = answered(lambda: most_gpus(self._address))
        if not self._checked or key == _TRAINING:
            self.check(settings, most)
        wanted = self.wants_gpu(settings["device"], most)
        count = settings["training"]["processes"] if key == _TRAINING else 1
        self.num_gpus = count if wanted and context.step.pool == "gpu" else None
        if context.step.pool == "gpu" and not wanted:
            device = settings["device"]
            context.log.info(f"{key} gets no GPU: device is {device}, and the cluster has {most}")
        yield from super().launch_step(step_handler_context)

    def wants_gpu(self, device: str, most: int) -> bool:
        """Say whether a step is for a GPU, where a node of the cluster has `most` of them now.

        Once there were any, a step waits until there are others: a CPU would give other bytes.
        """
        self._has_gpus |= most > 0
        return device == "cuda" or (device == "auto" and self._has_gpus)

    def check(self, settings: Mapping[str, Any], most: int) -> None:
        """Refuse what cannot end well, before the first step and before training."""
        self._checked = True
        together = settings["training"]["processes"]
        if settings["device"] == "auto" and together > most > 0:
            raise dg.Failure(
                f"training.processes: {together} processes want a GPU each of one machine, and "
                f"none of the cluster has more than {most}.",
                allow_retries=False,
            )
        if not self._alone and not settings["tracking"]["uri"]:
            raise dg.Failure(
                "executor: ray on other machines needs tracking.uri, the address of an MLflow "
                "server: without one, all write to one SQLite file, which is for one machine.",
                allow_retries=False,
            )

    def terminate_step(self, step_handler_context: StepHandlerContext) -> Iterator[DagsterEvent]:
        """Stop a step's job, unless it never was one; of several, all are tried."""
        try:
            yield from super().terminate_step(step_handler_context)
        except _NO_ANSWER as error:
            if not _says_unknown(error):
                key = self._get_step_key(step_handler_context)
                log = step_handler_context.get_step_context(key).log
                log.warning(f"{key} could not be stopped, and may still run: {error}")

    def check_step_health(self, step_handler_context: StepHandlerContext) -> CheckStepHealthResult:
        """Say whether a step's job is there and goes on; one that somebody stopped does not."""
        return self.health_of(self._get_ray_job_submission_id(step_handler_context))

    def health_of(self, job: str) -> CheckStepHealthResult:
        """Say whether a job goes on.

        A dashboard that gives no answer says nothing of the job: its error, which Dagster notes in
        the run's log, is raised until it has been silent for `_MOST_SILENCE_SECONDS`.
        """
        now = monotonic()
        if self._hung and now - self._hung[0] < _CHECK_EVERY_SECONDS:
            # Were each job to wait for a dashboard that hangs, a look at all could take an hour.
            return self._unanswered(job, now, self._hung[1])
        try:
            found = self.client.get_job_info(job)
        except _NO_ANSWER as error:
            if _says_unknown(error):
                return CheckStepHealthResult.unhealthy(reason=f"Ray knows no job {job}.")
            if isinstance(error, OSError):
                self._hung = monotonic(), error
            return self._unanswered(job, now, error)
        self._hung = None
        self._silent_since.pop(job, None)
        if found.status in (JobStatus.FAILED, JobStatus.STOPPED):
            reason = f"Ray's job {job} is {found.status}: {found.message}"
            return CheckStepHealthResult.unhealthy(reason=reason)
        return CheckStepHealthResult.healthy()

    def _unanswered(self, job: str, now: float, error: Exception) -> CheckStepHealthResult:
        """Take a job for lost of which nothing has been heard for long; else raise."""
        if now - self._silent_since.setdefault(job, now) < _MOST_SILENCE_SECONDS:
            raise error
        reason = f"Ray's dashboard gave no answer for {_MOST_SILENCE_SECONDS} s: {error}"
        return CheckStepHealthResult.unhealthy(reason=reason)


def stop_left_behind(client: JobSubmissionClient, instance: dg.DagsterInstance) -> None:
    """Stop the jobs of this instance's runs that have ended, and wait until they have.

    Those of a run whose own process was killed go on without it, and hold the project's lock.
    """
    end_lost_runs(instance, on_server=False)
    left = []
    for job in answered(client.list_jobs):
        name, run_id = job.submission_id, (job.metadata or {}).get(_RUN_OF_JOB)
        if job.status.is_terminal() or not (name and run_id):
            continue
        run = instance.get_run_by_id(run_id)
        if run and run.is_finished:
            instance.report_engine_event(f"Stopping Ray job {name}, which was left behind.", run)
            answered(partial(client.stop_job, name))
            left.append(name)
    until = monotonic() + _MOST_SILENCE_SECONDS
    while left := [job for job in left if _goes_on(client, job)]:
        if monotonic() > until:
            raise dg.Failure(
                f"executor: ray: jobs of earlier runs do not stop ({', '.join(left)}): end them in "
                "Ray's dashboard, as they hold the project.",
                allow_retries=False,
            )
        sleep(1)


def _goes_on(client: JobSubmissionClient, job: str) -> bool:
    try:
        return not answered(partial(client.get_job_status, job)).is_terminal()
    except RuntimeError as error:
        if _says_unknown(error):
            return False
        raise


def answered(ask: Callable[[], Answer]) -> Answer:
    """Ask a dashboard until it answers; raise its error after `_MOST_SILENCE_SECONDS`."""
    began = monotonic()
    while True:
        try:
            return ask()
        except _NO_ANSWER as error:
            refused = "status code 4" in str(error)
            if refused or monotonic() - began >= _MOST_SILENCE_SECONDS:
                raise
            sleep(_CHECK_EVERY_SECONDS)


def _says_unknown(error: BaseException) -> bool:
    return "status code 404" in str(error)


def most_gpus(address: str) -> int:
    """Return how many GPUs that node has which has the most of them now."""
    totals = [node.resources_total or {} for node in _nodes(address)]
    return int(max((total.get("GPU", 0) for total in totals), default=0))


def _nodes(address: str) -> list[Any]:
    """Return what Ray says of the nodes that are there now."""
    found = list_nodes(
        address,
        filters=[("state", "=", "ALIVE")],
        limit=_MOST_NODES,
        raise_on_missing_output=False,  # Ray's count holds a node that was lost, its list does not
    )
    return list(found)


def _own_addresses() -> set[str]:
    return {one.address for of_card in psutil.net_if_addrs().values() for one in of_card}


class _ClientOfProject(JobSubmissionClient):
    """Runs `dagster` in the project's folder, as Dagster's paths are relative, by this Python.

    Each step computes with as many threads as it would here, all cores of its node if nothing says
    otherwise: Ray would have it use as many as it reserves, and threads change bytes.
    """

    def __init__(self, address: str, home: Path) -> None:
        super().__init__(address)
        self._home = home

    def _do_request(self, method: str, endpoint: str, **how: Any) -> Any:
        # Ray's own would wait for ever for a dashboard that hangs.
        return super()._do_request(method, endpoint, **{"timeout": _ANSWER_SECONDS, **how})

    def submit_job(self, *, entrypoint: str, **how: Any) -> str:
        """Start a job; returns its id."""
        assert entrypoint.startswith("dagster ")  # a module, too
        there, python = shlex.quote(str(self._home)), shlex.quote(sys.executable)
        chosen = os.environ.get(_THREADS)
        threads = f"{_THREADS}={chosen}" if chosen else f"-u {_THREADS}"
        command = f"cd {there} && exec env {threads} {python} -m {entrypoint}"

        def submit() -> str:
            try:
                return super(_ClientOfProject, self).submit_job(entrypoint=command, **how)
            except RuntimeError as error:
                if "already exists" in str(error):  # its answer was lost
                    return str(how["submission_id"])
                raise

        return answered(submit)
