"""A rebuild changes no behaviour: results are those that were frozen before it.

Where a change is meant, ``python tests/proofs/freeze.py PART`` freezes anew; the difference of the
files is what the change does.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from poprisk_lab.cli import app
from proofs import directories, records, trajectories
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
EACH = [
    pytest.param(
        name,
        dtype,
        id=f"{name}-{str(dtype)[6:]}",
        # the same case in float64 is among the quick tests
        marks=[pytest.mark.long] if dtype == torch.float32 else [],
    )
    for name, case in trajectories.CASES.items()
    for dtype in case.dtypes
]


@pytest.mark.numerics
@pytest.mark.filterwarnings("ignore:.* skipped a step:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.* falls back to foreach:RuntimeWarning")
@pytest.mark.parametrize(("name", "dtype"), EACH)
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


# --- directories of an older version --------------------------------------------------------------

JUDGED = read("directories/judged")
OTHER_ROUNDING = 1e-3
"""What training in float32 differs by on another machine, relative: far less, as a rule."""
ROUND_OFF = 1e-12
"""What stands for zero, absolute: residues of identities that are kept to the last bits."""


def poprisk(*arguments: object) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def assert_same_numbers(found: Any, frozen: Any) -> None:
    """Exactly the same on the machine that wrote them, nearly on others."""
    same = trajectories.machine() == JUDGED["machine"]
    rtol, atol = (0.0, 0.0) if same else (OTHER_ROUNDING, ROUND_OFF)
    apart = list(itertools.islice(differences(found, frozen, rtol=rtol, atol=atol), 12))
    assert not apart, "\n".join(apart)


def test_an_old_comparison_is_reported_as_before(tmp_path: Path) -> None:
    path = directories.copied("whole", tmp_path)
    assert_as_frozen(directories.judged_comparison(path), JUDGED["comparison"], "", rtol=1e-12)
    before = directories.numbers(path)
    poprisk("report", path)
    assert (path / "report.html").stat().st_size > 0
    assert directories.numbers(path) == before


def test_an_old_comparison_is_resumed_to_the_same_numbers(tmp_path: Path) -> None:
    """From its checkpoint in the middle of a run, too."""
    path, whole = directories.copied("half", tmp_path), DATA / "directories" / "whole"
    before, expected = directories.numbers(path), directories.numbers(whole)
    assert 0 < len(before) < len(expected)
    poprisk("compare", directories.TASK, "--seeds", 1, "--workers", 1, "--out", path)
    first = {name: row for name, row in expected.items() if row["seed"] == 0}
    assert_same_numbers(directories.numbers(path), first)
    resumed = [row for row in directories.starts(path) if row["epoch"]]
    assert len(resumed) == 1, "no run went on from its checkpoint"


def test_an_old_claim_is_judged_as_before(tmp_path: Path) -> None:
    found = directories.judged_claim(directories.copied("claim", tmp_path))
    assert_as_frozen(found, JUDGED["claim"], "", rtol=1e-12)


def test_an_old_claim_is_resumed_to_the_same_numbers(tmp_path: Path) -> None:
    path, whole = directories.half_finished_claim(tmp_path), DATA / "directories" / "claim"
    poprisk("reproduce", directories.CLAIM, "--quick", "--workers", 1, "--out", path)
    assert_same_numbers(directories.numbers(path), directories.numbers(whole))
