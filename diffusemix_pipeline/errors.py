"""The one error that a person is meant to read: any other is a defect and keeps its traceback."""

import re

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
