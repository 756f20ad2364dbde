"""Promise: with DAGSTER_POSTGRES_URL set, Dagster keeps everything in that PostgreSQL."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import dagster as dg
import pytest
from conftest import free_port, quick_settings, tiny_editor

from diffusemix_pipeline.orchestration.launch import prepare_instance, run_here
from diffusemix_pipeline.orchestration.storage import POSTGRES_URL
from diffusemix_pipeline.progress import silent

pytestmark = pytest.mark.slow


@pytest.fixture
def postgres(tmp_path) -> Iterator[str]:
    """Start a PostgreSQL of Debian's package on loopback; give its address."""
    [*_, binaries] = ["", *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    if not binaries:
        pytest.skip("PostgreSQL is not installed")
    home, port = tmp_path / "postgres", free_port()
    home.mkdir()
    # It refuses to run as root.
    who = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    if who:
        shutil.chown(home, **who)
        for folder in (tmp_path, *tmp_path.parents[:3]):
            folder.chmod(0o755) if folder.owner() == "root" and folder != Path("/tmp") else None
    subprocess.run(
        [binaries / "initdb", "-D", home, "-U", "team", "--auth=trust"],
        check=True,
        capture_output=True,
        **who,
    )
    options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={home}"]
    server = subprocess.Popen(
        [binaries / "postgres", "-D", home, "-p", str(port), *options],
        stderr=subprocess.DEVNULL,
        **who,
    )
    try:
        ready = [binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        while subprocess.run(ready, check=False).returncode:
            assert server.poll() is None
            time.sleep(0.2)
        yield f"postgresql://team@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(30)


def test_runs_and_events_lie_in_postgres(postgres, project, monkeypatch, tmp_path):
    monkeypatch.setenv(POSTGRES_URL, postgres)
    outcome = run_here(
        project, quick_settings(f"editing.editor={tiny_editor(tmp_path / 'editor')}"), silent
    )
    assert outcome.success, outcome.problems
    assert not (project.state / "dagster" / "storage").exists()
    with chdir(project.root), dg.DagsterInstance.get() as instance:
        [run] = instance.get_runs()
        assert run.run_id == outcome.run_id
        assert instance.get_latest_materialization_event(dg.AssetKey("champion"))
    monkeypatch.delenv(POSTGRES_URL)
    prepare_instance(project)
    with chdir(project.root), dg.DagsterInstance.get() as instance:
        assert instance.get_runs() == []  # SQLite again
