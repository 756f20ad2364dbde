"""What made a step fail, without what Dagster wraps around it."""

import dagster as dg
from dagster._utils.error import SerializableErrorInfo

from diffusemix_pipeline.errors import UserError, of_the_machine

_WRAPPERS = {
    "DagsterExecutionStepExecutionError",
    "DagsterResourceFunctionError",
    "RetryRequested",  # once too often
}
_TOLD = {UserError.__name__, dg.Failure.__name__}
_STOPPED = "DagsterExecutionInterruptedError"


def told_to_user(error: SerializableErrorInfo, what: str = "") -> str | None:
    """Return the message of a failure that a person can mend; None for any other.

    `what` failed begins it, where it does not name the thing itself.
    """
    cause = innermost(error)
    if cause.cls_name in _TOLD:
        return cause.message.split(": ", 1)[1].strip()
    if cause.cls_name == _STOPPED:
        return "Stopped before its end: run again, which goes on where it was."
    told = of_the_machine(cause.message)
    return f"{what}: {told}" if told and what else told


def innermost(error: SerializableErrorInfo) -> SerializableErrorInfo:
    """Return what was raised within a step."""
    while error.cls_name in _WRAPPERS and error.cause is not None:
        error = error.cause
    return error
