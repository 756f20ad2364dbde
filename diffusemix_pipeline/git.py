"""Git, asked by its command line; a project need not have one.

What belongs here: asking. What does not: commits, which are a person's or CI's business.
"""

import subprocess
from pathlib import Path


def git(root: Path, *command: str) -> bytes | None:
    """Return what a command prints in `root`; None where it fails, or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
