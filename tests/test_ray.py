"""Promise: the same definitions on a Ray cluster give the same bytes, whichever node is lost."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import chdir, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar, NamedTuple

import dagster as dg
import psutil
import pytest
import ray
import yaml
from conftest import free_port, quick_settings, runs, tiny_editor, wait_for
from ray._private.node import Node
from ray.cluster_utils import Cluster
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_actors
from test_executors import WAYS, inputs, made, plain, tars_in, tars_of

from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.orchestration import ray_cluster
from diffusemix_pipeline.orchestration.launch import prepare_instance, run_here
from diffusemix_pipeline.orchestration.ray_cluster import (
    _Steps,
    answered,
    most_gpus,
    stop_left_behind,
)
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings

__all__ = ["inputs", "plain"]  # fixtures
pytestmark = pytest.mark.slow
SHARD = "generated_images.edit_shard["
NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that takes no step, and two nodes, each with processes of its own.

    Each says that it has a core and a GPU, of which Ray then knows; nothing uses one.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # tests tell nobody
    port = free_port()
    started = Cluster(
        initialize_head=True,
        head_node_args={**NODE, "num_cpus": 0, "include_dashboard": True, "dashboard_port": port},
    )
    started.dashboard = f"http://127.0.0.1:{port}"
    for _ in range(2):
        started.add_node(**NODE, num_gpus=1)
    yield started
    started.shutdown()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_editor(tmp_path_factory.mktemp("editor"))


def wanted(weights: Path, *overrides: str) -> Settings:
    """Return settings under which a shard is at work for a while, on many batches."""
    slow = ["editing.batch_size=2", "editing.steps=60", "editing.copies=3", "storage.format=tar"]
    return quick_settings(f"editing.editor={weights}", "device=auto", *slow, *overrides)


@pytest.fixture(scope="module")
def undisturbed(weights, tmp_path_factory) -> dict[str, str]:
    """The data and weights that one process makes."""
    project = Project(tmp_path_factory.mktemp("undisturbed"))
    assert run_here(project, wanted(weights), silent).success
    return digests(project)


def digests(project: Project) -> dict[str, str]:
    """Return what all data and weights hash to."""
    files = [*project.data.rglob("*"), *project.checkpoints.rglob("*.safetensors")]
    return {
        path.relative_to(project.root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
        if path.is_file()
    }


def start_on_ray(project: Project, settings: Settings, cluster: Cluster) -> subprocess.Popen:
    """Start a run of all steps on the cluster, two at once."""
    settings_file = project.root / "diffusemix.yaml"
    settings_file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    prepare_instance(project)
    with chdir(project.root), dg.DagsterInstance.get() as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 2)
    target = ["-m", "diffusemix_pipeline.definitions", "-j", "diffusemix"]
    return subprocess.Popen(
        [sys.executable, "-m", "dagster", "job", "execute", *target],
        cwd=project.root,
        env=os.environ | {"DAGSTER_HOME": str(project.root), "RAY_ADDRESS": cluster.dashboard},
    )


def shard_at_work(client: JobSubmissionClient) -> JobDetails | None:
    """Return a job that edits a shard now, if there is one."""
    for job in client.list_jobs():
        step = (job.metadata or {}).get("dagster/op", "")
        if job.status == JobStatus.RUNNING and step.startswith(SHARD):
            return job
    return None


def shards(project: Project) -> list[psutil.Process]:
    """Return the processes that edit shards of a project now, wherever on the cluster."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone by now
            of = process.environ()
            step = of.get("DAGSTER_RUN_STEP_KEY", "")
            of_project = of.get("DAGSTER_HOME") == str(project.root) and step.startswith(SHARD)
            if of_project and "execute_step" in process.cmdline():  # Ray's has its environment
                found.append(process)
    return found


def suspended(project: Project, run: subprocess.Popen) -> list[psutil.Process]:
    """Suspend what edits shards, once it has made edits, or it may end while Ray is asked of it."""
    store = EditStore(project.edits)
    wait_for(lambda: run.poll() is not None or bool(shards(project)))
    by_pilot = len(set(store))
    wait_for(lambda: run.poll() is not None or len(set(store)) > by_pilot)
    at_work = shards(project)
    for process in at_work:
        process.suspend()
    return at_work


def times_made(project: Project) -> Counter[str]:
    """Count how often each edit was made: the store notes it every time, and keeps the first."""
    lines = (line for file in (project.edits / "records").glob("*.jsonl") for line in file.open())
    return Counter(json.loads(line)["key"] for line in lines)


def lose(cluster: Cluster, node: Node) -> None:
    """Kill -9 all processes of a node, with the steps that it runs."""
    own = [started.process.pid for kind in node.all_processes.values() for started in kind]
    steps = [child for pid in own for child in psutil.Process(pid).children(recursive=True)]
    cluster.remove_node(node, allow_graceful=False)
    for step in steps:
        with suppress(psutil.NoSuchProcess):
            step.kill()


def reserved_gpus(client: JobSubmissionClient, dashboard: str, run: str) -> dict[str, set[float]]:
    """Return how many GPUs each step of a run reserved, each time that it was started."""
    steps = {
        f"_ray_internal_job_actor_{job.submission_id}": job.metadata["dagster/op"]
        for job in client.list_jobs()
        if job.metadata and job.metadata["dagster/run-id"] == run
    }
    reserved: dict[str, set[float]] = {}
    for actor in list_actors(dashboard, detail=True, limit=1000):
        if step := steps.get(actor.name or ""):
            reserved.setdefault(step, set()).add(actor.required_resources.get("GPU", 0))
    return reserved


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_500_images_are_made_on_a_cluster(cluster, plain, inputs, way, tmp_path):
    address = cluster.dashboard
    assert made(tmp_path, inputs, "executor=ray", *WAYS[way], RAY_ADDRESS=address) == plain
    assert tars_in(tmp_path) == tars_of(way)


@pytest.mark.timeout(1800)
def test_a_run_stops_what_a_killed_one_left_on_the_cluster(cluster, undisturbed, weights, tmp_path):
    project, client = Project(tmp_path), JobSubmissionClient(cluster.dashboard)
    asked = wanted(weights, "executor=ray")
    (tmp_path / "diffusemix.yaml").write_text(yaml.safe_dump(asked.model_dump(mode="json")))
    command = [str(Path(sys.executable).with_name("diffusemix")), "run"]
    how = {"cwd": tmp_path, "env": os.environ | {"RAY_ADDRESS": cluster.dashboard}}
    killed = subprocess.Popen(command, **how)
    try:
        suspended(project, killed)
        left = shard_at_work(client)
        assert left is not None
    finally:
        killed.kill()
        killed.wait()
    assert subprocess.run(command, check=False, **how).returncode == 0
    assert digests(project) == undisturbed
    assert client.get_job_status(left.submission_id) == JobStatus.STOPPED
    assert [run.status for run in runs(project)] == [
        dg.DagsterRunStatus.SUCCESS,
        dg.DagsterRunStatus.FAILURE,
    ]


@pytest.mark.timeout(1800)
def test_a_lost_node_costs_its_unfinished_batches_alone(cluster, undisturbed, weights, tmp_path):
    project = Project(tmp_path)
    store, client = EditStore(project.edits), JobSubmissionClient(cluster.dashboard)
    running = start_on_ray(project, wanted(weights, "executor=ray", "editing.shards=2"), cluster)
    try:
        at_work = suspended(project, running)
        job = shard_at_work(client)
        assert job is not None
        assert job.metadata is not None
        before = set(store)
        assert len(before) < 60
        [node] = [node for node in cluster.worker_nodes if node.node_id == job.driver_node_id]
        lose(cluster, node)
        for shard in at_work:
            with suppress(psutil.NoSuchProcess):
                shard.resume()
        assert running.wait() == 0
    finally:
        running.kill()
    assert digests(project) == undisturbed
    made = times_made(project)
    assert before
    assert {made[key] for key in before} == {1}, "what was stored was made again"
    assert made.total() <= len(set(store)) + 2, "more than a batch was made again"
    with chdir(project.root), dg.DagsterInstance.get() as instance:
        [run] = instance.get_runs()
        started_anew = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_RESTARTED)
    assert [entry.step_key for entry in started_anew] == [job.metadata["dagster/op"]]
    gpus = reserved_gpus(client, cluster.dashboard, run.run_id)
    for step in (f"{SHARD}shard_0]", f"{SHARD}shard_1]", "trained_classifier", "robustness_report"):
        assert gpus[step] == {1}
    assert gpus["raw_dataset"] == gpus["hybrid_images"] == {0}


class Dashboard(BaseHTTPRequestHandler):
    """Answers as Ray's does, and of each job what the test says: a status code and a document."""

    said: tuple[int, dict[str, str]]
    broken = 0
    """How often more it says that it is not at home."""

    jobs: ClassVar[list[dict]] = []
    stopped: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        if self.path == "/api/version":
            code = 200
            document = {"version": "4", "ray_version": ray.__version__, "ray_commit": ""}
        elif self.path == "/api/jobs/":
            code, document = 200, Dashboard.jobs
        else:
            code, document = self.said
        if Dashboard.broken:
            Dashboard.broken -= 1
            code, document = 503, {}
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    posted: ClassVar[list[tuple[int, str]]] = []
    """What it says to jobs that are sent to it, one after the other."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/stop"):
            Dashboard.stopped.append(self.path.split("/")[-2])
            code, words = 200, '{"stopped": true}'
        else:
            code, words = Dashboard.posted.pop(0)
        self.send_response(code)
        self.end_headers()
        self.wfile.write(words.encode())

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def steps(tmp_path) -> Iterator[_Steps]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield _Steps(f"http://127.0.0.1:{server.server_port}", tmp_path)
        server.shutdown()


def job_that(status: str) -> dict[str, str]:
    return {"type": "SUBMISSION", "status": status, "entrypoint": "dagster", "message": "as told"}


@pytest.mark.parametrize(
    ("code", "document", "reason"),
    [
        (200, job_that("RUNNING"), None),
        (200, job_that("PENDING"), None),
        (200, job_that("SUCCEEDED"), None),
        (200, job_that("FAILED"), "is FAILED: as told"),
        (200, job_that("STOPPED"), "is STOPPED: as told"),
        (404, {}, "Ray knows no job step-1"),
    ],
)
def test_a_job_that_ended_before_its_step_is_told(steps, code, document, reason):
    Dashboard.said = code, document
    found = steps.health_of("step-1")
    assert found.is_healthy == (reason is None)
    assert (reason or "") in (found.unhealthy_reason or "")


def test_a_dashboard_that_gives_no_answer_for_a_while_loses_no_step(steps, monkeypatch):
    clock = [0]
    monkeypatch.setattr(ray_cluster, "monotonic", lambda: clock[0])

    def says_nothing(job: str) -> None:
        with pytest.raises(RuntimeError, match="status code 500"):
            steps.health_of(job)

    Dashboard.said = 500, {}
    for clock[0] in (0, 10, 599):
        says_nothing("step-1")
    Dashboard.said = 200, job_that("RUNNING")
    assert steps.health_of("step-2").is_healthy
    clock[0] = 700
    assert steps.health_of("step-1").is_healthy
    Dashboard.said = 500, {}
    says_nothing("step-1")
    clock[0] = 1300
    assert "no answer for 600 s" in (steps.health_of("step-1").unhealthy_reason or "")
    says_nothing("step-2")


def test_a_dashboard_that_hangs_is_asked_once_a_look(steps, monkeypatch):
    clock, asked = [0], []
    monkeypatch.setattr(ray_cluster, "monotonic", lambda: clock[0])

    def hang(job: str) -> None:
        asked.append(job)
        clock[0] += 60
        raise OSError("timed out")

    monkeypatch.setattr(steps.client, "get_job_info", hang)
    for _ in range(9):  # looks at all jobs, 70 s each
        for job in ("step-1", "step-2", "step-3"):
            with pytest.raises(OSError, match="timed out"):
                steps.health_of(job)
        clock[0] += 10
    assert asked == ["step-1"] * 9
    for job in ("step-1", "step-2", "step-3"):
        assert "no answer for 600 s" in (steps.health_of(job).unhealthy_reason or "")
    assert asked == ["step-1"] * 10


def test_a_step_that_was_sent_to_a_dashboard_in_trouble_is_sent_again(steps, monkeypatch):
    monkeypatch.setattr(ray_cluster, "sleep", lambda seconds: None)
    Dashboard.posted = [(503, "away"), (400, "Job with submission_id step-1 already exists.")]
    assert steps.client.submit_job(entrypoint="dagster api", submission_id="step-1") == "step-1"
    Dashboard.posted = [(400, "no such environment")]
    with pytest.raises(RuntimeError, match="no such environment"):
        steps.client.submit_job(entrypoint="dagster api", submission_id="step-1")


def test_jobs_of_runs_that_ended_are_stopped_and_no_others(steps):
    with dg.DagsterInstance.ephemeral() as instance:
        ended, at_work = (
            instance.add_run(dg.DagsterRun(job_name="diffusemix", status=status)).run_id
            for status in (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.STARTED)
        )
        Dashboard.jobs = [
            job_that(status) | {"submission_id": name, "metadata": {"dagster/run-id": run}}
            for name, run, status in (
                ("left", ended, "RUNNING"),
                ("waits", ended, "PENDING"),
                ("over", ended, "SUCCEEDED"),
                ("another's", "0" * 36, "RUNNING"),
                ("at-work", at_work, "RUNNING"),
            )
        ]
        Dashboard.jobs.append(job_that("RUNNING") | {"submission_id": "by-hand", "metadata": None})
        Dashboard.stopped = []
        Dashboard.said = 200, job_that("STOPPED")
        stop_left_behind(steps.client, instance)
        assert Dashboard.stopped == ["left", "waits"]
        Dashboard.said = 404, {}  # it was there a moment ago
        stop_left_behind(steps.client, instance)


def test_a_step_waits_for_a_gpu_where_there_was_one(steps):
    assert not steps.wants_gpu("auto", most=0)
    assert steps.wants_gpu("cuda", most=0)
    assert steps.wants_gpu("auto", most=2)
    assert steps.wants_gpu("auto", most=0)
    assert not steps.wants_gpu("cpu", most=2)


def test_several_machines_without_an_mlflow_server_are_refused(steps, tmp_path):
    settings = quick_settings().model_dump()
    steps.check(settings, 0)
    spread = _Steps(steps.client._address, tmp_path, alone=False)
    with pytest.raises(dg.Failure, match="tracking.uri"):
        spread.check(settings, 0)
    spread.check(settings | {"tracking": {"uri": "http://mlflow"}}, 0)


def test_several_machines_with_a_database_for_one_are_refused(cluster, monkeypatch, project):
    monkeypatch.setenv("RAY_ADDRESS", cluster.dashboard)
    monkeypatch.delenv("DAGSTER_POSTGRES_URL", raising=False)
    monkeypatch.setattr(ray_cluster, "_nodes", lambda address: [Machine("192.0.2.7")])
    with pytest.raises(UserError, match="another machine .192.0.2.7. needs DAGSTER_POSTGRES_URL"):
        run_here(project, quick_settings("executor=ray"), silent)
    assert not project.data.exists()


def test_a_cluster_that_is_not_there_is_told_in_one_message(project, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="no cluster answers at RAY_ADDRESS=http://127.0.0.1:"):
        run_here(project, quick_settings("executor=ray"), silent)
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match="executor: ray needs RAY_ADDRESS"):
        run_here(project, quick_settings("executor=ray"), silent)
    assert not project.data.exists()
    assert [run.status for run in runs(project)] == [dg.DagsterRunStatus.FAILURE] * 2


def test_more_processes_than_a_node_has_gpus_are_refused_before_any_work(
    cluster, project, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", cluster.dashboard)
    together = "training.processes=2"
    outcome = run_here(project, quick_settings("executor=ray", "device=auto", together), silent)
    assert outcome.user_error
    assert "2 processes want a GPU each of one machine, and none" in outcome.problems[0]
    assert not project.data.exists()


def test_a_dashboard_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "_ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent_server:  # takes what comes, says nothing
        address = f"http://127.0.0.1:{silent_server.getsockname()[1]}"
        with pytest.raises(OSError, match="timed out"):
            _Steps(address, tmp_path)


def test_a_step_waits_for_a_dashboard_that_comes_back(steps, monkeypatch):
    Dashboard.broken = 2
    slept = []
    monkeypatch.setattr(ray_cluster, "sleep", slept.append)
    assert answered(steps.client.get_version) == "4"
    assert slept == [10, 10]
    clock = iter([0, 599, 600])
    monkeypatch.setattr(ray_cluster, "monotonic", lambda: next(clock))
    Dashboard.broken = 9
    with pytest.raises(RuntimeError, match="status code 503"):
        answered(steps.client.get_version)
    Dashboard.broken = 0


class Machine(NamedTuple):
    """A node of whose machine nothing else is known."""

    node_ip: str


def test_the_node_with_the_most_gpus_is_found(cluster):
    assert most_gpus(cluster.dashboard) == 1
