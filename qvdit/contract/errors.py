"""The one error that a user may cause and is meant to read."""

from __future__ import annotations


class QvditError(Exception):
    """Something the user gave cannot be used: what was got, what was expected, what to do about it.

    The command line prints it as one line and exits with status 2.
    """

    def __init__(self, got: str, expected: str, fix: str):
        self.got, self.expected, self.fix = got, expected, fix
        super().__init__(f"got {got}; expected {expected}; {fix}")


def in_one_line(error: QvditError | OSError) -> str:
    """An error for the user to read; one of the system's, a full disk or a path of another's, in the same form."""
    if isinstance(error, QvditError):
        return f"error: {error}"
    where = f" {error.filename}" if error.filename else ""
    return f"error: got {error.strerror or error}{where}; expected files that can be read and written; check the paths"
