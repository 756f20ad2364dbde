"""The one error that a person is meant to read: any other is a defect and keeps its traceback."""


class UserError(Exception):
    """A mistake that the user can mend: the message names the thing and the repair."""
