"""A sample of the fuzzed cases; benchmarks/results/fuzz.json has ten thousand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fuzz


@pytest.mark.parametrize("first", range(0, 120, 10))
def test_ten_cases(first: int) -> None:
    """The tenth is a setting that must be refused."""
    for seed in range(first, first + 10):
        fuzz.check(seed) if seed % 10 else fuzz.check_refusal(seed)


def test_the_committed_run_found_nothing_wrong() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "fuzz.json"
    found = json.loads(path.read_text())
    assert (found["cases"], found["wrong"]) == (10_000, [])
