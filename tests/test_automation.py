"""Promises: staleness follows bytes, sensors ask for one run a change, a failure is told."""

import json
import os
import sqlite3
import subprocess
import threading
import time
from contextlib import chdir
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import dagster as dg
import pytest
from conftest import ASSETS, picture, quick_settings, tiny_editor, write_classes
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.definitions.observe import observe
from dagster._core.events import EngineEventData
from dagster._core.loader import LoadingContext

from diffusemix_pipeline.datasets.manifest import read_stage
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.orchestration import automation
from diffusemix_pipeline.orchestration.build import build_definitions
from diffusemix_pipeline.orchestration.launch import run_here
from diffusemix_pipeline.orchestration.lost_runs import PROCESS_TAG
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.settings import Settings
from diffusemix_pipeline.tracking import open_tracking


class Loading(LoadingContext):
    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance, self._loaders = instance, {}

    @property
    def instance(self) -> dg.DagsterInstance:
        return self._instance

    @property
    def loaders(self) -> dict:
        return self._loaders


@pytest.fixture
def weights(tmp_path) -> Path:
    return tiny_editor(tmp_path / "editor")


@pytest.fixture
def source(tmp_path) -> Path:
    return write_classes(tmp_path / "photos", ["cat", "dog"], 8)


@pytest.fixture
def settings(source) -> Settings:
    return quick_settings(
        f"source.path={source}", "source.val_fraction=0.2", "source.test_fraction=0.2"
    )


def stale(definitions: dg.Definitions, instance: dg.DagsterInstance) -> list[str]:
    """Return the assets that the UI shows as unsynced."""
    graph = definitions.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, Loading(instance))
    return [name for name in ASSETS if resolver.get_status(dg.AssetKey(name)).name == "STALE"]


def make(definitions: dg.Definitions, instance: dg.DagsterInstance, *names: str) -> None:
    """Materialize assets; no names: all."""
    job = definitions.resolve_implicit_global_asset_job_def()
    selected = [dg.AssetKey(name) for name in names] or None
    assert job.execute_in_process(instance=instance, asset_selection=selected).success


def make_raw(definitions: dg.Definitions, instance: dg.DagsterInstance) -> None:
    make(definitions, instance, "raw_dataset")


def look(definitions: dg.Definitions, instance: dg.DagsterInstance) -> None:
    assets = definitions.resolve_asset_graph().assets_defs
    [source_images] = [one for one in assets if dg.AssetKey("source_images") in one.keys]
    assert observe([source_images], instance=instance).success


def test_a_changed_byte_makes_all_stale_and_a_touched_file_nothing(project, source, weights):
    settings = quick_settings(f"source.path={source}", f"editing.editor={weights}")
    definitions = build_definitions(project, settings)
    with dg.DagsterInstance.ephemeral() as instance:
        make(definitions, instance)  # nobody has observed the source before
        look(definitions, instance)
        assert stale(definitions, instance) == []
        image = next(source.rglob("*.png"))
        os.utime(image, (0, 0))
        image.write_bytes(image.read_bytes())
        look(definitions, instance)
        assert stale(definitions, instance) == []
        picture(99).save(image)
        look(definitions, instance)
        assert stale(definitions, instance) == ASSETS
        make_raw(definitions, instance)
        look(definitions, instance)
        assert stale(definitions, instance) == ASSETS[1:]


class Sensor:
    """A sensor that is ticked as its daemon does: the cursor is all that is kept."""

    def __init__(self, definitions: dg.Definitions, name: str) -> None:
        self.definition, self.cursor = definitions.resolve_sensor_def(name), None

    def tick(self) -> list[dg.RunRequest] | str:
        """Return the runs that are asked for, or why there are none."""
        with dg.DagsterInstance.ephemeral() as instance:
            context = dg.build_sensor_context(instance=instance, cursor=self.cursor)
            tick = self.definition.evaluate_tick(context)
        self.cursor = tick.cursor
        return tick.run_requests or tick.skip_message


def test_new_images_ask_for_one_run_once_they_stay_as_they_are(project, source, settings):
    definitions = build_definitions(project, settings)
    sensor = Sensor(definitions, "new_images")
    assert "waiting" in sensor.tick()
    [request] = sensor.tick()
    assert "new or changed" in request.tags["diffusemix/why"]
    assert "Nothing changed" in sensor.tick()  # whatever became of that run
    with dg.DagsterInstance.ephemeral() as instance:
        make_raw(definitions, instance)
    for number in range(10):
        picture(100 + number).save(source / "cat" / f"new-{number}.png")
        if number == 5:
            assert "waiting" in sensor.tick()  # they are still being copied
    assert "waiting" in sensor.tick()
    [other] = sensor.tick()
    assert request.run_key is other.run_key is None  # or Dagster would not run a key again
    assert "Nothing changed" in sensor.tick()


def test_images_that_come_go_and_come_again_are_asked_for_each_time(project, source, settings):
    definitions = build_definitions(project, settings)
    with dg.DagsterInstance.ephemeral() as instance:
        make_raw(definitions, instance)
    sensor = Sensor(definitions, "new_images")
    aside, there = project.root / "new.png", source / "cat" / "new.png"
    picture(100).save(aside)
    for before, after in ((aside, there), (there, aside), (aside, there)):
        before.rename(after)  # which keeps its time
        assert "waiting" in sensor.tick()
        [request] = sensor.tick()
        assert request.run_key is None
        with dg.DagsterInstance.ephemeral() as instance:
            make_raw(definitions, instance)


def test_the_same_bytes_again_ask_for_no_run(project, source, settings):
    definitions = build_definitions(project, settings)
    with dg.DagsterInstance.ephemeral() as instance:
        make_raw(definitions, instance)
    sensor = Sensor(definitions, "new_images")
    assert "waiting" in sensor.tick()
    assert "same bytes" in sensor.tick()  # of what the last run read
    for image in source.rglob("*.png"):
        os.utime(image, (0, 0))
    assert "waiting" in sensor.tick()
    assert "same bytes" in sensor.tick()
    assert "Nothing changed" in sensor.tick()


def test_a_folder_that_is_gone_fails_the_tick_by_name(project, source, settings):
    sensor = Sensor(build_definitions(project, settings), "new_images")
    source.rename(source.with_name("elsewhere"))
    with pytest.raises(UserError, match=f"source.path: the folder {source} does not exist"):
        sensor.tick()


def test_another_data_dvc_in_git_asks_for_one_run(project):
    def git(*command: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *command], cwd=project.root, check=True, capture_output=True)

    def commit(md5: str) -> None:
        pin.write_text(f"outs:\n- md5: {md5}\n  path: data\n")
        git("add", "data.dvc")
        git("commit", "-m", md5)

    pin = project.root / "data.dvc"
    sensor = Sensor(build_definitions(project, quick_settings("source.path=''")), "new_data")
    assert "no data.dvc" in sensor.tick()
    git("init")
    commit("1" * 32 + ".dir")
    [request] = sensor.tick()
    assert "1" * 32 in request.tags["diffusemix/why"]
    assert "was made from" in sensor.tick()
    pin.write_text("outs:\n- md5: " + "3" * 32 + ".dir\n  path: data\n")  # as a run leaves it
    assert "not as it is committed" in sensor.tick()
    commit("2" * 32 + ".dir")
    assert len(sensor.tick()) == 1
    project.state.mkdir()
    commit("3" * 32 + ".dir")
    (project.state / "data_version").write_text("3" * 32 + ".dir")
    assert "was made from" in sensor.tick()  # a run here made it, and a person committed it


def test_a_run_whose_process_is_gone_is_ended_and_a_living_one_is_not(project):
    definitions = build_definitions(project, quick_settings())

    def started_by_a_server(instance: dg.DagsterInstance, pid: int) -> str:
        run = dg.DagsterRun(job_name="diffusemix", status=dg.DagsterRunStatus.STARTED)
        instance.add_run(run)
        instance.report_engine_event("Started process", run, EngineEventData.in_process(pid))
        return run.run_id

    dead = subprocess.Popen(["true"])
    dead.wait()
    with dg.DagsterInstance.ephemeral() as instance:
        lost = started_by_a_server(instance, dead.pid)
        alive = started_by_a_server(instance, os.getpid())
        elsewhere = dg.DagsterRun(  # on the command line of another machine
            job_name="diffusemix",
            status=dg.DagsterRunStatus.STARTED,
            tags={PROCESS_TAG: "elsewhere 1 1"},
        )
        instance.add_run(elsewhere)
        gone = EngineEventData.in_process(dead.pid)
        instance.report_engine_event("Executing steps in process", elsewhere, gone)
        young = dg.DagsterRun(job_name="diffusemix", status=dg.DagsterRunStatus.STARTING)
        instance.add_run(young)  # it has not said which process it is
        instance.add_run(dg.DagsterRun(job_name="diffusemix"))  # not launched yet
        context = dg.build_sensor_context(instance=instance)
        tick = definitions.resolve_sensor_def("lost_runs").evaluate_tick(context)
        assert lost in tick.skip_message
        ended = {run.run_id for run in instance.get_runs() if run.is_finished}
        assert ended == {lost}
        assert not instance.get_run_by_id(alive).is_finished


def test_a_failed_run_is_told_in_the_log_and_to_the_webhook(project, monkeypatch, caplog):
    heard = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args) -> None:
            pass

    definitions = build_definitions(project, quick_settings("source.path=/nowhere"))
    with dg.DagsterInstance.ephemeral() as instance, HTTPServer(("127.0.0.1", 0), Hook) as hook:
        threading.Thread(target=hook.serve_forever, daemon=True).start()
        monkeypatch.setenv(automation.WEBHOOK, f"http://127.0.0.1:{hook.server_port}/secret")
        job = definitions.resolve_job_def("diffusemix")
        failed = job.execute_in_process(instance=instance, raise_on_error=False)
        [event] = [e for e in failed.all_events if e.event_type_value == "PIPELINE_FAILURE"]
        context = dg.build_run_status_sensor_context(
            sensor_name="failed_runs",
            dagster_event=event,
            dagster_instance=instance,
            dagster_run=failed.dagster_run,
        ).for_run_failure()
        automation.failed_runs(context)
        hook.shutdown()
    [told] = heard
    assert told["run_id"] == failed.run_id
    assert "raw_dataset" in told["text"]
    assert "/nowhere" in told["text"]


def test_a_run_that_tells_nothing_for_an_hour_is_told_of_once(project, capfd):
    def started(instance: dg.DagsterInstance, *hours_ago: float) -> str:
        run = dg.DagsterRun(job_name="diffusemix")
        instance.add_run(run)
        kinds = [dg.DagsterEventType.RUN_START] + [dg.DagsterEventType.ENGINE_EVENT] * 9
        for kind, hours in zip(kinds, hours_ago, strict=False):
            data = EngineEventData() if kind == dg.DagsterEventType.ENGINE_EVENT else None
            event = dg.DagsterEvent(kind.value, "diffusemix", event_specific_data=data)
            logged = dg.EventLogEntry(
                None, "info", "", run.run_id, time.time() - 3600 * hours, dagster_event=event
            )
            instance.handle_new_event(logged)
        return run.run_id

    sensor = build_definitions(project, quick_settings()).resolve_sensor_def("silent_runs")
    with dg.DagsterInstance.ephemeral() as instance:
        hangs = started(instance, 10, 2)
        started(instance, 10, 0.5)
        started(instance, 100, 4)  # a hundred hours of work are told of each two
        cursor = None
        for logged in (1, 0):
            context = dg.build_sensor_context(instance=instance, cursor=cursor)
            tick = sensor.evaluate_tick(context)
            assert tick.skip_message == f"Silent: {hangs}."
            said = capfd.readouterr().err
            assert said.count(f"run {hangs} of diffusemix has told nothing for 2.0 h") == logged
            cursor = tick.cursor


@pytest.mark.slow
def test_maintenance_counts_first_and_keeps_what_is_needed(project, settings, weights):
    settings = quick_settings(f"editing.editor={weights}", "keep_runs_days=1")
    for seed in (0, 1):
        assert run_here(project, settings.model_copy(update={"seed": seed}), silent).success
    job = build_definitions(project, settings).resolve_job_def("maintenance")
    store = EditStore(project.edits)
    for key in store:
        os.utime(store.path(key), (0, 0))
    edits = len(list(store))
    used = len(read_stage(project.generated).manifest())
    young = project.checkpoints / "c.begun"
    long_ago = datetime.now(UTC) - timedelta(days=2)
    with chdir(project.root), dg.DagsterInstance.get() as instance:
        [newest, older] = instance.get_runs()
        with sqlite3.connect(project.state / "dagster/storage/history/runs.db") as runs:
            runs.execute("UPDATE runs SET create_timestamp = ?", [f"{long_ago:%Y-%m-%d %H:%M:%S}"])

        def tidy(*, remove: bool) -> dict[str, int]:
            config = {"ops": {node.name: {"config": {"remove": remove}} for node in job.nodes}}
            done = job.execute_in_process(instance=instance, run_config=config)
            assert done.success
            return {
                event.node_name: event.step_output_data.metadata["count"].value
                for event in done.all_events
                if event.is_successful_output
            }

        tracker = open_tracking(project, settings.tracking)
        broken = tracker._client.create_run(tracker.experiment_id, start_time=1)
        tracker._client.set_terminated(broken.info.run_id, "FAILED")
        begun = [project.checkpoints / "a.begun", project.evidence / "b.begun", young]
        for path in begun:
            path.write_bytes(b"")
            os.utime(path, None if path == young else (0, 0))
        expected = {"dagster_runs": 1, "mlflow_runs": 1, "edits": edits - used, "begun": 2}
        assert list((project.state / "dagster").rglob(f"*{older.run_id}*"))
        assert edits > used
        assert tidy(remove=False) == expected
        assert len(list(store)) == edits
        assert tidy(remove=True) == expected
        assert len(list(store)) == used
        assert [path for path in begun if path.exists()] == [young]
        left = {run.run_id for run in instance.get_runs() if run.job_name == "diffusemix"}
        assert left == {newest.run_id}
        assert older.run_id not in left
        assert not list((project.state / "dagster").rglob(f"*{older.run_id}*"))
        assert tracker._client.get_run(broken.info.run_id).info.lifecycle_stage == "deleted"
    again = run_here(project, settings.model_copy(update={"seed": 1}), silent)
    assert again.reused
