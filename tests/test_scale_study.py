"""The study of language models by size: its data, its quick form, and its report."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from poprisk_lab.checkpoint import Workspace
from poprisk_lab.results import Results, TrialResult
from poprisk_lab.studies import scale
from poprisk_lab.studies.scale import CORRUPTED, LENGTH, PARTS, SEEDS, SIZES, STUDY, WRONG
from poprisk_lab.studies.stopping.text import SYMBOLS

NARROW = scale.ModelSize(16, 1, 3e-3)


def test_a_fifth_of_the_targets_is_wrong_in_known_places() -> None:
    found = scale.corpus(0, 200, "cpu")
    assert found.x.shape == found.given.shape == (200, LENGTH)
    assert torch.equal(found.x[:, 1:], found.clean[:, :-1])
    assert torch.equal(found.given != found.clean, found.wrong)
    assert not found.wrong[100:].any()
    assert float(found.wrong[:100].double().mean()) == pytest.approx(WRONG, abs=0.03)
    assert float(found.wrong.double().mean()) == pytest.approx(WRONG * CORRUPTED, abs=0.02)
    assert int(found.given.max()) < SYMBOLS
    for a, b in zip(found, scale.corpus(0, 200, "cpu"), strict=True):
        assert torch.equal(a, b)


def test_other_texts_are_other_texts() -> None:
    """Windows start anywhere: no window of one half is one of the other."""
    found = scale.corpus(1, 400, "cpu")
    own = {tuple(row) for row in found.x.tolist()}
    assert not own & {tuple(row) for row in found.fresh.tolist()}


def test_sizes_are_what_their_names_say() -> None:
    for name, size in SIZES.items():
        with torch.device("meta"):
            model = scale.NextSymbols(SYMBOLS, length=LENGTH, width=size.width, blocks=size.blocks)
        weights = sum(p.numel() for p in model.parameters())
        assert weights / 1e6 == pytest.approx(float(name.removesuffix("M")), rel=0.1)


def test_every_symbol_is_told_from_those_before_it() -> None:
    torch.manual_seed(0)
    model = scale.NextSymbols(SYMBOLS, length=LENGTH, width=16, blocks=2)
    x = scale.corpus(0, 4, "cpu").x
    other = x.clone()
    other[:, 20:] = (other[:, 20:] + 1) % SYMBOLS
    same = (model(x) == model(other)).all(2)
    assert bool(same[:, :20].all())
    assert not bool(same[:, 20:].any())


def test_pushes_are_of_the_symbol_over_the_others() -> None:
    moved = torch.zeros(3, SYMBOLS)
    moved[:, 7] = torch.tensor([1.0, 2.0, 3.0])
    symbols = torch.tensor([7, 7, 7])
    assert scale._push(moved + 5, symbols) == pytest.approx(2 * (1 - 1 / SYMBOLS), rel=1e-3)
    assert scale._push(moved, symbols + 1) == pytest.approx(-2 / SYMBOLS, rel=1e-3)
    assert scale._size(torch.full((3, SYMBOLS), 5.0)) == 0


def _found(settings: dict[str, Any]) -> dict[str, Any]:
    return {**scale.run(settings, Workspace())}


@pytest.fixture(scope="module")
def quick() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every part on a narrow model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "0.1M", NARROW)
        return [(t.settings, _found(t.settings)) for t in STUDY.trials(True)]


def test_the_quick_form_measures_every_part(quick: list[tuple[Any, Any]]) -> None:
    cells, noise, influence, right = (found for _, found in quick)
    assert [s["part"] for s, _ in quick] == list(PARTS)
    assert cells["moments"][-1]["step"] == cells["steps"] == 8
    # another training, the same one: what was followed, alone, and gone through backwards
    assert cells["moments"][-1]["loss"] == noise["moments"][-1]["loss"] == influence["loss"]
    assert noise["moments"][-1]["push"] == pytest.approx(
        {**cells["moments"][-1]["push"], **_signals(noise)}, rel=0.02, abs=2e-4
    )
    assert cells["closure"]["query"] < 0.02
    assert set(influence["trainings"]) == {"replay", "attribute, with its check"}
    assert right["loss"] != cells["moments"][-1]["loss"]
    assert right["loss"] == pytest.approx(cells["moments"][-1]["loss"], rel=0.2)
    assert 0 <= influence["AUROC of windows with wrong targets"] <= 1


def _signals(found: dict[str, Any]) -> dict[str, float]:
    """Where the noise alone is followed, decay counts as signal."""
    return {k: v for k, v in found["moments"][-1]["push"].items() if k.startswith("signal")}


def test_the_report_keeps_trials_and_tells_their_ends(quick: list[tuple[Any, Any]]) -> None:
    done = Results(TrialResult(settings, found) for settings, found in quick)
    found = json.loads(json.dumps(STUDY.report(done)))
    (size,) = found["sizes"].values()
    assert len(size["trials"]) == len(PARTS)
    assert size["at the end"]["loss"]["mean"] == quick[0][1]["moments"][-1]["loss"]
    assert "push of the noise, other texts over own" in size["at the end"]


def test_the_full_form_has_every_size_and_the_largest_twice() -> None:
    trials = STUDY.trials(False)
    count = {s: sum(t.settings["size"] == s for t in trials) for s in ("0.1M", "1M", "10M")}
    assert count == {"0.1M": 3 * len(SEEDS) + 1, "1M": 3 * len(SEEDS) + 1, "10M": 7}
    assert len({t.name for t in trials}) == len(trials)


def test_peaks_begin_anew() -> None:
    with scale.peak_of("cpu") as large:
        held: Tensor = torch.ones(2**26)
    del held
    with scale.peak_of("cpu") as small:
        pass
    assert large[0] - small[0] > 200
