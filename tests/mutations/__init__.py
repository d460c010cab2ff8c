"""Plausible bugs: one module per part of the library, each with its own MUTATIONS."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A text that occurs once in a file, what replaces it, and the test that must notice."""

    file: str
    old: str
    new: str
    test: str
