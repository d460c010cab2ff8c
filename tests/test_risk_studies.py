"""The studies of the risk estimates: a quick form of each, and reports equal to those on record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from poprisk_lab.checkpoint import Workspace
from poprisk_lab.results import Results, TrialResult
from poprisk_lab.studies.record import FOLDER
from poprisk_lab.studies.risk import STUDIES, canaries
from poprisk_lab.studies.risk.__main__ import main


def recorded(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"risk-{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", STUDIES)
def test_trials_have_names_of_their_own_and_settings_in_json(name: str) -> None:
    for quick in (True, False):
        trials = STUDIES[name].trials(quick)
        assert len({t.name for t in trials}) == len(trials)
        assert all(set(t.name) <= {*"-. ", *map(chr, range(48, 123))} for t in trials)
        assert json.loads(json.dumps([t.settings for t in trials])) == [t.settings for t in trials]


@pytest.mark.parametrize("name", STUDIES)
def test_the_quick_form_reports_what_is_on_record(name: str) -> None:
    study, record = STUDIES[name], recorded(name)
    done = list[TrialResult]()
    for trial in study.trials(True):
        found: Any = study.run(trial.settings, Workspace())
        done.append(TrialResult(trial.settings, found))
    report = json.loads(json.dumps(study.report(Results(done))))
    assert report.keys() <= record.keys()
    assert {k: type(v) for k, v in report.items()} == {k: type(record[k]) for k in report}
    for key in ("problems", "cells"):
        for part, row in report.get(key, {}).items():
            assert row.keys() == record[key][part].keys()


def test_the_report_on_canaries_is_the_one_on_record() -> None:
    record = recorded("canaries")
    tracked = {seed: [r for r in record["runs"] if r["seed"] == seed] for seed in canaries.SEEDS}
    done = [
        TrialResult({"part": "tracking", "seed": s}, {"runs": rows}) for s, rows in tracked.items()
    ]
    done += [
        TrialResult({"part": "cost", "seed": int(s)}, {"lost": lost})
        for s, lost in record["lost by seed"].items()
    ]
    report = json.loads(json.dumps(canaries.report(Results(done))))
    assert report.keys() == record.keys() - {"environment"}
    for key, value in report.items():
        expected = record[key] if key == "runs" else pytest.approx(record[key], rel=1e-4)
        assert value == expected, key


def test_a_study_is_run_and_resumed_by_its_module(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "canaries"  # the quickest
    main(name, quick=True, workers=1, runs=tmp_path)
    first, trials = capsys.readouterr().out, len(STUDIES[name].trials(True))
    assert f"{trials} {trials}" in first
    main(name, quick=True, workers=1, runs=tmp_path)
    again = capsys.readouterr().out
    assert again == first[first.index("{") :]
    assert not json.loads(again).keys() - recorded(name).keys()
