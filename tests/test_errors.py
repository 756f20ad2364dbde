"""Promise: what a machine fails with is told in a sentence with its repair, and a defect is not."""

import errno
import os
import sqlite3
from contextlib import closing

import pytest
from mlflow.exceptions import MlflowException

from diffusemix_pipeline.errors import first_line, of_the_machine


def told(error: Exception) -> str | None:
    return of_the_machine(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("number", "repair"),
    [
        (errno.ENOSPC, "make room on the disk"),
        (errno.EDQUOT, "make room on the disk"),
        (errno.EROFS, "make it writable"),
        (errno.EACCES, "make it writable"),
        (errno.ENOMEM, "free memory"),
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


@pytest.mark.parametrize("how", ["exception HTTPSConnectionPool(…)", "timeout exception …"])
def test_a_server_that_does_not_answer_is_named_with_the_repair(how):
    message = told(MlflowException(f"API request to https://host/api failed with {how}"))
    assert message.startswith("MlflowException: API request to https://host/api failed: start")


@pytest.mark.parametrize(
    "defect",
    [
        KeyError("prompt"),
        KeyError("Permission denied"),
        MlflowException("API request to endpoint /api failed with error code 403 != 200"),
    ],
)
def test_a_defect_keeps_its_traceback(defect):
    assert told(defect) is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("\n no such file \nat all"), "no such file"),
        (OSError("one\r\ntwo"), "one"),
        (EOFError(), "EOFError"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_of_an_error_the_first_line_is_told_or_what_it_is(error, line):
    assert first_line(error) == line
