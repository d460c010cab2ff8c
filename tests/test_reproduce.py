"""Claims: the rule of the verdict on results of both kinds, resuming, pages, the command."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import toyclaim
from poprisk.intervals import Interval, t_interval
from poprisk_lab import studies as reproduce
from poprisk_lab.claims import WORDS
from poprisk_lab.cli import app
from poprisk_lab.page import formats
from poprisk_lab.page.claims import (
    FULL_FORM,
    criteria_table,
    headline,
    notices,
    render_claim,
    summary_table,
)
from poprisk_lab.plots import Table, seeds_line, written
from poprisk_lab.results import across
from poprisk_lab.store import RunDirectoryError
from poprisk_lab.studies.claim import (
    NOT_KNOWN,
    Claim,
    Report,
    Results,
    Trial,
    TrialResult,
    Workspace,
    claim_of,
)
from poprisk_lab.studies.command import chosen, summarize
from poprisk_lab.studies.criteria import (
    Criterion,
    Steps,
    difference,
    either_way,
    geometric,
    log_rank,
    point,
    ratio,
    restricted_mean,
    speed_up,
    steps_table,
    survival,
    survival_line,
    verdict,
)
from poprisk_lab.studies.record import Judged, judged, load_record, save_record
from poprisk_lab.studies.run import ClaimDirectory, ClaimProgress
from poprisk_lab.work import TrainingError

NAN = math.nan


def criterion(low: float, high: float, **more: float | bool) -> Criterion:
    given = {"threshold": 1.0, "claimed": 5.0, **more}
    return Criterion("x", Interval((low + high) / 2, low, high), **given)  # pyrefly: ignore


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (criterion(4.0, 6.0), "as claimed"),
        (criterion(1.5, 3.0), "smaller than claimed"),
        (criterion(0.5, 6.0), "open"),
        (criterion(0.2, 0.9), "does not hold"),
        (criterion(1.0, 5.0), "as claimed"),  # the bounds belong to it
        (criterion(NAN, NAN), "open"),
        (criterion(0.1, 0.2, threshold=0.5, claimed=0.15, at_most=True), "as claimed"),
        (criterion(0.2, 0.3, threshold=0.5, claimed=0.15, at_most=True), "smaller than claimed"),
        (criterion(0.6, 0.7, threshold=0.5, claimed=0.15, at_most=True), "does not hold"),
        (criterion(0.4, 0.7, threshold=0.5, claimed=0.15, at_most=True), "open"),
    ],
)
def test_an_outcome_follows_from_the_whole_interval(given: Criterion, expected: str) -> None:
    assert given.outcome == expected


GOOD, LESS, OPEN, BAD = (
    criterion(4.0, 6.0),
    criterion(1.5, 3.0),
    criterion(0.5, 6.0),
    criterion(0.2, 0.9),
)


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        ([GOOD, GOOD], "reproduced"),
        ([GOOD, LESS], "partly reproduced"),
        ([GOOD, BAD], "partly reproduced"),
        ([LESS], "partly reproduced"),
        ([OPEN, BAD], "not reproduced"),
        ([BAD], "not reproduced"),
        ([OPEN], "not reproduced"),
        ([GOOD, BAD._replace(primary=False)], "reproduced"),
        ([BAD, GOOD._replace(primary=False)], "not reproduced"),
        ([criterion(NAN, NAN)], "undecided"),
        ([GOOD._replace(primary=False)], "undecided"),
        ([], "undecided"),
        ([Criterion("two seeds", t_interval([4.0, 6.0]), threshold=1.0)], "undecided"),
        ([GOOD, Criterion("two seeds", t_interval([4.0, 6.0]), threshold=1.0)], "undecided"),
        ([Criterion("one seed", t_interval([4.0]), threshold=1.0), BAD], "undecided"),
        ([GOOD, Criterion("two seeds", t_interval([4.0, 6.0]), 1.0, primary=False)], "reproduced"),
    ],
)
def test_a_verdict_follows_from_the_criteria_that_decide(
    criteria: list[Criterion], expected: str
) -> None:
    assert verdict(criteria) == expected


# --- intervals ------------------------------------------------------------------------------------


def test_differences_and_ratios_are_paired_by_seed() -> None:
    a, b = {0: 10.0, 1: 40.0, 2: 6.0, 7: 1.0}, {1: 20.0, 0: 5.0, 2: 3.0, 9: 3.0}
    assert difference(a, b).mean == pytest.approx(28 / 3)
    without_width = ratio(a, b)[:3]  # without pairing it would have one
    assert without_width == pytest.approx((2.0, 2.0, 2.0))


def test_a_ratio_is_a_geometric_mean() -> None:
    found = ratio({0: 1.0, 1: 100.0, 2: 10.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert found.mean == pytest.approx(10.0)
    assert found.low * found.high == pytest.approx(100.0)
    assert found.values == pytest.approx((1.0, 100.0, 10.0))


def test_a_ratio_of_what_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        ratio({0: 0.0}, {0: 1.0})


LIMIT = {0: 1000, 1: 1000, 2: 1000}


def test_steps_are_compared_up_to_the_horizon_of_both_sides() -> None:
    slow = Steps({0: None, 1: 800, 2: 500}, LIMIT)
    fast = Steps({0: 100, 1: 80, 2: 50}, LIMIT)
    assert (slow.censored, slow.horizon, fast.horizon) == (1, 1000, math.inf)
    assert speed_up(slow, fast)[:3] == pytest.approx((10.0, 10.0, 10.0))
    cut_sooner = Steps({0: None, 1: 800, 2: 500}, {**LIMIT, 0: 90})
    assert speed_up(cut_sooner, fast).mean == pytest.approx((1 * 90 / 80 * 90 / 50) ** (1 / 3))


def test_a_fast_run_that_never_gets_there_counts_against_it() -> None:
    fast = Steps({0: 100, 1: None, 2: None}, LIMIT)
    slow = Steps({0: 900, 1: 500, 2: None}, LIMIT)
    assert speed_up(slow, fast).values == pytest.approx((9.0, 0.5, 1.0))
    later = Steps({0: 900, 1: 1001, 2: 3000}, dict.fromkeys(LIMIT, 3000))
    assert speed_up(later, fast).values == pytest.approx((9.0, 1.0, 1.0))  # not known to be slower


def test_runs_of_which_none_got_there_are_not_compared() -> None:
    never = Steps(dict.fromkeys(LIMIT), LIMIT)
    late = Steps({0: 1500, 1: 2000, 2: 1200}, dict.fromkeys(LIMIT, 3000))
    assert all(math.isnan(v) for v in speed_up(late, never)[:3])
    assert math.isnan(log_rank(never, never))
    assert criterion(*speed_up(never, never)[1:3]).outcome == "open"


def test_the_curve_of_kaplan_and_meier_by_hand() -> None:
    steps = Steps({0: 100, 1: 300, 2: None, 3: 300}, {0: 400, 1: 400, 2: 400, 3: 400})
    times, left = survival(steps)
    assert [t for t in zip(times, left, strict=True) if t[0] < 400] == [
        (0.0, 1.0), (100.0, 0.75), (300.0, 0.25)
    ]  # fmt: skip
    assert restricted_mean(steps) == pytest.approx((100 + 300 + 400 + 300) / 4)
    assert restricted_mean(Steps({0: 100, 1: 200}, {0: 400, 1: 400})) == pytest.approx(150.0)
    line = survival_line("a", steps, "poprisk")
    assert [*line.x][:5] == [1.0, 100.0, 100.0, 300.0, 300.0]
    assert [*line.mean][:5] == [1.0, 1.0, 0.75, 0.75, 0.25]


def test_the_log_rank_test_tells_early_from_late() -> None:
    limit = dict.fromkeys(range(8), 1000)
    early, late = (
        Steps({s: 100 + s for s in limit}, limit),
        Steps({s: 500 + s for s in limit}, limit),
    )
    assert log_rank(early, late) < 1e-3
    assert log_rank(early, early) == pytest.approx(1.0)


def test_the_log_rank_test_takes_stopped_runs_as_censored() -> None:
    limit = dict.fromkeys(range(6), 100)
    there = Steps(dict.fromkeys(limit, 100), limit)
    assert log_rank(there, Steps(dict.fromkeys(limit), limit)) < 0.01  # at the same step


def _reached(trial: TrialResult) -> float | None:
    return trial.metrics["reached"]


def test_groups_that_never_got_there_have_no_row_unless_told() -> None:
    groups = {
        name: Results(
            TrialResult({"seed": s, "lr": 0.1}, {"reached": r, "limit": LIMIT[s], "x": 0.5})
            for s, r in enumerate(reached)
        )
        for name, reached in {"a": (1, 3, 5), "b": (None, None, None)}.items()
    }
    columns, lr = {"x": "x", "ends": _reached}, {"rate": "lr"}
    told = steps_table("arm", groups, lambda name: None, columns, settings=lr, percent=["x"])
    assert told.head[-3:] == ["rate", "x", "ends"]
    assert told.rows == [["a", "3 of 3", "3", "", "0.1", "50%", "3 [-1.97, 7.97]"]]
    assert "1 settings of which no run got there" in told.about
    kept = steps_table("arm", groups, lambda name: groups["a"], {}, keep_all=True)
    assert kept.rows[1][:3] == ["b", "0 of 3", ""]
    assert float(kept.rows[1][3]) < 0.05


@pytest.mark.parametrize(
    ("interval", "percent", "expected"),
    [
        (Interval(5.06, 4.0, 6.125), False, "5.06 [4, 6.12]"),
        (point(0.25), True, "25%"),
        (Interval(0.1234, 0.1, 0.2), True, "12.3% [10%, 20%]"),
        (Interval(3.0, NAN, NAN), False, "3"),
        (t_interval([4.0]), False, "4"),
        (t_interval([4.0, 7.0]), False, "5.5 (4 and 7)"),
        (t_interval([0.5, 0.5]), True, "50% (50% and 50%)"),
        (geometric([1.0, 100.0]), False, "10 (1 and 100)"),
        (point(29450), False, "29,450"),
        (point(3.4e-9), False, "3.4e-09"),
        (point(math.inf), False, "∞"),
    ],
)
def test_intervals_in_words(interval: Interval, percent: bool, expected: str) -> None:
    assert written(interval, percent=percent) == expected


@pytest.mark.parametrize("claim", reproduce.CLAIMS.values(), ids=lambda claim: claim.name)
def test_a_claim_is_one_file_of_at_most_250_lines(claim: Claim) -> None:
    file = inspect.getsourcefile(claim.judge)
    assert file is not None
    assert len(Path(file).read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("claim", reproduce.CLAIMS.values(), ids=lambda claim: claim.name)
def test_a_claim_says_all_of_what_a_page_shows(claim: Claim) -> None:
    words = [claim.title, claim.statement, claim.source, *claim.published, *claim.ours]
    assert claim.ours
    assert all(words)
    assert not any(mark in text for text in words for mark in ("{", "}", "  "))


def test_names_in_the_words_of_a_claim_are_those_of_its_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = {"statement": "{N} of {SHARE:.0%}", "title": "T", "source": "S", "ours": ["{{{N}}}"]}
    monkeypatch.setitem(WORDS, "two-parts", said)
    module = ModuleType("poprisk_lab.studies.two.parts")
    parts = {name: getattr(toyclaim.CLAIM, name) for name in ("trials", "run", "judge", "show")}
    vars(module).update(N=3, SHARE=0.25, **parts)
    claim = claim_of(module)
    assert (claim.name, claim.statement, claim.ours) == ("two-parts", "3 of 25%", ["{3}"])
    assert claim.published == NOT_KNOWN
    assert claim.judge is toyclaim.judge


def test_trials_are_found_by_settings() -> None:
    done = Results(TrialResult({"arm": "a", "lr": lr}, {"x": lr}) for lr in (0.1, 0.2))
    assert done.where(arm="a", lr=0.2).all("x") == [0.2]
    assert done.where(missing=1) == ()
    assert {lr: some.all("x") for lr, some in done.by("lr").items()} == {0.1: [0.1], 0.2: [0.2]}


def test_figures_of_trials_by_seed() -> None:
    figures = [(0, {"x": 1.0, "in": {"y": 4.0}}), (1, {"x": 3.0, "in": None}), (2, {"x": 2.0})]
    done = Results(TrialResult({"seed": s, "arm": "ab"[s % 2]}, m) for s, m in figures)
    assert done.by_seed("x") == {0: 1.0, 1: 3.0, 2: 2.0}
    assert done.by_seed(("in", "y")) == {0: 4.0, 1: None, 2: None}
    assert done.all(("in", "y")) == [4.0]
    assert done.mean("x") == t_interval([1.0, 3.0, 2.0])
    assert done.largest("x") == point(3.0)
    twice = Results(
        TrialResult({"seed": s, "arm": a}, {"x": s + len(a)}) for s in (1, 0) for a in ("p", "qq")
    )
    assert list(twice.over("arm", "x", max).items()) == [(0, 2), (1, 3)]
    assert across([], max) == {}
    assert across([{0: 1.0, 1: 5.0}, {1: 2.0}], max) == {1: 5.0}


def test_a_ratio_is_a_factor_either_way() -> None:
    assert either_way(Interval(2.0, 1.5, 3.0, (2.0, 0.5)))[:4] == (2.0, 1.5, 3.0, (2.0, 2.0))
    assert either_way(Interval(0.5, 0.25, 0.8))[:3] == pytest.approx((2.0, 1.25, 4.0))
    assert either_way(Interval(0.9, 0.5, 1.25))[:2] == (pytest.approx(1 / 0.9), 1.0)
    assert math.isnan(either_way(Interval(0.5, NAN, NAN)).high)


# --- running --------------------------------------------------------------------------------------


def finish(path: Path, *, quick: bool = True) -> ClaimDirectory:
    directory = ClaimDirectory(path, toyclaim.CLAIM)
    directory.create(quick=quick, workers=1)
    directory.work(workers=2, on_trial=lambda *_: None)
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ClaimDirectory:
    """A toy claim that ran to the end."""
    return finish(tmp_path_factory.mktemp("claims") / "toy")


def test_trials_come_back_in_order_with_what_they_found(finished: ClaimDirectory) -> None:
    progress = finished.read()
    assert [d.metrics["steps"] for d in progress.done] == [100, 101, 102, 20, 21, 22]
    assert progress.left == []
    assert progress.missing == {"no_such_package": 1}


def test_a_missing_package_is_named(finished: ClaimDirectory) -> None:
    found = notices(judged(toyclaim.CLAIM, finished.read()))
    assert any("1 trial left out" in n and "pip install 'no_such_package'" in n for n in found)


def test_a_failing_trial_is_named_and_the_rest_goes_on_later(tmp_path: Path) -> None:
    marker = tmp_path / "fail"
    marker.write_text("fast-0")
    claim = dataclasses.replace(
        toyclaim.CLAIM, trials=lambda quick: toyclaim.trials(quick, str(marker))
    )
    directory = ClaimDirectory(tmp_path / "run", claim)
    directory.create(quick=True, workers=1)
    with pytest.raises(TrainingError, match=r"(?s)^trial fast-0 failed:\n.*: told to fail$"):
        directory.work(workers=1, on_trial=lambda *_: None)
    records = tmp_path / "run" / "trials"
    before = {file.name: file.read_text() for file in records.iterdir()}
    assert 0 < len(directory.read().left) < 6
    assert judged(toyclaim.CLAIM, directory.read()).verdict == "not run to the end"
    marker.unlink()
    seen: list[tuple[object, ...]] = []
    directory.work(workers=1, on_trial=lambda *told: seen.append(told))
    assert directory.read().left == []
    assert all((records / name).read_text() == text for name, text in before.items())
    assert seen[-1][1:] == (6, 6)


def test_the_quick_and_the_full_form_are_not_mixed(finished: ClaimDirectory) -> None:
    with pytest.raises(RunDirectoryError, match="quick"):
        finished.create(quick=False, workers=1)


def test_a_workspace_keeps_a_state_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trial.safetensors"
    workspace = Workspace(path)
    workspace.save(lambda: {"step": 1})
    assert not path.exists()  # too soon
    monkeypatch.setattr("poprisk_lab.checkpoint.CHECKPOINT_SECONDS", -1.0)
    workspace.save(lambda: {"step": 2})
    assert Workspace(path).load() == {"step": 2}
    workspace.clear()
    assert Workspace(path).load() is None
    assert Workspace().load() is None


# --- judging, record, pages -----------------------------------------------------------------------


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_form_decides_nothing_and_says_what_its_text_is_about(
    finished: ClaimDirectory, quick: bool
) -> None:
    found = judged(toyclaim.CLAIM, finished.read()._replace(quick=quick))
    assert found.verdict == ("undecided" if quick else "reproduced")
    assert headline(found).startswith("undecided (" if quick else "reproduced: times fewer")
    assert ("run without --quick" in headline(found)) == quick
    page = render_claim(found)
    assert (FULL_FORM in page.split("Exactly what ran")[1].split("As published")[0]) == quick
    assert any("can point the other way" in n for n in notices(found)) == quick


def test_a_full_run_goes_on_record_and_comes_back(tmp_path: Path) -> None:
    progress = finish(tmp_path / "full", quick=False).read()
    save_record(toyclaim.CLAIM, progress, tmp_path / "record")
    loaded = load_record(toyclaim.CLAIM, tmp_path / "record")
    assert loaded is not None
    assert loaded.done == progress.done
    assert judged(toyclaim.CLAIM, loaded).verdict == "reproduced"
    assert load_record(toyclaim.CLAIM, tmp_path) is None


def test_a_quick_run_does_not_go_on_record(finished: ClaimDirectory, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only a finished full run"):
        save_record(toyclaim.CLAIM, finished.read(), tmp_path)


def test_the_page_escapes_and_holds_everything(finished: ClaimDirectory) -> None:
    text = render_claim(judged(toyclaim.CLAIM, finished.read()))
    for wanted in ("Undecided", "quick form", "A plot", "&lt;b&gt;markup", toyclaim.PIXEL, "≥ 1"):
        assert wanted in text
    figure = text.split('<script type="application/json">')[1].split("</script>")[0]
    data = json.loads(figure)["data"]
    band, dots, line = data  # ours on top
    assert (band["x"], band["y"]) == ([0, 1, 1, 0, None], [2.0, 2.0, 0.5, 0.5, None])
    assert (dots["mode"], line["y"]) == ("markers", [1.0, None])
    assert 'download="toy.csv" href="data:text/csv;charset=utf-8,arm%2Csteps%0A' in text
    assert "<dt>marker</dt>" in text  # the settings as used


def test_an_unfinished_claim_has_a_page_too(tmp_path: Path) -> None:
    directory = ClaimDirectory(tmp_path / "run", toyclaim.CLAIM)
    directory.create(quick=True, workers=1)
    text = render_claim(judged(toyclaim.CLAIM, directory.read()))
    assert "Not run yet" in text
    assert "6 trials still to do" in text


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def only_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "CLAIMS", {"toy": toyclaim.CLAIM})
    monkeypatch.setattr("poprisk_lab.studies.command.CLAIMS", {"toy": toyclaim.CLAIM})


@pytest.mark.usefixtures("only_toy")
def test_the_command_runs_judges_and_summarizes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = CliRunner().invoke(app, ["reproduce", "all", "--quick", "--out", str(out)])
    assert told.exit_code == 0, told.output
    verdict = "Verdict: undecided (quick form: too small to decide; run without --quick)"
    assert verdict in " ".join(told.output.split())
    assert "pip install 'no_such_package'" in " ".join(told.output.split())
    assert (out / "reproduce-toy-quick" / "report.html").exists()
    assert "A toy" in (out / "claims.html").read_text()
    again = CliRunner().invoke(app, ["reproduce", "all", "--quick", "--summary", "--out", str(out)])
    assert "undecided (quick form)" in " ".join(again.output.split())


@pytest.mark.usefixtures("only_toy")
def test_a_full_disk_at_the_page_loses_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("poprisk_lab.page.claims.render_claim", full_disk)
    told = CliRunner().invoke(app, ["reproduce", "toy", "--quick", "--out", str(tmp_path / "out")])
    assert told.exit_code == 2
    assert "Verdict: undecided (quick form" in told.stdout
    assert told.stderr.endswith("report.html: No space left on device.\n")


@pytest.mark.usefixtures("only_toy")
def test_a_summary_lists_what_was_not_run_yet(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["reproduce", "toy", "--summary", "--out", str(tmp_path)])
    assert told.exit_code == 0
    assert "not run yet" in " ".join(told.output.split())
    assert "not run yet" in (tmp_path / "claims.html").read_text()


@pytest.mark.usefixtures("only_toy")
def test_a_damaged_directory_names_its_claim(tmp_path: Path) -> None:
    finish(tmp_path / "toy")
    (tmp_path / "toy" / "trials" / "fast-0.jsonl").write_text("nonsense\n")
    with pytest.raises(RunDirectoryError, match=r"line 1 is not a record.*claim toy"):
        summarize("toy", quick=True, out=tmp_path / "toy")


def test_an_unknown_claim_is_named() -> None:
    with pytest.raises(ValueError, match="there is no claim 'nope'; choose all or one of"):
        chosen("nope")
    told = CliRunner().invoke(app, ["reproduce", "nope"])
    assert told.exit_code == 2


def test_bad_workers_are_refused() -> None:
    told = CliRunner().invoke(app, ["reproduce", "all", "--workers", "0"])
    assert told.exit_code == 2


def test_summary_rows_hold_paper_and_ours(finished: ClaimDirectory) -> None:
    for quick, said, mark in ((True, "undecided (quick form)", ""), (False, "reproduced", "good")):
        found = judged(toyclaim.CLAIM, finished.read()._replace(quick=quick))
        *_, verdict, holds, figure, ours, paper = summary_table([found]).rows[0]
        assert (figure, paper, holds) == ("times fewer steps", "5×", "1 of 1")
        assert verdict == said
        assert ours.startswith("4.8")
        assert formats.mark(verdict) == mark


def test_two_seeds_have_no_verdict_and_the_page_says_how_many_it_takes() -> None:
    def trials(quick: bool) -> list[Trial]:
        return [t for t in toyclaim.trials(quick) if t.settings["seed"] < 2 and not t.needs]

    claim = dataclasses.replace(toyclaim.CLAIM, trials=trials)
    done = Results(
        TrialResult(t.settings, toyclaim.run(t.settings, Workspace())) for t in trials(True)
    )
    found = judged(claim, ClaimProgress(done, [], {}, False, {}, 0.0))
    assert found.verdict == "undecided"
    few = told_of_seeds(found)
    assert few.startswith("2 seeds, so no intervals")
    assert few.endswith("which takes at least 3.")
    text = render_claim(found)
    assert "times fewer steps: 4.9 (5 and 4.81)" in text
    assert "Undecided" in text
    assert not re.search(r"4\.9\d* \[", text)


def told_of_seeds(found: Judged) -> str:
    (few,) = [n for n in notices(found) if "seeds" in n and "takes" in n]
    return few


TWO, FOUR = t_interval([4.0, 6.0]), t_interval([4.0, 6.0, 5.0, 7.0])


@pytest.mark.parametrize(
    ("estimates", "cell", "head"),
    [
        ([TWO], "", "Found, with the seeds"),
        ([TWO, point(1.0)], "", "Found, with the seeds"),
        ([TWO, FOUR], "", "Found, with 95% interval or the seeds"),
        ([FOUR], "", "Found, with 95% interval"),
        ([TWO], written(FOUR), "Found, with the seeds"),
    ],
)
def test_what_is_said_of_intervals_holds_in_the_tables(
    estimates: list[Interval], cell: str, head: str, finished: ClaimDirectory
) -> None:
    """Trials of two seeds and two settings, taken together, are four, and have an interval."""
    criteria = [Criterion(f"c{i}", e, 1.0, primary=i == 0) for i, e in enumerate(estimates)]
    report = Report(criteria, Table(["arm", "x"], [["a", cell]]), [])
    claim = dataclasses.replace(toyclaim.CLAIM, judge=lambda _: report)
    found = judged(claim, finished.read())
    assert criteria_table(criteria).head[3] == head
    if estimates[0] is TWO:
        intervals = FOUR in estimates or bool(cell)
        assert ("intervals that there are" in told_of_seeds(found)) == intervals


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_a_band_takes_three_seeds_and_a_norm_has_none_below_zero(seeds: int) -> None:
    rows = [[0.0, 0.1], [5.0, 0.2], [1.0, 9.0]][:seeds]
    found = seeds_line("norm", [0, 1], rows, "adamw")
    assert len(found.low) == len(found.high) == (2 if seeds == 3 else 0)
    assert all(low == 0.0 for low in found.low)
    signed = seeds_line("difference", [0, 1], [[-v for v in row] for row in rows], "adamw")
    assert not any(high <= 0 for high in signed.high)
