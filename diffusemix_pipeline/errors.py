"""The one error that a person is meant to read: everything else is a defect and keeps its traceback."""


class UserError(Exception):
    """A mistake that the user can mend. The message names the thing and the repair, in one sentence or two."""
