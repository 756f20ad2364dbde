"""Promise: nothing torn. A reader sees the old whole or the new whole."""

import pytest

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import link_or_copy, replaced_folder, write_bytes, write_json


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
