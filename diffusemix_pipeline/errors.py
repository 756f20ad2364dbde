"""What a person is meant to read: mistakes, and what a machine fails with.

Any other error is a defect and keeps its traceback.
"""

import re

# By the words of the error.
_REPAIRS = {
    "No space left on device": "make room on the disk",
    "Disk quota exceeded": "make room on the disk",
    "database or disk is full": "make room on the disk",
    "Read-only file system": "make it writable",
    "Permission denied": "make it writable",
    "readonly database": "make it writable",
    "unable to open database file": "make it writable",
    "database is locked": "end what holds Dagster's or MLflow's database (`kill PROCESS`)",
    "disk I/O error": "see whether disk or memory are full",
    "MlflowException: API request to": "start MLflow's server",
    "MemoryError": "free memory",
    "can't allocate memory": "free memory",
    "can't start new thread": "free memory",
    "ChildProcessCrashException": "a step's process was killed, as the system does where memory "
    "runs out: free memory",
}

_SECRET_IN_URL = re.compile(r"(?<=://)[^/\s]+@")


class UserError(Exception):
    """A mistake that the user can mend: the message names the thing and the repair.

    It ends in terminals, logs and Dagster's database, so an address is told without its password.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


def without_secrets(text: str) -> str:
    """Return a text without the names and passwords of the addresses in it."""
    return _SECRET_IN_URL.sub("…@", text)


def of_the_machine(said: str) -> str | None:
    """Return the first line of an error with its repair where a machine failed; else None."""
    repair = next((repair for words, repair in _REPAIRS.items() if words in said), None)
    first = said.strip().partition("\n")[0].partition(" with exception HTTPConnectionPool")[0]
    first = re.sub(r"^(\w+\.)+", "", first)  # of a package
    return repair and f"{first}: {repair} and run again, which goes on where it was."
