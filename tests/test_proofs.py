"""A rebuild changes no behaviour: results are those that were frozen before it.

Where a change is meant, ``python tests/proofs/freeze.py PART`` freezes anew; the difference of the
files is what the change does.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch

from proofs import records, trajectories
from proofs.api import public_api
from proofs.frozen import DATA, differences, read


def assert_as_frozen(found: Any, frozen: Any, part: str, *, rtol: float) -> None:
    """No difference; the first of them are named."""
    apart = list(itertools.islice(differences(found, frozen, rtol=rtol), 12))
    advice = f"meant? then: python tests/proofs/freeze.py {part}"
    assert not apart, "\n".join([*apart, advice])


record = cache(records.judged_record)
each_record = pytest.mark.parametrize("name", records.NAMES)


@each_record
def test_a_record_is_judged_as_before(name: str) -> None:
    """Criteria, verdict, table and plots; in words of any kind."""
    found, frozen = ({**r, "names": None} for r in (record(name), read(f"records/{name}")))
    assert_as_frozen(found, frozen, "records", rtol=1e-12)


@each_record
def test_a_record_names_what_it_found_as_before(name: str) -> None:
    frozen = read(f"records/{name}")["names"]
    assert_as_frozen(record(name)["names"], frozen, "records", rtol=0.0)


# --- trajectories ---------------------------------------------------------------------------------

FROZEN = read("trajectories")
DIGESTS = {tuple(sorted(entry["machine"].items())): entry["weights"] for entry in FROZEN["digests"]}
EACH = [(name, dtype) for name, case in trajectories.CASES.items() for dtype in case.dtypes]


@pytest.mark.numerics
@pytest.mark.filterwarnings("ignore:.* skipped a step:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.* falls back to foreach:RuntimeWarning")
@pytest.mark.parametrize(("name", "dtype"), EACH, ids=[f"{n}-{str(d)[6:]}" for n, d in EACH])
def test_a_trajectory_is_as_before(name: str, dtype: torch.dtype) -> None:
    """Bit for bit on a machine that has frozen it, else as far as rounding goes."""
    digests = DIGESTS.get(tuple(sorted(trajectories.machine().items())))
    if digests is None and dtype != torch.float64:
        pytest.skip("no digests were frozen on a machine like this one")
    found = trajectories.trajectory(name, dtype)
    if dtype == torch.float64:
        frozen = FROZEN["projections"][name]
        assert_as_frozen(found.projections, frozen, "trajectories", rtol=trajectories.RTOL)
    if digests is not None:
        assert_as_frozen(found.digest, digests[name][str(dtype)], "trajectories", rtol=0.0)


def test_every_frozen_trajectory_is_run() -> None:
    names = set(trajectories.CASES)
    assert set(FROZEN["projections"]) == names
    assert all(set(digests) == names for digests in DIGESTS.values())


def test_another_bit_is_another_digest() -> None:
    w = torch.ones(3)
    assert trajectories.digest([w]) != trajectories.digest([w.nextafter(w + 1)])


# --- names ----------------------------------------------------------------------------------------


def test_the_public_names_are_as_before() -> None:
    """Signatures, methods and fields; ``python tests/proofs/freeze.py api`` freezes them anew."""
    frozen = (DATA / "api.txt").read_text(encoding="utf-8")
    assert public_api().splitlines() == frozen.splitlines()
