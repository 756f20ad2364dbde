"""Promise: nothing torn. A reader sees the old whole or the new whole."""

import os
import resource
import signal
from pathlib import Path

import pytest

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import (
    Ledger,
    link_or_copy,
    replaced_folder,
    write_bytes,
    write_json,
    write_once,
)


def test_write_bytes_replaces_and_leaves_nothing_aside(tmp_path):
    path = tmp_path / "deep" / "file"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_write_json_refuses_what_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_a_folder_appears_as_a_whole(tmp_path):
    target, aside = tmp_path / "stage", tmp_path / "aside"
    with replaced_folder(target, mark="a", aside=aside) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert not list(aside.iterdir())


def test_an_error_leaves_the_old_folder(tmp_path):
    target, aside = tmp_path / "stage", tmp_path / "aside"
    with replaced_folder(target, mark="a", aside=aside) as folder:
        (folder / "a").write_text("old")

    def fail_half_way() -> None:
        with replaced_folder(target, mark="a", aside=aside) as folder:
            (folder / "a").write_text("new")
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        fail_half_way()
    assert (target / "a").read_text() == "old"
    assert not list(aside.iterdir())


def test_what_somebody_else_put_there_is_never_replaced(tmp_path):
    (tmp_path / "stage" / "cat").mkdir(parents=True)
    (tmp_path / "stage" / "cat" / "mine.png").write_bytes(b"1")
    with (
        pytest.raises(UserError, match="stage would be written anew, but it holds files"),
        replaced_folder(tmp_path / "stage", mark="a", aside=tmp_path / "aside"),
    ):
        pytest.fail("nothing is made for a place that is taken")
    assert (tmp_path / "stage" / "cat" / "mine.png").read_bytes() == b"1"


def test_links_share_bytes_and_survive_a_replaced_source(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    write_bytes(source, b"one")
    link_or_copy(source, target)
    assert source.stat().st_ino == target.stat().st_ino
    write_bytes(source, b"two")
    assert target.read_bytes() == b"one"


def test_a_writer_whose_file_aside_was_removed_leaves_no_empty_one(tmp_path, monkeypatch):
    link = os.link

    def removed_first(source, target):
        source.unlink()
        link(source, target)

    monkeypatch.setattr(os, "link", removed_first)
    with pytest.raises(FileNotFoundError):
        write_once(tmp_path / "edit", b"whole", aside=tmp_path / "aside")
    assert not (tmp_path / "edit").exists()


def test_a_line_that_a_full_disk_tore_costs_that_fact_alone(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add({"n": 1})
    (file,) = tmp_path.iterdir()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 4, limit[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            ledger.add({"n": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, real)
    assert not file.read_bytes().endswith(b"\n")
    ledger.add({"n": 3})
    assert sorted(fact["n"] for fact in Ledger(tmp_path)) == [1, 3]


def no_links(*paths) -> None:
    raise PermissionError("not on this file system")


def test_a_kill_leaves_no_half_where_there_are_no_links(tmp_path, monkeypatch):
    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_once(tmp_path / "a", b"whole", aside=tmp_path / "aside")
    assert not (tmp_path / "a").exists()


def test_the_first_bytes_stay_where_there_are_no_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    exists, looks = Path.exists, []

    def not_at_first(path):  # as if both had looked at once
        looks.append(path)
        return len(looks) > 1 and exists(path)

    for content in (b"first", b"second"):
        monkeypatch.setattr(Path, "exists", not_at_first)
        write_once(tmp_path / "a", content, aside=tmp_path / "aside")
        looks.clear()
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [path.name for path in (tmp_path / "aside").iterdir()] == ["write_once.lock"]
