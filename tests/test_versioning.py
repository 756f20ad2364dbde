"""Versions of data/, on real DVC repositories with git, below a git tree's top, without git."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from diffusemix_pipeline import versioning
from diffusemix_pipeline.errors import UserError

TOP = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_dvc_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "dvc-state"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "dvc-global"))
    monkeypatch.delenv("GIT_DIR", raising=False)


def git(root: Path, *command: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    done = subprocess.run(["git", *who, *command], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dvc(root: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *command], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fill(root: Path, marker: str) -> dict[str, bytes]:
    """Write data/ as a stage does, by renaming a whole folder into place, and return its bytes."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    aside, stage = root / "aside", root / "data" / "raw"
    aside.mkdir()
    for name in ("same", "changing", marker):
        (aside / f"{name}.png").write_text("same" if name == "same" else f"{name} of {marker}")
    if stage.exists():
        stage.rename(root / "old")
    aside.rename(stage)
    shutil.rmtree(root / "old", ignore_errors=True)
    return content(root)


def content(root: Path) -> dict[str, bytes]:
    data = root / "data"
    return {str(f.relative_to(data)): f.read_bytes() for f in data.rglob("*") if f.is_file()}


def cached(root: Path) -> dict[int, bytes]:
    files = (root / ".dvc" / "cache" / "files").rglob("*")
    return {f.stat().st_ino: f.read_bytes() for f in files if f.is_file()}


def test_a_version_is_pinned_and_comes_back(tmp_path: Path) -> None:
    root = tmp_path
    git(root, "init", "--quiet")
    before = fill(root, "first")
    said: list[tuple[int, int]] = []

    first = versioning.snapshot(root, lambda _, done, total: said.append((done, total)))

    assert said == [(0, 2), (1, 2), (2, 2)]
    assert first.digest == versioning.pinned_digest(root)
    assert len(first.digest) == 36 and first.digest.endswith(".dir")
    assert first.note.startswith("no DVC remote is configured")
    assert "dvc remote add -d" in first.note
    inodes = {f.stat().st_ino for f in (root / "data").rglob("*.png")}
    assert inodes <= set(cached(root)), "data/ and the cache share bytes"
    kept, pin = cached(root), (root / "data.dvc").read_bytes()
    time_of_pin = (root / "data.dvc").stat().st_mtime_ns

    assert versioning.snapshot(root).digest == first.digest
    assert (root / "data.dvc").read_bytes() == pin
    assert (root / "data.dvc").stat().st_mtime_ns == time_of_pin

    fill(root, "second")
    assert versioning.snapshot(root).digest != first.digest
    assert kept.items() <= cached(root).items(), "replacing data/ leaves cached files intact"

    (root / "data.dvc").write_bytes(pin)
    assert versioning.pull(root) and content(root) == before, "a pin that is cached is followed"
    assert (root / "data.dvc").read_bytes() == pin


@pytest.mark.parametrize("place", ["folder of a git tree", "ignored by git"])
def test_any_folder_can_be_versioned(place: str, tmp_path: Path) -> None:
    root = tmp_path / "project"
    git(tmp_path, "init", "--quiet")
    if place == "ignored by git":
        (tmp_path / ".gitignore").write_text("/project\n")
    fill(root, "first")
    assert versioning.snapshot(root).digest == versioning.pinned_digest(root)
    if place == "folder of a git tree":
        untracked = git(root, "status", "--short", "--untracked-files=all", ".").split()
        assert "data.dvc" in untracked and not any("data/" in name for name in untracked)
    else:
        (tmp_path / ".gitignore").unlink()
        versioning.ensure_repository(root)
        assert "no_scm = false" in (root / ".dvc" / "config.local").read_text()


def test_a_clone_pulls_what_was_pushed(tmp_path: Path) -> None:
    root, clone, remote = tmp_path / "project", tmp_path / "clone", tmp_path / "remote"
    git(tmp_path, "init", "--quiet", "project")
    assert not versioning.pull(root)
    versioning.ensure_repository(root)
    dvc(root, "remote", "add", "-d", "store", str(remote))
    pushed = fill(root, "first")
    made = versioning.snapshot(root)
    assert made.note == "pushed to the DVC remote 'store'"
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    git(tmp_path, "clone", "--quiet", "project", "clone")

    assert versioning.pull(clone)
    assert content(clone) == pushed

    # A run killed half-way leaves newer files in data/: the same pin does not undo them.
    newer = fill(clone, "half-way")
    assert versioning.pull(clone) and content(clone) == newer

    # A new pin would: refused while data/ holds what no version holds, followed once it is saved.
    fill(root, "second")
    second = versioning.snapshot(root)
    shutil.copy(root / "data.dvc", clone / "data.dvc")
    with pytest.raises(UserError, match=r"(?s)checkout.*half-way\.png"):
        versioning.pull(clone)
    assert content(clone) == newer
    shutil.rmtree(clone / "data")
    assert versioning.pull(clone) and content(clone) == content(root)

    shutil.rmtree(remote)
    shutil.rmtree(clone / ".dvc" / "cache")
    (clone / "data" / "raw" / "same.png").unlink()
    (clone / ".diffusemix" / "data_version").unlink()
    left = content(clone)
    with pytest.raises(
        UserError, match=rf"remote 'store' does not hold the version {second.digest}"
    ):
        versioning.pull(clone)
    assert content(clone) == left, "a failed pull takes nothing away"


def test_without_git_what_kills_leave_behind_is_no_obstacle(tmp_path: Path) -> None:
    fill(tmp_path, "first")
    digest = versioning.snapshot(tmp_path).digest
    rwlock = tmp_path / ".dvc" / "tmp" / "rwlock"

    rwlock.write_text("")  # torn
    (tmp_path / "data.dvc").write_text("")
    assert versioning.pinned_digest(tmp_path) is None
    assert versioning.snapshot(tmp_path).digest == digest

    # This process's number, taken down before it lived: a container's numbers start anew.
    holder = {"pid": os.getpid(), "cmd": "dvc add"}
    rwlock.write_text(json.dumps({"write": {str(tmp_path / "data"): holder}}))
    os.utime(rwlock, (1, 1))
    shutil.rmtree(tmp_path / ".dvc" / "cache")  # pinned, but absent from the cache
    assert versioning.snapshot(tmp_path).digest == digest
    shutil.rmtree(tmp_path / "data")
    assert versioning.pull(tmp_path) and "raw/first.png" in content(tmp_path)

    (tmp_path / "data.dvc").write_text("<<<<<<< HEAD\nouts:\n")
    with pytest.raises(UserError, match=r"data\.dvc is damaged"):
        versioning.snapshot(tmp_path)


def test_dvc_dies_with_the_run_that_started_it(tmp_path: Path) -> None:
    fill(tmp_path, "first")
    versioning.ensure_repository(tmp_path)
    (tmp_path / ".dvc" / "tmp").mkdir(exist_ok=True)
    hold = (
        "import zc.lockfile, sys; lock = zc.lockfile.LockFile(sys.argv[1]);"
        "print(flush=True); input()"
    )
    run = (
        "import sys, pathlib; from diffusemix_pipeline import versioning;"
        "versioning.snapshot(pathlib.Path(sys.argv[1]))"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / ".dvc" / "tmp" / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout and holder.stdout.readline()
    running = subprocess.Popen([sys.executable, "-c", run, str(tmp_path)], cwd=TOP)
    try:
        deadline = time.monotonic() + 30
        while not (children := psutil.Process(running.pid).children()) and _before(deadline):
            time.sleep(0.05)
        time.sleep(1)  # let it reach the lock, where it would wait for ever
        running.kill()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert children and not alive
    finally:
        running.kill()
        running.wait()
        holder.communicate(b"\n")
    assert versioning.snapshot(tmp_path).digest


def _before(deadline: float) -> bool:
    return time.monotonic() < deadline


def test_processes_may_start_together(tmp_path: Path) -> None:
    fill(tmp_path, "first")
    code = (
        "import sys, pathlib; from diffusemix_pipeline import versioning;"
        "print(versioning.snapshot(pathlib.Path(sys.argv[1])).digest)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    started = [subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(set(said)) == 1


def test_the_own_repository_is_what_ensure_repository_makes(tmp_path: Path) -> None:
    versioning.ensure_repository(tmp_path)
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore"):
        assert (TOP / name).read_text() == (tmp_path / name).read_text()
    assert dvc(tmp_path, "config", "core.analytics") == "false"


# What others wrote


def planted(root: Path, remote: Path, files: dict[str, bytes]) -> str:
    """Put a version with files of these names on a remote, as whoever can write there could."""
    listing = []
    for name, content in files.items():
        listing.append({"md5": put(remote, content, ""), "relpath": name})
    return pinned(remote, listing)


def pinned(remote: Path, listing: list[dict[str, str]]) -> str:
    """Put a version's list of files on a remote; return a `data.dvc` that pins it."""
    md5 = put(remote, json.dumps(listing).encode(), ".dir")
    return f"outs:\n- md5: {md5}.dir\n  size: 1\n  nfiles: 1\n  hash: md5\n  path: data\n"


def put(remote: Path, content: bytes, suffix: str) -> str:
    md5 = hashlib.md5(content).hexdigest()
    path = remote / "files" / "md5" / md5[:2] / f"{md5[2:]}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    git(tmp_path, "init", "--quiet", "project")
    versioning.ensure_repository(root)
    dvc(root, "remote", "add", "-d", "store", str(tmp_path / "remote"))
    return tmp_path / "remote"


def test_a_version_writes_nothing_outside_of_data(remote: Path) -> None:
    root = remote.with_name("project")
    pin = planted(root, remote, {"raw/cat.png": b"cat"})
    (root / "data.dvc").write_text(pin)
    assert versioning.pull(root) and content(root) == {"raw/cat.png": b"cat"}
    for name in ("raw/../../../evil", "/evil"):
        (root / "data.dvc").write_text(planted(root, remote, {name: b"evil"}))
        with pytest.raises(UserError, match="evil' with .*, which would be written elsewhere"):
            versioning.pull(root)
        assert not list(remote.parent.rglob("evil"))
        assert content(root) == {"raw/cat.png": b"cat"}


def test_a_digest_that_leads_out_of_the_cache_is_not_fetched(remote: Path) -> None:
    root, evil = remote.with_name("project"), remote.with_name("evil")
    evil.write_bytes(b"evil")
    (remote / "files" / "md5" / "ab" / "c").mkdir(parents=True)
    listing = [{"md5": "abc/../../../../../evil", "relpath": "raw/cat.png"}]  # parted after two
    (root / "data.dvc").write_text(pinned(remote, listing))
    with pytest.raises(UserError, match="which would be written elsewhere"):
        versioning.pull(root)
    assert list(remote.parent.rglob("evil")) == [evil]


def test_a_list_of_files_that_was_changed_on_the_remote_is_refused(remote: Path) -> None:
    root = remote.with_name("project")
    (root / "data.dvc").write_text(planted(root, remote, {"raw/cat.png": b"cat"}))
    [listing] = remote.rglob("*.dir")
    listing.write_text(json.dumps([{"md5": put(remote, b"dog", ""), "relpath": "raw/dog.png"}]))
    with pytest.raises(UserError, match="is not the list of files of the version"):
        versioning.pull(root)
    assert content(root) == {}


def damage_in_place(path: Path) -> None:
    """Change a byte as a disk does: whatever shares the file, such as DVC's cache, has it, too."""
    mode, bytes_before = path.stat().st_mode, path.read_bytes()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(bytes([bytes_before[0] ^ 1]))
    path.chmod(mode)


def test_what_is_damaged_in_place_comes_back_from_the_remote(remote: Path) -> None:
    root = remote.with_name("project")
    whole = fill(root, "first")
    versioning.snapshot(root)
    damage_in_place(root / "data/raw/changing.png")
    shutil.rmtree(root / "data/raw")
    assert versioning.pull(root)
    assert content(root) == whole

    shutil.copytree(root, elsewhere := remote.with_name("elsewhere"))
    [sent] = (f for f in remote.rglob("*") if f.is_file() and f.read_bytes() == b"same")
    damage_in_place(sent)
    damage_in_place(root / "data/raw/same.png")
    shutil.rmtree(root / "data/raw")
    place = sent.relative_to(remote)
    told = (
        f"'store' holds damaged files of .*, 1 of them, such as {place}, which is "
        r"data/raw/same.png. Delete it there, with (files/md5/\w\w/\w+\.dir), and run `dvc push`"
    )
    with pytest.raises(UserError, match=told) as refused:
        versioning.pull(root)
    sent.unlink()
    (remote / re.search(told, str(refused.value))[1]).unlink()
    assert versioning.push(elsewhere) == "store"
    assert versioning.pull(root)
    assert content(root) == whole


def test_what_was_made_since_stays_where_the_images_alone_are_gone(tmp_path: Path) -> None:
    fill(tmp_path, "first")
    made = tmp_path / "data/generated/edit.png"
    made.parent.mkdir()
    made.write_text("edit")
    versioning.snapshot(tmp_path)
    whole = content(tmp_path)
    shutil.rmtree(tmp_path / "data")
    assert versioning.pull(tmp_path)
    assert content(tmp_path) == whole, "all of it is gone, so all of it is brought back"
    made.unlink()
    made.write_text("a newer edit")
    shutil.rmtree(tmp_path / "data/raw")
    assert versioning.pull(tmp_path)
    assert content(tmp_path) == {**whole, "generated/edit.png": b"a newer edit"}


def test_what_is_damaged_in_place_is_made_anew_without_a_remote(tmp_path: Path) -> None:
    whole = fill(tmp_path, "first")
    first = versioning.snapshot(tmp_path)
    damage_in_place(tmp_path / "data/raw/changing.png")
    shutil.rmtree(tmp_path / "data/raw")
    assert not versioning.pull(tmp_path), "the cache has it no more"
    assert not (tmp_path / "data/raw").exists()
    assert fill(tmp_path, "first") == whole
    assert versioning.snapshot(tmp_path).digest == first.digest
    assert content(tmp_path) == whole, "what was made anew is no link to the damaged file"


@pytest.mark.parametrize(
    "change",
    [
        ("path: data", "path: ../data"),
        ("path: data", "path: /tmp/data"),
        ("outs:", "wdir: ..\nouts:"),
        (".dir", ""),
        ("md5: ", "md5: ../../"),
        ("outs:", "outs:\n- {md5: 0, path: other}"),
    ],
)
def test_a_pin_of_anything_but_data_is_refused(change: tuple[str, str], remote: Path) -> None:
    root = remote.with_name("project")
    pin = planted(root, remote, {"raw/cat.png": b"cat"})
    digest = versioning._md5_of(pin, "data.dvc")
    with pytest.raises(UserError, match="is damaged"):  # as it would come from MLflow
        versioning.restore(root, digest, pin=pin.replace(*change).encode())
    assert content(root) == {} and not (root / "data.dvc").exists()
