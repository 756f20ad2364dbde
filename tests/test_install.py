"""Promises: the wheel runs in an empty folder without git; what is installed is what is locked."""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
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


def test_all_that_is_installed_is_compared_with_locked_hashes():
    files = [ROOT / "Makefile", ROOT / "deploy" / "Dockerfile", ROOT / ".ci" / "run"]
    files += sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    files += sorted((ROOT / "deploy").glob("*.sh"))
    lines = [line.strip() for file in files for line in file.read_text("utf-8").splitlines()]
    install = re.compile(r"pip3? install|uv (add|sync|tool)|\buvx\b|pip download|pipx")
    installs = [line for line in lines if install.search(line)]
    ours = [
        line for line in installs if line.endswith("--no-deps --no-build-isolation --editable .")
    ]
    assert len(ours) == 1
    assert len(installs) == 4  # uv, the lock, the project itself, what audits
    assert all("--require-hashes" in line for line in installs if line not in ours)
    for lock in (ROOT / "requirements.lock", ROOT / ".github" / "audit.lock"):
        named = re.split(r"\n(?=[^\s#])", lock.read_text("utf-8"))
        assert len(named) > 20
        assert all(re.match(r"\S+==\S+ .*\\\n    --hash=sha256:[0-9a-f]{64}", one) for one in named)


def test_what_audits_the_lock_runs_on_it():
    audit = (ROOT / ".github" / "workflows" / "audit.yml").read_text("utf-8")
    assert (
        "pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock" in audit
    )
    assert "schedule:" in audit


@pytest.mark.parametrize("changed", [False, True])
def test_a_package_that_was_changed_is_not_installed(changed, tmp_path):
    wheel = tmp_path / "shop" / "thing-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing.py", "")
        archive.writestr(
            "thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"
        )
        archive.writestr(
            "thing-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("thing-1.0.dist-info/RECORD", "")
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"thing==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    if changed:
        with zipfile.ZipFile(wheel, "a") as archive:
            archive.writestr("more.py", "")
    uv = Path(sys.executable).parent / "uv"
    where = [
        "--no-index",
        "--find-links",
        wheel.parent,
        "--no-cache",
        "--target",
        tmp_path / "there",
    ]
    done = subprocess.run(
        [uv, "pip", "install", "--python", sys.executable, "--require-hashes", *where, "-r", lock],
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) != changed, done.stderr
    assert ("Hash mismatch" in done.stderr) == changed
    assert (tmp_path / "there" / "thing.py").exists() != changed
