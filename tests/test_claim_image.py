"""The claim of the noisy picture: its verdict on results of both kinds, its pictures, its runs."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from poprisk_lab.page.claims import render_claim
from poprisk_lab.pictures import decode, encode, side_by_side
from poprisk_lab.plots import Picture, Plot
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.claim import Metrics, Results, TrialResult, Workspace
from poprisk_lab.studies.criteria import verdict
from poprisk_lab.studies.image import judge, run, show, task_of, trials
from poprisk_lab.studies.record import judged
from poprisk_lab.studies.run import ClaimDirectory
from poprisk_lab.tasks.image import psnr, square

CLAIM = CLAIMS["image"]

GATED = ("soft", "snr", "auto")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ClaimDirectory:
    """The quick form, run to the end."""
    directory = ClaimDirectory(tmp_path_factory.mktemp("claims") / "image", CLAIM)
    directory.create(quick=True, workers=1)
    directory.work(workers=1, on_trial=lambda *_: None)
    return directory


def made_up(gated: list[float], adamw: list[float]) -> Results:
    """Full-form trials whose PSNR along training is given, a little different for each seed."""
    done = list[TrialResult]()
    for trial in trials(False):
        (seed,) = trial.settings["seeds"]
        curve = gated if trial.settings["arm"] in GATED else adamw
        # The gate's least learning rate is a little slower, AdamW's grid a little worse than it.
        less = 0.1 * (trial.settings["lr"] < 1e-3) + 0.1 * (trial.settings["weight_decay"] > 0.5)
        found = [one(curve, 0.01 * seed - less)]
        both = {"runs": found, "matched": [one(adamw, 0.01 * seed - less)]}
        done.append(
            TrialResult(trial.settings, both if trial.settings["matched"] else {"runs": found})
        )
    return Results(done)


def one(curve: list[float], shift: float) -> Metrics:
    quality = [q + shift for q in curve]
    return {
        "quality": quality,
        "final": quality[-1],
        "best": max(quality),
        "lost": max(quality) - quality[-1],
        "best_at": quality.index(max(quality)),
        "memorized": 0.2,
        "picture": encode(torch.zeros(64, 64, dtype=torch.uint8)),
    }


# --- the verdict ----------------------------------------------------------------------------------


def test_a_gate_that_stays_and_wins_reproduces_the_claim() -> None:
    found = judge(made_up([20.0, 26.2, 26.0], [26.0, 22.0, 20.0]))
    assert verdict(found.criteria) == "reproduced"
    lost, above = found.criteria[:2]
    assert (lost.estimate.mean, above.estimate.mean) == pytest.approx((0.2, 6.0))
    assert sum(c.primary for c in found.criteria) == 4
    assert all(c.outcome == "as claimed" for c in found.criteria)


def test_a_gate_that_fits_the_noise_too_does_not() -> None:
    found = judge(made_up([26.0, 22.0, 20.0], [26.0, 25.0, 24.0]))
    assert verdict(found.criteria) == "not reproduced"
    assert {c.outcome for c in found.criteria if c.primary} == {"does not hold"}


def test_a_gate_that_only_falls_more_slowly_reproduces_it_partly() -> None:
    found = judge(made_up([26.0, 25.0, 24.0], [26.0, 22.0, 20.0]))
    assert verdict(found.criteria) == "partly reproduced"


def test_adamw_is_chosen_by_its_end_and_in_hindsight_by_its_best_moment() -> None:
    done = Results(
        TrialResult(d.settings, {"runs": [one([26.5, 24.0, 21.0], 0.0)]})
        if d.settings["arm"] == "adamw" and d.settings["lr"] == 3e-4
        else d
        for d in made_up([20.0, 26.2, 26.0], [26.0, 24.0, 22.0])
    )
    found = judge(done)
    above = found.criteria[1]
    assert above.estimate.mean == pytest.approx(26.0 - 22.0)
    (hindsight,) = [
        c for c in found.criteria if "SIREN: dB by which it ends above AdamW stopped" in c.name
    ]
    assert hindsight.estimate.mean == pytest.approx(26.02 - 26.5)
    assert not hindsight.primary
    rows = {row[0]: row[1:3] for row in found.table.rows}
    final, best = rows["SIREN: AdamW, lr 0.0003, decay 0.01"]
    assert (final, best) == ("21", "26.5")
    matched = "SIREN: AdamW, RMS-matched to Algorithm 1, soft mask, lr 0.001"
    assert rows[matched][0] == "22"


def test_the_edge_of_the_grid_is_told() -> None:
    done = made_up([20.0, 26.2, 26.0], [26.0, 22.0, 20.0])
    assert judge(done).notes == []
    for d in done:
        if d.settings["arm"] == "adamw" and d.settings["lr"] == 1e-5:
            d.metrics["runs"] = [one([20.0, 21.0, 25.0], 0.0)]
    (note,) = judge(done).notes
    assert note.startswith("SIREN, Fourier features: AdamW's best end is at the smallest learning")


# --- running --------------------------------------------------------------------------------------


@pytest.mark.claims
def test_the_quick_form_gives_a_verdict_and_a_page_with_pictures(finished: ClaimDirectory) -> None:
    found = judged(CLAIM, finished.read())
    assert found.report is not None
    text = render_claim(found)
    assert text.count('<img src="data:image/png;base64,') == 2
    assert "SIREN: PSNR to the clean picture" in text
    pictures = [p for p in show(found.progress.done) if isinstance(p, Picture)]
    plots = [p for p in show(found.progress.done) if isinstance(p, Plot)]
    assert [len(p.lines) for p in plots] == [6, 6]
    for picture in pictures:
        assert decode(picture.png).shape == (96, 5 * 96 + 4 * 4)


def settings(**more: Any) -> dict[str, Any]:
    return {**trials(True)[0].settings, "seeds": [1], "keep": [1], "epochs": 10, **more}


def test_a_run_repeats_and_its_curve_ends_with_its_picture(tmp_path: Path) -> None:
    given = settings()
    (first,) = run(given, Workspace(tmp_path / "x"))["runs"]
    assert run(given, Workspace())["runs"] == [first]
    assert len(first["quality"]) == 2
    clean = task_of(given, 1).test[1]
    from_picture = decode(first["picture"]).reshape(-1, 1).float() / 255
    assert psnr(from_picture, clean) == pytest.approx(first["final"], abs=0.6)
    rounding = 1e-3  # the curve is kept to five digits, the others to four decimals
    assert first["best"] == pytest.approx(max(first["quality"]), abs=rounding)
    assert first["best"] == pytest.approx(first["final"] + first["lost"], abs=rounding)


def test_seeds_differ_in_noise_and_network_but_not_in_the_picture() -> None:
    a, b = task_of(settings(), 1), task_of(settings(), 2)
    assert torch.equal(a.test[1], b.test[1])
    assert not torch.equal(a.train[1], b.train[1])
    runs = run(settings(seeds=[1, 2]), Workspace())["runs"]
    assert runs[0]["quality"] != runs[1]["quality"]
    assert (runs[0]["picture"] != "", runs[1]["picture"]) == (True, "")


# --- pictures -------------------------------------------------------------------------------------


def test_psnr_is_twenty_decibels_at_a_tenth() -> None:
    assert psnr(torch.full((4, 1), 0.1), torch.zeros(4, 1)) == pytest.approx(20.0, abs=1e-5)
    halved = psnr(torch.full((4, 1), 0.05), torch.zeros(4, 1))
    assert halved == pytest.approx(20 + 20 * math.log10(2), abs=1e-5)


def test_a_picture_survives_its_encoding() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    png = encode(pixels)
    assert base64.b64decode(png).startswith(b"\x89PNG")
    assert torch.equal(decode(png), pixels)


def test_values_become_bytes_and_are_cut_at_black_and_white() -> None:
    values = torch.tensor([[-0.5], [0.5], [1.0], [2.0]])
    assert square(values).tolist() == [[0, 128], [255, 255]]


def test_pictures_stand_in_a_row_with_white_between() -> None:
    dark = torch.zeros(2, 2, dtype=torch.uint8)
    row = decode(side_by_side([dark, dark + 7]))
    assert row.shape == (8, 8 + 4 + 8)
    assert row[0].tolist() == [0] * 8 + [255] * 4 + [7] * 8
