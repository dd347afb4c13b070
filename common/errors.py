"""The one exception that ends a script without a traceback."""


class UserError(Exception):
    """A failure that the user can fix. Its text is one line: what happened; what to do."""
