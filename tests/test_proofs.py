"""A rebuild changes no behaviour: results are those that were frozen before it.

Where a change is meant, ``python tests/proofs/freeze.py PART`` freezes anew; the difference of the
files is what the change does.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest

from proofs import records
from proofs.frozen import differences, read


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
