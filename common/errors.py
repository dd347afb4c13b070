"""The one exception that ends a script without a traceback, and what others say."""


class UserError(Exception):
    """A failure that the user can fix. Its text is one line: what happened; what to do."""


def reason(error):
    """Returns what an exception says, at most 200 characters of its first line."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return getattr(error, "strerror", None) or first_line[:200]
