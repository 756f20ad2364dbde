"""Promise: what a machine fails with is told in a sentence with its repair, and a defect is not."""

import errno
import os
import sqlite3
from contextlib import closing

import pytest

from diffusemix_pipeline.errors import of_the_machine


def told(error: Exception) -> str | None:
    return of_the_machine(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("number", "repair"),
    [
        (errno.ENOSPC, "make room on the disk"),
        (errno.EDQUOT, "make room on the disk"),
        (errno.EROFS, "make it writable"),
        (errno.EACCES, "make it writable"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_with_the_repair(number, repair):
    error = OSError(number, os.strerror(number), "data/raw")
    assert (
        told(error)
        == f"{type(error).__name__}: {error}: {repair} and run again, which goes on where it was."
    )
    assert "'data/raw'" in told(error)


def test_a_locked_database_is_told_with_the_repair(tmp_path):
    database = tmp_path / "runs.db"
    with closing(sqlite3.connect(database)) as one, closing(sqlite3.connect(database)) as other:
        one.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError) as refused:
            other.execute("PRAGMA busy_timeout = 0").execute("BEGIN EXCLUSIVE")
    assert "`kill PROCESS`" in told(refused.value)


def test_a_defect_keeps_its_traceback():
    assert told(KeyError("prompt")) is None
