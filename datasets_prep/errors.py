"""The one error that users see without a traceback."""


class UserError(Exception):
    """Something the user can mend: the message states the value, the constraint and the fix, and names URIs."""
