"""What a person is meant to read: mistakes, and what a machine fails with.

Any other error is a defect and keeps its traceback.
"""

import errno
import re

# By what the text of the error holds, as a regular expression.
_REPAIRS = {
    r"No space left on device|Dis[kc] quota exceeded|database or disk is full": "make room on the "
    "disk",
    r"Read-only file system|readonly database|unable to open database file": "make it writable",
    rf"\[Errno ({errno.EPERM}|{errno.EACCES})\]|\(os error {errno.EACCES}\)": "make it writable",
    r"database is locked": "end what holds Dagster's or MLflow's database (`kill PROCESS`)",
    r"disk I/O error": "see whether the disk or the memory is full",
    r"MlflowException: API request to \S+ failed with (timeout )?exception": "start MLflow's "
    "server",
    r"^[\w.]*MemoryError\b|an(no|')t allocate memory|can't start new thread": "free memory",
    r"ChildProcessCrashException": "a step's process was killed, as the system does where memory "
    "runs out: free memory",
}
# A name or password before the host, which may hold slashes; what a query calls a secret.
_SECRET_IN_URL = re.compile(
    r"(://)(?:[^/\s]+|[^/\s:@]*:(?!\d+[/\s])\S{1,500})(?=@)"
    r"|([?&](?:key|sig|[\w.-]{0,40}?(?:token|passw|secret|signature|credential|api_?key|access_?key)"
    r"[\w.-]{0,40})=)[^&\s'\"]+",
    re.IGNORECASE,
)


class UserError(Exception):
    """A mistake that the user can mend: the message names the thing and the repair.

    It ends in terminals, logs and Dagster's database, so an address is told without its password.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


def without_secrets(text: str) -> str:
    """Return a text without the names, passwords and tokens of the addresses in it."""
    return _SECRET_IN_URL.sub(r"\1\2…", text)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its type's name where it says nothing."""
    return str(error).strip().partition("\n")[0].rstrip() or type(error).__name__


def of_the_machine(said: str) -> str | None:
    """Return the first line of an error with its repair where a machine failed; else None."""
    repair = next((repair for words, repair in _REPAIRS.items() if re.search(words, said)), None)
    first = re.sub(r" with (timeout )?exception .*", "", said.strip().partition("\n")[0])
    first = re.sub(r"^(\w+\.)+", "", first)  # of a package
    return repair and f"{first}: {repair} and run again, which goes on where it was."
