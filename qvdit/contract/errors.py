"""The one error that a user may cause and is meant to read."""

from __future__ import annotations


class QvditError(Exception):
    """Something the user gave cannot be used: what was got, what was expected, what to do about it.

    The command line prints it as one line and exits with status 2.
    """

    def __init__(self, got: str, expected: str, fix: str):
        self.got, self.expected, self.fix = got, expected, fix
        super().__init__(f"got {got}; expected {expected}; {fix}")
