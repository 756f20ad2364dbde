"""Promises: what starts by itself runs, and CI hears how a run elsewhere ended.

Against one real webserver and daemon on loopback, with the script that the workflow runs.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import dagster as dg
import pytest
import yaml
from click.testing import CliRunner
from conftest import quick_settings, runs, serving, tiny_editor, wait_for, write_digits

from diffusemix_pipeline.cli import main
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.tracking import open_tracking

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "deploy" / "retrain.sh"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A project with digits in a folder that says which are for training."""
    project = Project(tmp_path_factory.mktemp("project"))
    photos = project.root / "photos"
    for split, (first, last) in {"train": (0, 300), "val": (300, 500), "test": (500, 600)}.items():
        write_digits(photos / split, first=first, last=last)
    settings = quick_settings(
        f"editing.editor={tiny_editor(tmp_path_factory.mktemp('editor'))}",
        f"source.path={photos}",
        "source.train_per_class=null",
        "training.arms=[vanilla]",
        "training.steps=120",
        "training.batch_size=32",
        "checks.val_accuracy=null",
        "retrain_cron='* * * * *'",
    )
    (project.root / "diffusemix.yaml").write_text(yaml.safe_dump(settings.model_dump()))
    return project


@pytest.fixture(scope="module")
def address(project) -> Iterator[str]:
    with serving(project, "ui") as address:
        yield address


def retrain(project: Project, address: str, settings: str = "") -> subprocess.CompletedProcess:
    """Run the workflow's step, as its runner would."""
    (project.root / "report.md").unlink(missing_ok=True)
    return subprocess.run(
        [SCRIPT],
        cwd=project.root,
        env=os.environ
        | {
            "BIN": str(Path(sys.executable).parent),
            "DAGSTER_URL": address,
            "SETTINGS": settings,
            "GITHUB_SHA": "c0ffee",
            "GITHUB_STEP_SUMMARY": str(project.root / "summary.md"),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def champion(project: Project) -> str | None:
    found = open_tracking(project, quick_settings().tracking).registered("champion")
    return found and found.version


def edits_made(project: Project, run_id: str) -> int:
    with chdir(project.root), dg.DagsterInstance.from_config(str(project.root)) as instance:
        records = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    [made] = [
        entry.asset_materialization.metadata["edits_made"].value
        for entry in records
        if entry.asset_materialization.asset_key == dg.AssetKey("generated_images")
    ]
    return made


def switch(project: Project, kind: str, action: str, name: str) -> None:
    """Turn a schedule or a sensor on or off, as its switch in the UI does."""
    subprocess.run(
        [sys.executable, "-m", "dagster", kind, action, name, "-w", "workspace.yaml"],
        cwd=project.root,
        env=os.environ | {"DAGSTER_HOME": str(project.root)},
        check=True,
        capture_output=True,
    )


def test_a_retraining_that_succeeds_leaves_a_report_and_a_champion(project, address):
    done = retrain(project, address)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = runs(project)
    assert f"{address}/runs/{run.run_id}" in done.stdout
    assert run.tags["git_sha"] == "c0ffee"
    assert 'Finished execution of step "trained_classifier"' in done.stdout
    assert done.stdout.count("STARTED") == 1
    report = (project.root / "report.md").read_text()
    assert "Vanilla" in report
    assert (project.root / "summary.md").read_text() == report
    assert champion(project) == "1"


def test_the_sensor_asks_for_one_run_that_edits_only_what_is_new(project, address):
    before = len(runs(project))
    switch(project, "sensor", "start", "new_images")
    time.sleep(70)  # two looks at what is known already
    assert len(runs(project)) == before
    write_digits(project.root / "photos" / "train", first=600, last=610)
    wait_for(lambda: len(runs(project)) > before)
    wait_for(lambda: runs(project)[0].is_finished)
    time.sleep(70)
    switch(project, "sensor", "stop", "new_images")
    assert len(runs(project)) == before + 1
    run = runs(project)[0]
    assert run.is_success
    assert "photos" in run.tags["diffusemix/why"]
    assert edits_made(project, run.run_id) == 10


def test_the_schedule_runs_by_itself(project, address):
    before = len(runs(project))
    switch(project, "schedule", "start", "retrain")
    wait_for(lambda: len(runs(project)) > before)
    switch(project, "schedule", "stop", "retrain")
    wait_for(lambda: all(run.is_finished for run in runs(project)))
    assert all(run.is_success for run in runs(project)[: len(runs(project)) - before])
    assert runs(project)[0].tags["dagster/schedule_name"] == "retrain"


def test_a_worse_model_and_a_sabotaged_one_fail_and_change_no_champion(project, address):
    kept = champion(project)
    worse = retrain(project, address, "training.steps=35 seed=1")
    assert worse.returncode == 3, worse.stdout + worse.stderr
    assert "Not promoted. " in worse.stderr
    assert (project.root / "report.md").exists()
    assert champion(project) == kept
    wrong = project.root / "wrong"
    write_digits(wrong, shuffled=True)
    sabotaged = retrain(project, address, f"source.path={wrong}")
    assert sabotaged.returncode == 1, sabotaged.stdout + sabotaged.stderr
    assert "val_accuracy_above_floor: The best val accuracy is" in sabotaged.stdout
    assert champion(project) == kept


def test_a_mistake_is_told_in_one_message(project, address):
    failed = retrain(project, address, "source.path=/nowhere")
    assert failed.returncode == 1
    assert "source.path: the folder /nowhere does not exist" in failed.stdout
    unknown = retrain(project, address, "editing.stepz=3")
    assert unknown.returncode == 2
    assert "stepz" in unknown.stderr
    away = retrain(project, "http://127.0.0.1:9")
    assert away.returncode == 2
    assert "No Dagster answers at http://127.0.0.1:9 (connection refused). Start" in away.stderr
    nothing = CliRunner().invoke(main, ["trigger", "--url", address, "--job", "nothing"])
    assert nothing.exit_code == 2
    assert "did not launch nothing" in nothing.output
