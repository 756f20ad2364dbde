"""Promise: the built wheel, installed elsewhere, runs in an empty folder without git."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that knows nothing of this checkout; return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DAGSTER_HOME")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_an_empty_folder(tmp_path):
    uv = Path(sys.executable).parent / "uv"
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"]
    run(*build, cwd=ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size < 15_000_000
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    install = [uv, "pip", "install", "--quiet", "--python", python]
    run(*install, "--require-hashes", "-r", ROOT / "requirements.lock", cwd=tmp_path)
    run(*install, "--no-deps", wheel, cwd=tmp_path)

    project = tmp_path / "project"
    project.mkdir()
    printed = run(tmp_path / "venv" / "bin" / "diffusemix", "run", "--preset", "demo", cwd=project)
    assert "vanilla" in printed
    assert "diffusemix" in printed
    assert (project / "outputs" / "report" / "index.html").exists()
    assert (project / "data.dvc").exists()
    made = {path.name for path in project.iterdir()}
    expected = {"dagster.yaml", "workspace.yaml", "data", "data.dvc", "outputs"}
    assert made == {*expected, ".diffusemix", ".dvc", ".dvcignore"}
