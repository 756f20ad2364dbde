"""Promise: whoever has to wait is told for whom, and what to do if that one never ends."""

import subprocess
import sys

import pytest

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.project import without_runs

HOLDS = """
import fcntl, sys, time
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_SH)
print(flush=True)
time.sleep(60)
"""


def test_a_run_that_may_hang_is_named_with_what_ends_it(project):
    project.state.mkdir()
    command = [sys.executable, "-c", HOLDS, str(project.run_lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"\n"
        with (
            pytest.raises(UserError, match=f"if it hangs, `kill -9 {other.pid}` ends it"),
            without_runs(project),
        ):
            pytest.fail("somebody is at work")
        other.kill()
    with without_runs(project):
        pass
