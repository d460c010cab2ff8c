"""`poprisk audit` from a file to what it writes, and a person's marks back into the file."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from poprisk_lab.audit.apply import apply_marks
from poprisk_lab.audit.examples import AuditInputError
from poprisk_lab.audit.nets import build, recipe_for
from poprisk_lab.audit.study import TargetScale, batches
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
    found = set(suspects["row"] - 1)
    assert len(found & set(WRONG)) >= 0.9 * len(WRONG)
    assert len(found - set(WRONG)) <= 2
    right = suspects[(suspects["row"] - 1).isin(WRONG)]
    truth = [f"class {'xyz'[(row - 1) % 3]}" for row in right["row"]]
    assert (right["suggested"] == truth).mean() >= 0.9
    labels = pd.read_csv(folder / "run" / "labels.csv")
    assert labels["row"].tolist() == list(range(1, N + 1))
    assert labels["suspect"].sum() == len(suspects)
    assert f"{len(suspects)} of {N} labels" in printed
    assert "planted labels found" in printed
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


def test_a_killed_audit_goes_on_with_the_same_numbers(
    audited: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from poprisk_lab.audit import command, read, study
    from poprisk_lab.checkpoint import Workspace, load_checkpoint, save_checkpoint

    folder, _ = audited
    examples = read.read_examples(str(folder / "t.csv"), label="kind of thing")
    plan = study.plan_for(examples, folder / "killed", epochs=6)
    command.start(examples, plan, "t.csv")
    save_checkpoint(
        folder / "killed" / "data.safetensors",
        {"inputs": examples.inputs, "targets": examples.targets},
    )
    whole = Workspace(product=folder / "whole.safetensors")
    rows = list(study.fit(plan, {}, whole))

    monkeypatch.setattr("poprisk_lab.checkpoint.CHECKPOINT_SECONDS", -1.0)
    first = study.fit(plan, {}, Workspace(folder / "half.safetensors"))
    half = [next(first) for _ in range(4)]  # the fourth was told and not saved
    del first
    rest = Workspace(folder / "half.safetensors", product=folder / "rest.safetensors")
    assert half[:3] + list(study.fit(plan, {}, rest)) == rows
    a, b = (load_checkpoint(folder / f"{name}.safetensors") for name in ("whole", "rest"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert torch.equal(
        a["auditor"]["predictions"]["average"], b["auditor"]["predictions"]["average"]
    )


def test_marks_go_back_into_the_file(audited: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = audited
    marks = tmp_path / "marked.csv"
    marks.write_text(
        "row,name,given,label,mark\n"
        "1,row 1,class y,class x,fix\n"
        "13,row 13,class y,class y,keep\n"
        "25,row 25,class y,class y,unsure\n"
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
    source.write_text("\ufeffx;y\n1,5;a\n2,5;b\n\n3,5;\n", encoding="utf-8")
    (tmp_path / "m.csv").write_text(
        "row,name,given,label,mark\n2,row 2,b,a,fix\n3,row 3,none,b,fix\n"
    )
    assert apply_marks(source, "y", tmp_path / "m.csv", tmp_path / "n.csv") == 2
    assert (tmp_path / "n.csv").read_text(encoding="utf-8") == "x;y\n1,5;a\n2,5;a\n3,5;b\n"


def test_report_of_an_audit_says_where_its_page_is(audited: tuple[Path, str]) -> None:
    found = CliRunner().invoke(app, ["report", str(audited[0] / "run")])
    assert found.exit_code == 2
    assert "holds an audit, whose page is its report.html" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.csv", "--label", "y"], "there is no file or folder missing.csv"),
        (["{t}"], "--label must name the column of labels"),
        (["{t}", "--label", "kind"], "has no column 'kind'"),
        (["{t}", "--label", "a", "--kind", "ordinal"], "--kind must be classes or regression"),
        (["{t}", "--label", "a", "--epochs", "0"], "--epochs must be at least 1"),
        (["{t}", "--label", "a", "--plant", "0.7"], "--plant must lie from 0 to 0.5"),
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
