"""Promise: a model's evaluation on a version of the test images counts once, for good."""

import pytest

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.readings import count_reads, record_reads


def test_the_same_reading_counts_once_and_versions_apart(tmp_path):
    path = tmp_path / "test_reads.json"
    assert count_reads(path, "v1") == 0
    assert record_reads(path, "v1", ["a", "b", "a"]) == 2
    assert record_reads(path, "v1", ["b", "c"]) == 3
    assert record_reads(path, "v2", ["a"]) == 1
    assert (count_reads(path, "v1"), count_reads(path, "v2")) == (3, 1)


def test_what_is_known_is_not_written_again(tmp_path):
    path = tmp_path / "test_reads.json"
    record_reads(path, "v1", ["a"])
    written = path.stat().st_mtime_ns, path.read_bytes()
    assert record_reads(path, "v1", ["a"]) == 1
    assert (path.stat().st_mtime_ns, path.read_bytes()) == written


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "test_reads.json"
    path.write_text('{"v1": [')
    with pytest.raises(UserError, match="test_reads.json is damaged .* counted from none"):
        record_reads(path, "v1", ["a"])
