"""How long work tells what it has done, without knowing who listens."""

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done, how many units are done, and how many there are in all."""

    def __call__(self, description: str, done: int, total: int) -> None: ...


def silent(description: str, done: int, total: int) -> None:
    """The listener that does nothing."""
