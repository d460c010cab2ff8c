"""Mutants that no test can notice, as they change nothing that can be seen, with the reason."""

EQUIVALENT: dict[str, dict[str, str]] = {}
"""By file and by change, in the words of :func:`mutants.change_of`."""
