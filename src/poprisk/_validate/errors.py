"""What an error says, as another's message quotes it."""

from __future__ import annotations

LONGEST = 300
"""Characters that are quoted."""


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, if it says anything."""
    name = type(error).__name__
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{name}: {said[:LONGEST]}" if said else name


class NotAnalysable(ValueError):
    """A run that the theory cannot be put on as it is; the message says what would work."""
