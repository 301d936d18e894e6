"""What goes wrong in ways that a user can mend."""


class UserError(Exception):
    """A failure the user can mend. Shown as one line, without a traceback."""
