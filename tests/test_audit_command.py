"""`poprisk audit` from a file to what it writes, and a person's marks back into the file."""

from __future__ import annotations

import csv
import html
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from poprisk import Auditor, Canaries, audit
from poprisk.losses import IGNORED
from poprisk_lab.audit import read, study
from poprisk_lab.audit.apply import apply_marks
from poprisk_lab.audit.examples import AuditExamples, AuditInputError
from poprisk_lab.audit.nets import build, recipe_for
from poprisk_lab.audit.plan import AuditPlan, plan_for
from poprisk_lab.audit.training import TargetScale, Tell, Training, batches
from poprisk_lab.audit.words import notices
from poprisk_lab.checkpoint import CheckpointError, Workspace, load_checkpoint, save_checkpoint
from poprisk_lab.cli import app

N = 240
WRONG = range(0, N, 12)


def blobs(path: Path, **columns: Any) -> Path:
    """Three clusters with spaces in their names; every twelfth label is wrong."""
    rng = np.random.default_rng(0)
    true = np.arange(N) % 3
    centres = rng.normal(0, 4, (3, 4))
    x = centres[true] + rng.normal(size=(N, 4))
    given = true.copy()
    given[list(WRONG)] = (given[list(WRONG)] + 1) % 3
    frame = pd.DataFrame(x, columns=list("abcd"))
    frame["kind of thing"] = [f"class {'xyz'[k]}" for k in given]
    frame.assign(**columns).to_csv(path, index=False)
    return path


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["audit", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of an audit of the table, and what was printed."""
    folder = tmp_path_factory.mktemp("audit")
    table = blobs(folder / "t.csv", note='<b onclick="x">&</b>')
    found = call(table, "--label", "kind of thing", "--epochs", 60, "--out", folder / "run")
    assert found.exit_code == 0, found.output
    return folder, found.output


def test_wrong_labels_are_found_and_written(audited: tuple[Path, str]) -> None:
    folder, printed = audited
    suspects = pd.read_csv(folder / "run" / "suspects.csv")
    found = set(suspects["index"])
    assert len(found & set(WRONG)) >= 0.9 * len(WRONG)
    assert len(found - set(WRONG)) <= 2
    right = suspects[(suspects["index"]).isin(WRONG)]
    truth = [f"class {'xyz'[i % 3]}" for i in right["index"]]
    assert (right["suggested"] == truth).mean() >= 0.9
    labels = pd.read_csv(folder / "run" / "labels.csv")
    assert sorted(labels["index"]) == labels["rank"].tolist() == list(range(N))
    assert labels["suspect"].sum() == len(suspects)
    assert suspects.equals(labels[: len(suspects)])
    assert f"{len(suspects)} of {N} labels" in printed
    evidence = json.loads((folder / "run" / "evidence.json").read_text())
    assert re.search(r"planted labels found \d+% \[\d+%, \d+%\] of (\d+) that are wrong", printed)
    assert f"] of {evidence['planted']['count']} that are wrong" in printed
    model = load_checkpoint(folder / "run" / "checkpoints" / "trace-fit.safetensors")["model"]
    assert evidence["model"]["parameters"] == sum(value.numel() for value in model.values())
    assert evidence["model"]["reason"].startswith("no fingerprint: ")
    assert "The labels are taken as classes." in evidence["data"]["reading"]
    assert "The labels are taken as classes." not in evidence["limits"]
    tenths = [f"[{done:3}/60] epochs" for done in range(6, 61, 6)]
    assert [line for line in printed.splitlines() if line.endswith("] epochs")] == tenths
    assert "`note` is left out: it has one value." in printed


def test_repeated_it_goes_on_and_other_settings_are_refused(audited: tuple[Path, str]) -> None:
    folder, printed = audited
    before = (folder / "run" / "suspects.csv").read_bytes()
    arguments = [folder / "t.csv", "--label", "kind of thing", "--out", folder / "run", "--epochs"]
    again = call(*arguments, 60)
    assert again.exit_code == 0
    assert (folder / "run" / "suspects.csv").read_bytes() == before
    assert printed.splitlines()[-4:] == again.output.splitlines()[-4:]
    other = call(*arguments, 61)
    assert other.exit_code == 2
    assert (folder / "run" / "suspects.csv").read_bytes() == before


@pytest.mark.parametrize("folds", [0, 3])
def test_a_killed_audit_goes_on_with_the_same_numbers(
    audited: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folds: int
) -> None:
    source = str(audited[0] / "t.csv")
    examples = read.read_examples(source, label="kind of thing")
    examples.targets[5:9] = IGNORED
    plan = plan_for(examples, tmp_path, epochs=6, folds=folds, plant=0.15)
    train = partial(study.fit_fold if folds else study.fit, plan, examples.inputs, examples.targets)
    settings = plan.trials[-1].settings
    rows = list(train(settings, Workspace(product=tmp_path / "whole.safetensors")))

    monkeypatch.setattr("poprisk_lab.checkpoint.CHECKPOINT_SECONDS", -1.0)
    first = iter(train(settings, Workspace(tmp_path / "half.safetensors")))
    half = [next(first) for _ in range(4)]  # the fourth was told and not saved
    del first
    rest = Workspace(tmp_path / "half.safetensors", product=tmp_path / "rest.safetensors")
    assert half[:3] + list(train(settings, rest)) == rows
    a, b = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "rest"))
    assert a == b


def test_marks_go_back_into_the_file(audited: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = audited
    marks = tmp_path / "marked.csv"
    marks.write_text(
        "index,name,given,label,mark\n"
        "0,row 1,class y,class x,fix\n"
        "12,row 13,class y,class y,keep\n"
        "24,row 25,class y,class y,unsure\n"
    )
    arguments = [folder / "t.csv", "--label", "kind of thing", "--apply", marks, "--out"]
    found = call(*arguments, tmp_path / "new.csv")
    assert found.exit_code == 0, found.output
    assert found.output.startswith("1 label changed")
    with (folder / "t.csv").open() as a, (tmp_path / "new.csv").open() as b:
        old, new = list(csv.reader(a)), list(csv.reader(b))
    changed = [(i, j) for i, row in enumerate(new) for j, c in enumerate(row) if c != old[i][j]]
    assert changed == [(1, 4)]
    assert new[1][4] == "class x"
    again = call(*arguments, tmp_path / "new.csv")
    assert again.exit_code == 2


def test_marks_of_an_earlier_version_count_rows_from_one(tmp_path: Path) -> None:
    source, marks = tmp_path / "s.csv", tmp_path / "m.csv"
    source.write_text("x,y\n1,a\n2,b\n")
    marks.write_text("index,name,given,label,mark\n1,row 2,b,a,fix\n")
    assert apply_marks(source, "y", marks, tmp_path / "new.csv") == (1, 0)
    marks.write_text("row,name,given,label,mark\n2,row 2,b,a,fix\n")
    assert apply_marks(source, "y", marks, tmp_path / "old.csv") == (1, 0)
    assert (tmp_path / "old.csv").read_text() == "x,y\n1,a\n2,a\n"
    assert (tmp_path / "new.csv").read_text() == "x,y\n1,a\n2,a\n"
    marks.write_text("row,name,given,label,mark\nx,row 2,b,a,fix\n")
    with pytest.raises(AuditInputError, match="does not belong"):
        apply_marks(source, "y", marks, tmp_path / "none.csv")


def test_marks_are_read_before_the_new_table_is_looked_for(
    audited: tuple[Path, str], tmp_path: Path
) -> None:
    (tmp_path / "new.csv").write_text("mine")
    arguments = [audited[0] / "t.csv", "--label", "kind of thing", "--apply"]
    found = call(*arguments, tmp_path / "nosuch.csv", "--out", tmp_path / "new.csv")
    assert found.exit_code == 2
    assert "there is no file" in found.stderr
    assert "nosuch.csv" in found.stderr
    found = call(*arguments, audited[0] / "run" / "suspects.csv", "--out", tmp_path / "new.csv")
    assert "new.csv exists; choose another file with --out" in found.stderr
    assert (tmp_path / "new.csv").read_text() == "mine"


def test_nothing_of_an_earlier_run_is_left_once_it_starts_over(
    audited: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(audited[0] / "run", tmp_path / "run")

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("poprisk_lab.audit.study.run_trials", stopped)
    arguments = [audited[0] / "t.csv", "--label", "kind of thing", "--out", tmp_path / "run"]
    found = call(*arguments, "--fresh")
    assert found.exit_code == 130
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.json", "environment.json", "trials", "checkpoints"}


def test_all_suggestions_are_taken_from_the_list_of_suspects(
    audited: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = audited
    suspects = pd.read_csv(folder / "run" / "suspects.csv")
    source, new = folder / "t.csv", tmp_path / "new.csv"
    found = apply_marks(source, "kind of thing", folder / "run" / "suspects.csv", new)
    assert found == (len(suspects), 0)
    given, fixed = (pd.read_csv(path)["kind of thing"] for path in (source, new))
    rows = suspects["index"]
    assert fixed[rows].tolist() == suspects["suggested"].tolist()
    others = ~given.index.isin(rows)
    assert fixed[others].equals(given[others])


HEADER = "index,name,given,label,mark\n"
LISTED = "index,name,given,suggested,suspect,quality,rank,confidence\n"


@pytest.mark.parametrize(
    ("marks", "told", "after"),
    [
        (f"{HEADER}0,,a,b,fix\n", "1 label changed", "bb?a"),
        (f"{HEADER}0,,a,a,fix\n1,,b,b,fix\n", "0 labels changed", "ab?a"),
        (f"{HEADER}0,,a,b,fix\n1,,b,b,fix\n3,,a,b,keep\n", "1 label changed", "bb?a"),
        (f"{HEADER}2,,none,b,fix\n", "0 labels changed, 1 missing label filled", "abba"),
        (f"{HEADER}2,,none,none,fix\n", "0 labels changed", "ab?a"),
        (f"{LISTED}0,,a,b,1,0,0,1\n", "1 label changed", "bb?a"),
        (  # labels.csv: numbers of those that are not suspect may be rounded
            f"{LISTED}0,,a,b,1,0,0,1\n3,,a,b,0,.9,1,1\n1,,b,b,0,1,2,1\n2,,,a,0,,,1\n",
            "1 label changed, 1 missing label filled",
            "bbaa",
        ),
        (f"{LISTED}0,,a,b,1,0,0,1\n2,,,,0,,,\n", "1 label changed", "bb?a"),
    ],
)
def test_only_labels_that_are_others_now_are_counted(
    tmp_path: Path, marks: str, told: str, after: str
) -> None:
    source, marked, new = (tmp_path / f"{name}.csv" for name in "smn")
    source.write_text("x,y\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate("ab?a")))
    marked.write_text(marks)
    found = call(source, "--label", "y", "--apply", marked, "--out", new)
    assert found.exit_code == 0, found.stderr
    assert found.output == f"{told}: {new}\n"
    assert "".join(line[-1] for line in new.read_text().splitlines()[1:]) == after


def test_all_labels_of_an_audit_change_what_is_suspect_and_fill_what_is_missing(
    tmp_path: Path,
) -> None:
    """Numbers that are not suspect are rounded in labels.csv, and stay as they are."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=120).round(3)})
    frame["price"] = (1e7 * (3 + frame["a"] + 0.05 * rng.normal(size=120))).round(2)
    frame.loc[7, "price"] = 4e8 + 0.25
    frame.loc[[3, 30], "price"] = np.nan
    source, run, new = tmp_path / "t.csv", tmp_path / "run", tmp_path / "new.csv"
    frame.to_csv(source, index=False)
    found = call(source, "--label", "price", "--epochs", 20, "--plant", 0, "--out", run)
    assert found.exit_code == 0, found.output
    suspects = pd.read_csv(run / "suspects.csv")["index"].tolist()
    applied = call(source, "--label", "price", "--apply", run / "labels.csv", "--out", new)
    assert applied.exit_code == 0, applied.stderr
    told = f"{len(suspects)} label{'s' * (len(suspects) != 1)} changed, 2 missing labels filled"
    assert applied.output == f"{told}: {new}\n"
    after = pd.read_csv(new)["price"]
    differ = after.index[(after != frame["price"]).to_numpy()]
    assert set(differ) == {*suspects, 3, 30}
    assert after.notna().all()


@pytest.mark.parametrize("mark", ["fix", "keep"])
@pytest.mark.parametrize(
    ("cells", "kind", "label", "reason"),
    [
        ("barolo barbera grignolino", None, "riesling", "none of its classes: 'barbera', 'barolo'"),
        ("barolo barbera grignolino", None, "Barolo", "none of its classes: 'barolo',"),
        ("barolo barbera grignolino", None, "", "none of its classes"),
        ("barolo barbera grignolino", None, "none", "none of its classes"),
        ("barolo barbera ?", None, "?", "none of its classes: 'barbera', 'barolo'"),
        (
            "0 1 2",
            None,
            "3",
            "none of its classes: '0', '1', '2'; of numbers say --kind regression",
        ),
        ("01 02 03", None, "11", "none of its classes: '01', '02', '03'"),
        ("0 1 2", "classes", "1.5", "none of its classes"),
        ("0 1 2", "regression", "high", "no number"),
        ("0 1 2", "regression", "", "no number"),
        ("0 1 2", "regression", "inf", "no number"),
        (" ".join(f"{i}.5" for i in range(30)), None, "high", "no number"),
        (" ".join(f"{i}.5" for i in range(30)), "classes", "7.25", "none of its classes"),
    ],
)
def test_a_label_that_the_file_cannot_have_is_refused(
    tmp_path: Path, cells: str, kind: str | None, label: str, reason: str, mark: str
) -> None:
    source, marks, new = (tmp_path / f"{name}.csv" for name in "smn")
    given = cells.split()
    source.write_text("x,y\n" + "".join(f"1,{cell}\n" for cell in given))
    marks.write_text(
        f"{HEADER}0,row 1,{given[0]},{given[1]},fix\n1,row 2,{given[1]},{label},{mark}\n"
    )
    arguments = [] if kind is None else ["--kind", kind]
    found = call(source, "--label", "y", *arguments, "--apply", marks, "--out", new)
    if mark == "keep":
        assert found.exit_code == 0, found.stderr
        return
    assert found.exit_code == 2
    assert f"row 2 (index 1) of {source} the label {label!r}, which is {reason}" in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not new.exists()


@pytest.mark.parametrize("label", ["0", "1.5", "1,5", "1e3"])
def test_any_number_may_be_the_label_where_labels_are_numbers(tmp_path: Path, label: str) -> None:
    source, marks, new = (tmp_path / f"{name}.csv" for name in "smn")
    source.write_text("x;y\n" + "".join(f"1;{i},25\n" for i in range(30)))
    marks.write_text(f'{HEADER}0,row 1,0.25,"{label}",fix\n')
    assert apply_marks(source, "y", marks, new) == (1, 0)
    assert new.read_text().splitlines()[1] == f"1;{label.replace('.', ',')}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "is not what the page downloads"),
        ("row,name,given,label,mark\n1,r,class y,class x,delete\n", "not what the page downloads"),
        ("row,name,given,label,mark\n999,r,class y,class x,fix\n", "does not belong"),
        ("row,name,given,label,mark\n1,r,class z,class x,fix\n", "does not belong"),
    ],
)
def test_marks_of_another_file_are_refused(
    audited: tuple[Path, str], tmp_path: Path, text: str, message: str
) -> None:
    folder, _ = audited
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(AuditInputError, match=message):
        apply_marks(folder / "t.csv", "kind of thing", tmp_path / "m.csv", tmp_path / "n.csv")
    assert not (tmp_path / "n.csv").exists()


def test_a_task_whose_data_are_read_in_batches_is_refused(tmp_path: Path) -> None:
    (tmp_path / "many.py").write_text(
        "import torch\nfrom torch import nn\nfrom torch.utils.data import Dataset\n"
        "import poprisk\n\n\nclass Data(Dataset):\n    def __len__(self):\n        return 40\n\n"
        "    def __getitem__(self, i):\n        return torch.ones(3) * i, i % 2\n\n\n"
        "def task():\n    loss = nn.CrossEntropyLoss(reduction='none')\n"
        "    net = lambda: nn.Linear(3, 2)\n"
        "    return poprisk.Task('t', net, loss, Data(), Data(), batch_size=8, epochs=1)\n"
    )
    found = call(f"{tmp_path / 'many.py'}:task", "--out", tmp_path / "run")
    assert found.exit_code == 2
    assert "reads its data batch by batch" in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_table_may_be_called_after_python(tmp_path: Path) -> None:
    table = blobs(tmp_path / "of.python.csv")
    found = call(table, "--label", "no such column", "--out", tmp_path / "run")
    assert found.exit_code == 2
    assert "has no column 'no such column'" in found.stderr


def test_a_task_trains_its_own_network(tmp_path: Path) -> None:
    found = call("digits-clean", "--epochs", 1, "--out", tmp_path / "run")
    assert found.exit_code == 0, found.output
    assert "Training: the network of digits-clean, 1 epoch in batches of 64" in found.output
    assert "1,000 labels" in found.output


def test_marks_keep_how_a_file_is_written(tmp_path: Path) -> None:
    source = tmp_path / "s.csv"
    source.write_bytes("\ufeffx;y\r\n1,5;a\r\n2,5;b\r\n\r\n3,5;\r\n".encode())
    (tmp_path / "m.csv").write_text(
        "row,name,given,label,mark\n2,row 2,b,a,fix\n3,row 3,none,b,fix\n"
    )
    assert apply_marks(source, "y", tmp_path / "m.csv", tmp_path / "n.csv") == (1, 1)
    expected = "\ufeffx;y\r\n1,5;a\r\n2,5;a\r\n3,5;b\r\n"
    assert (tmp_path / "n.csv").read_bytes() == expected.encode()


@pytest.mark.parametrize(
    ("encoding", "cells", "mark", "written"),
    [
        ("cp1252", ["schön", "übel", "schön"], "schön,übel", "übel"),
        ("utf-8", ["schön", "übel", "schön"], "schön,übel", "übel"),
        ("utf-16", ["schön", "übel", "schön"], "schön,übel", "übel"),
        ("utf-8", ["01", "02", "01"], "1,2", "02"),
        ("utf-8", ["1.0", "0.0", "1.0"], "1,0", "0.0"),
        ("utf-8", ["12,5", "1.234,5", "12,5"], "12.5,3.25", "3,25"),
        ("utf-8", ["12.5", "1,234.5", "12.5"], "12.5,1234.5", "1,234.5"),
    ],
)
def test_corrected_labels_are_written_as_the_others_are(
    tmp_path: Path, encoding: str, cells: list[str], mark: str, written: str
) -> None:
    source, marks, new = (tmp_path / f"{name}.csv" for name in "smn")
    lines = ["ä;y", *(f"1;{cell}" for cell in cells)]
    source.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    marks.write_text(f"row,name,given,label,mark\n1,row 1,{mark},fix\n", encoding="utf-8")
    kind = "regression" if written in ("3,25", "1,234.5") else None
    assert apply_marks(source, "y", marks, new, kind=kind) == (1, 0)
    lines[1] = f"1;{written}"
    assert new.read_bytes() == "".join(f"{line}\n" for line in lines).encode(encoding)


def test_a_label_that_the_encoding_does_not_have_is_refused(tmp_path: Path) -> None:
    source, marks, new = (tmp_path / f"{name}.csv" for name in "smn")
    source.write_bytes("höhe;y\n1;1\n2;2\n".encode("cp1252"))
    marks.write_text("row,name,given,label,mark\n1,row 1,1,٣,fix\n", encoding="utf-8")
    with pytest.raises(AuditInputError, match="is in cp1252, which has no '٣'; save it in UTF-8"):
        apply_marks(source, "y", marks, new, kind="regression")
    assert not new.exists()


def test_numbers_of_many_digits_are_known_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=80).round(3)})
    frame["price"] = (1e7 * (3 + frame["a"] + 0.05 * rng.normal(size=80))).round(2)
    frame.loc[7, "price"] = 4e8 + 0.25
    source = tmp_path / "t.csv"
    frame.to_csv(source, index=False)
    run, new = tmp_path / "run", tmp_path / "new.csv"
    found = call(source, "--label", "price", "--epochs", 20, "--plant", 0, "--out", run)
    assert found.exit_code == 0, found.output
    applied = call(source, "--label", "price", "--apply", run / "suspects.csv", "--out", new)
    assert applied.exit_code == 0, applied.output
    changed = pd.read_csv(new)["price"] != frame["price"]
    assert changed[7]
    assert int(changed.sum()) == len(pd.read_csv(run / "suspects.csv"))
    exact = repr(float(frame["price"][7]))
    assert f"{exact}," in (run / "report.html").read_text()  # and so in what the page downloads


def report(directory: Path) -> Any:
    return CliRunner().invoke(app, ["report", str(directory)], catch_exceptions=False)


def test_report_writes_the_page_of_an_audit_again(
    audited: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, printed = audited
    run = folder / "run"
    written = ("report.html", "suspects.csv", "labels.csv", "evidence.json")
    before = {name: (run / name).read_bytes() for name in written}
    for name in written:
        (run / name).unlink()
    monkeypatch.chdir(tmp_path)  # the source is found from anywhere
    found = report(run)
    assert found.exit_code == 0, found.output
    assert {name: (run / name).read_bytes() for name in written} == before
    assert found.output.splitlines()[-4:] == printed.splitlines()[-4:]


def test_report_refuses_an_audit_that_it_cannot_write(
    audited: tuple[Path, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    table = blobs(tmp_path / "t.csv", note='<b onclick="x">&</b>')
    shutil.copytree(audited[0] / "run", run)
    config = json.loads((run / "config.json").read_text())

    def refused(message: str, **changes: Any) -> None:
        (run / "config.json").write_text(json.dumps({**config, **changes}))
        before = (run / "report.html").read_bytes()
        found = report(run)
        assert found.exit_code == 2
        assert message in found.stderr
        assert len(found.stderr.splitlines()) == 1
        assert (run / "report.html").read_bytes() == before

    reading = {**config["read"], "source": str(table)}
    (run / "config.json").write_text(json.dumps({**config, "read": reading}))
    assert report(run).exit_code == 0
    refused("is of an earlier version", read=None)
    refused("there is no file", read={**reading, "source": str(tmp_path / "gone.csv")})
    (run / "trials" / "fit.jsonl").write_text("")
    refused("holds 0 of 1 trainings", read=reading)
    table.write_text(table.read_text().replace("class z", "class y", 1))
    refused("it has changed since", read=reading)
    found = CliRunner().invoke(app, ["compare", "digits", "--out", str(run)])
    assert found.exit_code == 2
    assert "holds an audit and no comparison" in found.stderr


def test_out_of_folds_labels_are_judged_by_what_never_saw_them(tmp_path: Path) -> None:
    table = blobs(tmp_path / "t.csv")
    arguments = [table, "--label", "kind of thing", "--folds", 3, "--epochs", 25]
    found = call(*arguments, "--out", tmp_path / "run")
    assert found.exit_code == 0, found.output
    assert "3 times, on 2/3 of the labels each" in found.output
    assert "3 trainings" in found.output
    suspects = set(pd.read_csv(tmp_path / "run" / "suspects.csv")["index"])
    assert len(suspects & set(WRONG)) >= 0.9 * len(WRONG)
    assert len(suspects - set(WRONG)) <= 2
    products = (tmp_path / "run" / "checkpoints").glob("trace-fold-*.safetensors")
    outside = torch.cat([load_checkpoint(product)["rows"] for product in products])
    assert outside.sort().values.tolist() == list(range(N))
    evidence = json.loads((tmp_path / "run" / "evidence.json").read_text())
    assert "predictions that did not see them" in evidence["wrong_labels"]["how"]
    assert evidence["settings"]["folds"] == 3
    assert evidence["planted"]["count"] > 0
    assert report(tmp_path / "run").exit_code == 0


@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_predictions_of_a_fold_do_not_depend_on_its_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    g = torch.Generator().manual_seed(0)
    part = torch.arange(60) % 3
    monkeypatch.setattr(study, "fold_of", Mock(return_value=part))
    inputs = torch.randn(60, 4, generator=g)
    numbers = torch.randn(60, generator=g, dtype=torch.float64)
    targets = (numbers > 0).long() if kind == "classes" else numbers
    classes = ("a", "b") if kind == "classes" else ()
    examples = AuditExamples(inputs, targets, classes, str, lambda i: {})
    plan = plan_for(examples, tmp_path, epochs=3, plant=0, folds=3)

    def predicted(labels: Tensor) -> Tensor:
        product = tmp_path / "p.safetensors"
        list(study.fit_fold(plan, inputs, labels, {"fold": 1}, Workspace(product=product)))
        return load_checkpoint(product)["average"]

    own, others = torch.where(part == 1, 1 - targets, targets), targets.clone()
    others[0] = 1 - others[0]
    assert torch.equal(predicted(own), predicted(targets))
    assert not torch.equal(predicted(others), predicted(targets))


def test_the_average_of_a_fold_weighs_later_epochs_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(60, 4, generator=g), torch.arange(60) % 3
    examples = AuditExamples(inputs, targets, ("a", "b", "c"), str, lambda i: {})
    plan = plan_for(examples, tmp_path, epochs=3, lr=0.01, folds=3)
    outputs, predict = list[Tensor](), Training.predict

    def watched(training: Training, rows: Tensor, tell: Tell) -> None:
        predict(training, rows, lambda _, found: outputs.append(found.softmax(1)))
        predict(training, rows, tell)

    monkeypatch.setattr(Training, "predict", watched)
    product = tmp_path / "p.safetensors"
    list(study.fit_fold(plan, inputs, targets, {"fold": 1}, Workspace(product=product)))
    a, b, c = outputs
    torch.testing.assert_close(load_checkpoint(product)["average"], (a + 2 * b + 3 * c) / 6)


def test_an_unsure_audit_names_the_command_to_try_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=60), "the y": rng.integers(0, 5, 60)})
    frame.to_csv("chance of.csv", index=False)
    arguments = ["chance of.csv", "--label", "the y", "--epochs", "1", "--no-structure"]
    found = call(*arguments, "--fresh", "--traceback")
    assert found.exit_code == 0, found.output
    command = re.search(r"`(poprisk audit .*)`", found.output)
    assert command is not None
    wanted = ["poprisk", "audit", *arguments[:-1], "--no-structure", "--folds", "5"]
    assert shlex.split(command[1]) == wanted
    page = (tmp_path / "runs" / "audit-chance-of" / "report.html").read_text()
    assert html.escape(command[1], quote=True).replace("&#x27;", "&#39;") in page
    after = call(*shlex.split(command[1])[2:])
    assert after.exit_code == 0, after.output
    assert "runs/audit-chance-of-5-folds" in after.output
    assert "know little of the data. Train longer." in after.output
    assert "folds" not in after.output.partition("know little")[2].partition("\n")[0]


def test_a_reason_of_the_library_names_the_option_of_the_command() -> None:
    result = audit(9 * torch.eye(4)[torch.arange(100) % 4], None, torch.arange(100) % 4)
    assert notices(result) == [
        "No labels were planted, so that nothing shows whether labels were memorized; "
        "`--plant 0.05` plants some."
    ]


def test_a_share_that_is_not_believed_is_not_left_out_without_a_word() -> None:
    y = torch.randn(400, generator=torch.Generator().manual_seed(0))
    result = audit(0.9 * y, None, Canaries(y, fraction=0.1), kind="regression")
    assert notices(replace(result, valid=True, reason="")) == []
    doubted = result.wrong_share._replace(valid=False, reason="a long tail")
    told = notices(replace(result, valid=True, reason="", wrong_share=doubted))
    assert told == ["How many labels are wrong is not known: a long tail."]


def page_at(directory: Path) -> str:
    return html.unescape((directory / "report.html").read_text())


@pytest.mark.parametrize("folds", [(), ("--folds", 2)])
@pytest.mark.parametrize("other", ["mails.jsonl", "mails.tsv", "b/mails.csv"])
def test_another_file_of_the_same_name_has_a_directory_and_a_page_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str, folds: tuple[object, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    frame = pd.read_csv(blobs(tmp_path / "mails.csv"))
    Path("b").mkdir()
    if other.endswith("jsonl"):
        frame.to_json(other, orient="records", lines=True, double_precision=15)
    else:
        frame.to_csv(other, index=False, sep="\t" if other.endswith("tsv") else ",")
    arguments = ["--label", "kind of thing", "--epochs", 1, *folds]
    end = "-2-folds" if folds else ""
    assert call("mails.csv", *arguments).exit_code == 0
    first = Path("runs") / f"audit-mails{end}"
    before = (first / "report.html").read_bytes()
    assert "--apply marked.csv" in page_at(first)
    for _ in range(2):
        assert call(other, *arguments).exit_code == 0
        (second,) = {*Path("runs").iterdir()} - {first}
        assert second.name.startswith("audit-mails")
        assert second.name.endswith(end)
        assert f"<h1>{other}</h1>" in page_at(second)
        assert ("--apply marked.csv" in page_at(second)) == (not other.endswith("jsonl"))
    assert (first / "report.html").read_bytes() == before
    again = call(other, *arguments, "--fresh")
    assert again.exit_code == 0
    assert (first / "report.html").read_bytes() == before


@pytest.mark.parametrize("called", ["./mails.csv", "{here}/mails.csv", "elsewhere/mails.csv"])
def test_a_file_that_is_called_otherwise_or_has_moved_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str
) -> None:
    monkeypatch.chdir(tmp_path)
    table = blobs(tmp_path / "mails.csv")
    arguments = ["--label", "kind of thing", "--epochs", 1]
    assert call("mails.csv", *arguments).exit_code == 0
    trained = Path("runs/audit-mails/trials/fit.jsonl").read_bytes()
    called = called.format(here=tmp_path)
    if called.startswith("elsewhere"):
        Path("elsewhere").mkdir()
        table.rename(called)
    assert call(called, *arguments).exit_code == 0
    assert [path.name for path in Path("runs").iterdir()] == ["audit-mails"]
    assert Path("runs/audit-mails/trials/fit.jsonl").read_bytes() == trained
    assert f"<h1>{called}</h1>" in page_at(Path("runs/audit-mails"))
    assert f"poprisk audit {called} --label" in page_at(Path("runs/audit-mails"))


def test_any_number_of_files_of_one_name_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        for folder in "abcd":
            Path(folder).mkdir(exist_ok=True)
            table = blobs(Path(folder) / "mails.csv")
            assert call(table, "--label", "kind of thing", "--epochs", 1).exit_code == 0, k
    pages = [page_at(directory) for directory in Path("runs").iterdir()]
    titles = [re.findall(r"<h1>(.*)</h1>", page) for page in pages]
    assert sorted(titles) == [[f"{folder}/mails.csv"] for folder in "abcd"]


def test_a_page_in_a_directory_that_was_named_is_of_the_file_that_was_given(
    audited: tuple[Path, str], tmp_path: Path
) -> None:
    table, run = tmp_path / "other name.csv", tmp_path / "run"
    shutil.copy(audited[0] / "t.csv", table)
    shutil.copytree(audited[0] / "run", run)
    found = call(table, "--label", "kind of thing", "--epochs", 60, "--out", run)
    assert found.exit_code == 0, found.output
    assert f"<h1>{table}</h1>" in page_at(run)
    assert json.loads((run / "evidence.json").read_text())["data"]["source"] == str(table)


def as_csv(frame: pd.DataFrame, folder: Path) -> list[object]:
    frame.to_csv(folder / "t.csv", index=False)
    return [folder / "t.csv", "--label", "y"]


def as_numbers(frame: pd.DataFrame, folder: Path) -> list[object]:
    return [*as_csv(frame, folder), "--kind", "regression"]


def as_json_lines(frame: pd.DataFrame, folder: Path) -> list[object]:
    frame.to_json(folder / "t.jsonl", orient="records", lines=True)
    return [folder / "t.jsonl", "--label", "y"]


def as_array(frame: pd.DataFrame, folder: Path) -> list[object]:
    np.save(folder / "t.npy", frame.drop(columns="y").to_numpy())
    np.save(folder / "y.npy", frame["y"].to_numpy())
    return [folder / "t.npy", "--labels", folder / "y.npy"]


def as_array_with_a_table(frame: pd.DataFrame, folder: Path) -> list[object]:
    frame[["y"]].to_csv(folder / "y.csv", index=False)
    return [*as_array(frame, folder)[:2], folder / "y.csv", "--label", "y"]


def as_images(frame: pd.DataFrame, folder: Path) -> list[object]:
    for i, label in enumerate(frame["y"]):
        (folder / "images" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i % 256).save(folder / "images" / str(label) / f"{i}.png")
    return [folder / "images"]


@pytest.mark.parametrize(
    ("written", "counting", "apply"),
    [
        (as_csv, "line 2 of the file, and has index 0: line = row + 1 = index + 2", "t.csv"),
        (as_numbers, "line = row + 1 = index + 2", "t.csv"),
        (as_json_lines, "line = row = index + 1", ""),
        (as_array, "Row 1 is the first of the array", ""),
        (as_array_with_a_table, "Row 1 is the first of the array and of its labels", "y.csv"),
        (as_images, "The name of an image is its path in the folder", ""),
    ],
)
def test_page_and_terminal_say_which_example_is_meant_and_what_its_mark_is_good_for(
    tmp_path: Path,
    written: Callable[[pd.DataFrame, Path], list[object]],
    counting: str,
    apply: str,
) -> None:
    x = np.repeat([-3.0, 3.0], 40)
    frame = pd.DataFrame({"a": x, "b": -x, "y": (x > 0).astype(int)})
    frame.loc[[5, 50], "y"] = [1, 0]
    arguments = [*written(frame, tmp_path), "--epochs", 40]
    found = call(*arguments, "--out", tmp_path / "run", "--plant", 0)
    assert found.exit_code == 0, found.output
    page = page_at(tmp_path / "run")
    assert counting in page
    if len(pd.read_csv(tmp_path / "run" / "suspects.csv")):
        assert counting in found.output
    command = re.search(r"<code>(poprisk audit .*)</code> writes the corrected table", page)
    assert ("Only CSV tables are corrected by a command" in page) == (apply == "")
    for column in ("index", "name", "given", "label", "mark"):
        assert f"<code>{column}</code>" in page
    if not apply:
        assert command is None
        return
    assert command is not None
    marks = tmp_path / "marked.csv"
    marks.write_text(f"{HEADER}5,row 6,1,0,fix\n")
    words = shlex.split(command[1])
    assert words[:3] == ["poprisk", "audit", str(tmp_path / apply)]
    assert call(*words[2:-1], marks).output.startswith("1 label changed: ")
    new = (tmp_path / apply).with_stem(f"{Path(apply).stem}-corrected")
    old, lines = ((tmp_path / apply).read_text().splitlines(), new.read_text().splitlines())
    assert [i + 1 for i, line in enumerate(lines) if line != old[i]] == [6 + 1]  # row 6 is line 7


@pytest.mark.parametrize("written", [as_csv, as_json_lines])
@pytest.mark.parametrize("valid", [True, False])
def test_what_may_not_be_believed_is_said_beside_what_to_do_with_it(
    tmp_path: Path, written: Callable[[pd.DataFrame, Path], list[object]], *, valid: bool
) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    x = (y if valid else rng.integers(0, 2, 400)) + 0.01 * rng.normal(size=400)
    frame = pd.DataFrame({"a": 5 * x, "b": rng.normal(size=400), "y": y})
    found = call(*written(frame, tmp_path), "--epochs", 40, "--out", tmp_path / "run")
    assert found.exit_code == 0, found.output
    advice = page_at(tmp_path / "run").partition("<code>marked.csv</code>")[2]
    warning = "This result may not be believed"
    assert (warning in advice.partition("</section>")[0]) == (not valid)


@pytest.mark.parametrize("folds", [0, 3])
def test_what_another_version_left_is_refused_in_one_line(
    audited: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folds: int
) -> None:
    examples = read.read_examples(str(audited[0] / "t.csv"), label="kind of thing")
    plan = plan_for(examples, tmp_path, epochs=3, folds=folds)
    state = tmp_path / "half.safetensors"
    save_checkpoint(state, {"epoch": 1})
    fit = study.fit_fold if folds else study.fit
    with pytest.raises(CheckpointError, match=r"half.safetensors is damaged: 'model'. .*delete"):
        list(fit(plan, examples.inputs, examples.targets, {"fold": 0}, Workspace(state)))
    if not folds:

        def earlier(_: AuditPlan, targets: Tensor) -> Auditor:
            return Auditor(targets, limit=0.1)

        monkeypatch.setattr(study, "make_auditor", earlier)
        found = report(audited[0] / "run")
        assert found.exit_code == 2
        assert "is of another version (state_dict is of an auditor with limit=0.2" in found.stderr
        assert found.stderr.endswith("poprisk audit command with --fresh.\n")


def test_fresh_starts_over(audited: tuple[Path, str], tmp_path: Path) -> None:
    table = blobs(tmp_path / "t.csv")
    arguments = [table, "--label", "kind of thing", "--out", tmp_path / "run", "--epochs"]
    assert call(*arguments, 1).exit_code == 0
    (tmp_path / "run" / "mine.txt").write_text("kept")
    refused = call(*arguments, 2)
    assert refused.exit_code == 2
    assert "it differs in epochs" in refused.stderr
    assert "start over (--fresh)" in refused.stderr
    again = call(*arguments, 2, "--fresh")
    assert again.exit_code == 0, again.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"]["epochs"] == 2
    rows = (tmp_path / "run" / "trials" / "fit.jsonl").read_text().splitlines()
    assert len(rows) == 2 + 1
    assert (tmp_path / "run" / "mine.txt").read_text() == "kept"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    other = call(*arguments[:-2], tmp_path / "other", "--fresh")
    assert other.exit_code == 2
    assert (tmp_path / "other" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.csv", "--label", "y"], "there is no file or folder missing.csv"),
        (["{t}"], "--label must name the column of labels"),
        (["{t}", "--label", "kind"], "has no column 'kind'; do you mean 'kind of thing'? It has"),
        (["{t}", "--label", "kind of thing", "--text", "a"], "holds numbers, and no texts"),
        (["{t}", "--label", "b", "--text", "b"], "--text and --label both name 'b'"),
        (["{t}", "--label", "a", "--kind", "ordinal"], "--kind must be classes or regression"),
        (["{t}", "--label", "a", "--epochs", "0"], "--epochs must be at least 1"),
        (["{t}", "--label", "a", "--plant", "0.7"], "--plant must lie from 0 to 0.5"),
        (["{t}", "--label", "a", "--plant", "0.001"], "--plant 0.001 of 240 labels makes none"),
        (["{t}", "--label", "a", "--folds", "1"], "--folds must lie from 2 to 20"),
        (["{t}", "--label", "a", "--labels", "t.csv"], "--labels does not go with a table"),
        (["digits-clean", "--label", "a"], "--label does not go with a task"),
        (["{t}", "--label", "a", "--kind", "preferences"], "poprisk.Auditor(labels, kind=...)"),
        (["{t}", "--label", "a", "--lr", "0"], "--lr must be positive"),
        (["{t}", "--label", "a", "--device", "gpu"], "device 'gpu' cannot be used here"),
        (["{t}", "--apply", "m.csv"], "--label must name"),
        (["images", "--apply", "m.csv"], "--apply corrects a CSV file"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    audited: tuple[Path, str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    folder, _ = audited
    filled = [a.format(t=folder / "t.csv") for a in arguments]
    found = call(*filled, *([] if "--apply" in filled else ["--out", tmp_path / "run"]))
    assert found.exit_code == 2
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_classes_are_refused_before_a_directory_is_made(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": np.arange(60.0) ** 2 % 7, "y": np.arange(60) % 2})
    frame.loc[5, "y"] = np.nan
    frame.to_csv(tmp_path / "t.csv", index=False)
    arguments = [tmp_path / "t.csv", "--label", "y", "--kind", "regression", "--epochs", 1, "--out"]
    refused = call(*arguments, tmp_path / "run")
    assert refused.exit_code == 2
    assert "audit them as classes, or plant none by --plant 0" in refused.stderr
    assert not (tmp_path / "run").exists()
    found = call(*arguments, tmp_path / "run", "--plant", 0)
    assert found.exit_code == 0, found.output


def test_the_config_says_what_was_used(audited: tuple[Path, str]) -> None:
    folder, _ = audited
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["recipe"]["lr"] == 1e-3
    assert config["recipe"]["epochs"] == 60
    assert config["data"]["examples"] == N
    assert config["data"]["classes"] == ["class x", "class y", "class z"]


@pytest.mark.parametrize("shape", [(7,), (1, 8, 8), (3, 5, 9)])
def test_networks_fit_their_inputs(shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, (30, *shape), dtype=torch.uint8)
    inputs = images if len(shape) == 3 else torch.randn(30, *shape)
    model = build(recipe_for(30, shape), inputs, 4, seed=0)
    assert model(inputs).shape == (30, 4)
    again = build(recipe_for(30, shape), inputs, 4, seed=0)
    assert torch.equal(model(inputs), again(inputs))


def test_no_batch_is_small() -> None:
    assert [len(b) for b in batches(torch.arange(70), 32)] == [32, 38]
    assert [len(b) for b in batches(torch.arange(80), 32)] == [32, 32, 16]
    assert [len(b) for b in batches(torch.arange(5), 32)] == [5]


def test_numbers_are_scaled_by_what_wrong_ones_hardly_move() -> None:
    clean = torch.linspace(-1, 1, 101, dtype=torch.float64) * 5 + 100
    wrong = clean.clone()
    wrong[:3] = 1e6
    a, b = TargetScale.of(clean, "regression"), TargetScale.of(wrong, "regression")
    assert a.mean == pytest.approx(100)
    assert b.mean == pytest.approx(100, abs=0.5)
    assert b.size == pytest.approx(a.size, rel=0.1)
    outputs = torch.tensor([[0.5]], dtype=torch.float64)
    assert float(a.restored(outputs)) == pytest.approx(100 + 0.5 * a.size)
