"""Promise: what one machine paid for, no other pays for: edits and data in a bucket.

The server is a real one that speaks S3: JuiceFS's gateway, which is MinIO's before a disk.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import fsspec
import juicefs
import pytest
from click.testing import CliRunner, Result
from conftest import free_port, quick_settings, tiny_editor, write_classes

from diffusemix_pipeline import versioning
from diffusemix_pipeline.cli import main
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.editing.generate import Generated, generate
from diffusemix_pipeline.editing.shared_edits import SharedEdits
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.preflight import check_augmentation
from diffusemix_pipeline.project import Project

SECRET = "only-of-this-test"
URL = "s3://team/edits"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """Start a server with a bucket called team on loopback; give its address."""
    home, port = tmp_path_factory.mktemp("s3"), free_port()
    program = Path(juicefs.__file__).parent / "lib" / "juicefs"
    program.chmod(0o755)
    volume = f"sqlite3://{home / 'meta.db'}"
    made = ["format", "--no-agent", "--storage", "file", "--bucket", f"{home}/", volume, "team"]
    subprocess.run([program, *made], check=True, capture_output=True)
    gateway = subprocess.Popen(
        [program, "gateway", "--no-agent", volume, f"127.0.0.1:{port}"],
        env={**os.environ, "MINIO_ROOT_USER": SECRET, "MINIO_ROOT_PASSWORD": SECRET},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not _answers(address):
            assert gateway.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield address
    finally:
        gateway.terminate()
        gateway.wait(30)


def _answers(address: str) -> bool:
    bucket = fsspec.filesystem(
        "s3", key=SECRET, secret=SECRET, endpoint_url=address, skip_instance_cache=True
    )
    try:
        return bucket.exists("team")
    except OSError:
        return False


@pytest.fixture
def bucket(server, monkeypatch, request) -> Iterator[fsspec.AbstractFileSystem]:
    """The empty bucket, with what the environment of a machine that uses it holds."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    files = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    for path in files.find("team"):
        files.rm_file(path)
    yield files


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_editor(tmp_path_factory.mktemp("editor"))


def run_on(machine: Path, weights: Path, *overrides: str, images: int = 4) -> Generated:
    """Edit the same images on a machine that has nothing but what is in its folder."""
    settings = quick_settings(
        "source.train_per_class=null",
        f"editing.editor={weights}",
        f"storage.edits={URL}",
        *overrides,
    )
    source = write_classes(machine / "source", ["cat", "dog"], images)
    raw = ingest(str(source), settings, machine / "raw", aside=machine / "aside", train_only=True)
    return generate(
        raw,
        settings,
        machine / "out",
        store=EditStore(machine / "edits", settings.storage.edits),
        aside=machine / "aside",
        device="cpu",
    )


def edits_in(bucket: fsspec.AbstractFileSystem) -> list[str]:
    return [path for path in bucket.find("team/edits") if path.endswith(".png")]


def test_an_edit_that_one_machine_made_is_made_on_no_other(bucket, weights, tmp_path):
    first = run_on(tmp_path / "a", weights)
    assert (first.made, len(edits_in(bucket))) == (8, 8)
    second = run_on(tmp_path / "b", weights)
    assert second.made == 0
    assert second.stage.version == first.stage.version
    here, there = EditStore(tmp_path / "a" / "edits"), EditStore(tmp_path / "b" / "edits")
    assert there.records() == here.records()
    assert there.profiles() == here.profiles()
    more = run_on(tmp_path / "b", weights, images=5)
    assert more.made == 2
    assert len(edits_in(bucket)) == 10


def test_edits_that_were_made_before_there_was_a_bucket_are_shared(bucket, weights, tmp_path):
    run_on(tmp_path / "a", weights, "storage.edits=''")
    assert edits_in(bucket) == []
    more = run_on(tmp_path / "a", weights, images=5)
    assert more.made == 2
    assert len(edits_in(bucket)) == 10
    assert run_on(tmp_path / "b", weights, images=5).made == 0


def test_a_damaged_object_is_made_anew_and_takes_no_place(bucket, weights, tmp_path):
    first = run_on(tmp_path / "a", weights)
    damaged, gone, *_ = edits_in(bucket)
    content = bucket.cat_file(damaged)
    bucket.pipe_file(damaged, content[: len(content) // 2])
    bucket.rm_file(gone)
    second = run_on(tmp_path / "b", weights)
    assert second.made == 2
    assert second.stage.version == first.stage.version
    assert bucket.cat_file(damaged) == content
    assert len(edits_in(bucket)) == 8


def test_where_machines_made_different_bytes_each_keeps_its_own(bucket, tmp_path):
    key, contents = "0" * 32, [b"one", b"other"]
    stores = [EditStore(tmp_path / name, URL) for name in ("a", "b")]
    for store, content in zip(stores, contents, strict=True):
        record = store.put_file(key, content, store.add_profile({"device": "cpu"}))
        store.share({key: record})
    third = EditStore(tmp_path / "c", URL)
    third.exchange([key])
    assert third.path(key).read_bytes() in contents
    assert third.checked([key]) == {key}
    for store, content in zip(stores, contents, strict=True):
        store.exchange([key])
        assert store.path(key).read_bytes() == content


def test_a_file_that_changed_here_is_not_shared(bucket, tmp_path):
    store = EditStore(tmp_path / "edits", URL)
    key = "0" * 32
    record = store.put_file(key, b"as it was made", store.add_profile({"device": "cpu"}))
    store.path(key).write_bytes(b"as it is now")
    store.share({key: record})
    assert edits_in(bucket) == []


def test_many_edits_are_found_beyond_one_page_of_a_listing(bucket, tmp_path):
    profile = EditStore(tmp_path).add_profile({"device": "cpu"})
    made = {f"ab{number:030x}": f"{number}".encode() for number in range(1100)}
    store = EditStore(tmp_path, URL)
    store.share({key: store.put_file(key, content, profile) for key, content in made.items()})
    other = EditStore(tmp_path / "other", URL)
    other.exchange(made.keys())
    assert {key: other.path(key).read_bytes() for key in made} == made


@pytest.mark.parametrize(
    ("url", "environment", "told"),
    [
        ("s3://nobodys/edits", {}, "Make the bucket"),
        (URL, {"AWS_SECRET_ACCESS_KEY": "wrong"}, "AWS_SECRET_ACCESS_KEY"),
        ("s4://team/edits", {}, "Protocol not known: s4"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_named_before_any_work(
    url, environment, told, bucket, weights, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = quick_settings(f"editing.editor={weights}", f"storage.edits={url}")
    with pytest.raises(UserError, match=rf"^storage\.edits: {url}.*{told}"):
        check_augmentation(settings)


def test_a_bucket_that_can_be_used_passes(bucket, weights):
    check_augmentation(quick_settings(f"editing.editor={weights}", f"storage.edits={URL}"))
    SharedEdits(URL).check()


def test_a_command_shares_all_edits_of_a_project(bucket, tmp_path, monkeypatch):
    project = Project(tmp_path / "project")
    store = EditStore(project.edits)
    profile = store.add_profile({"device": "cpu"})
    for number in range(3):
        store.put_file(f"{number:032x}", b"an edit", profile)

    def share() -> Result:
        with chdir(project.root):
            return CliRunner().invoke(main, ["store", "share"])

    assert "storage.edits names no place" in share().output
    monkeypatch.setenv("DIFFUSEMIX_STORAGE__EDITS", URL)
    assert f"What {project.edits} holds, 3 edits, is in {URL}" in share().output
    assert len(edits_in(bucket)) == 3


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://me:secret@host/edits", "holds a key or password"),
        ("/mnt/team/edits", "write a bucket's URL"),
        ("file:///mnt/team/edits", "write a bucket's URL"),
    ],
)
def test_what_cannot_be_a_bucket_is_refused_with_the_settings(url, told):
    with pytest.raises(UserError, match=told):
        quick_settings(f"storage.edits={url}")


def test_data_go_to_the_bucket_and_come_back_elsewhere(bucket, tmp_path, monkeypatch):
    """With DVC's remote for S3, as docs/operations.md has it."""
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    here, there = tmp_path / "here", tmp_path / "there"
    write_classes(here / "data" / "raw", ["cat", "dog"], 3)
    versioning.ensure_repository(here)
    add = [sys.executable, "-m", "dvc", "remote", "add", "-d", "bucket", "s3://team/data"]
    for root in (here, there):
        root.mkdir(exist_ok=True)
        versioning.ensure_repository(root)
        subprocess.run(add, cwd=root, check=True, capture_output=True)
    assert "pushed" in versioning.snapshot(here).note
    assert bucket.find("team/data")
    (there / "data.dvc").write_bytes((here / "data.dvc").read_bytes())
    assert versioning.pull(there)
    files = sorted(path for path in (here / "data").rglob("*.png"))
    assert files
    for path in files:
        assert (there / path.relative_to(here)).read_bytes() == path.read_bytes()
