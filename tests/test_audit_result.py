"""What an audit gives out: tables, files, what to train on next."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from torch.nn import functional as F

from poprisk import Auditor, AuditResult, audit

N, C = 60, 3
NAMES = ["a cat", "a dog", "neither"]
WRONG = [4, 31]


@pytest.fixture(scope="module")
def result() -> AuditResult:
    true = torch.arange(N) % C
    given = true.clone()
    given[WRONG] = (given[WRONG] + 1) % C
    given[10] = -100
    auditor = Auditor(given, plant=0.2)
    outputs = 6 * F.one_hot(true, C).float() + torch.rand(N, C)
    auditor.update(torch.arange(N), outputs, auditor.targets)
    return auditor.result()


def test_columns_agree_with_the_arrays(result: AuditResult) -> None:
    frame = result.to_pandas()
    assert list(frame) == ("index given suggested quality margin rank suspect confidence".split())
    assert frame["suspect"].to_numpy().nonzero()[0].tolist() == WRONG
    np.testing.assert_array_equal(frame["given"], result.labels)
    best = result.pred_probs[np.arange(N), result.suggested]
    np.testing.assert_array_equal(frame["confidence"], best)
    assert (best[WRONG] > 0.9).all()


def test_names_stand_for_classes(result: AuditResult) -> None:
    frame = result.to_pandas(classes=NAMES)
    assert frame["given"][4] == "neither"
    assert frame["suggested"][4] == "a dog"
    assert frame["given"].isna()[10]
    assert frame["suggested"][10] == "a dog"
    with pytest.raises(ValueError, match="classes must hold 3 names, but got 2"):
        result.columns(classes=NAMES[:2])


def test_polars_has_the_same_table(result: AuditResult) -> None:
    frame = result.to_polars(classes=NAMES)
    assert isinstance(frame, pl.DataFrame)
    other = result.to_pandas(classes=NAMES)
    assert frame.columns == list(other)
    assert frame["suggested"].to_list() == other["suggested"].tolist()
    np.testing.assert_array_equal(frame["margin"].to_numpy(), other["margin"])


def test_a_csv_file_begins_with_the_worst_labels(result: AuditResult, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    result.to_csv(path, classes=NAMES)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == N
    assert sorted(int(row["index"]) for row in rows[:2]) == WRONG
    assert [int(row["rank"]) for row in rows[:-1]] == list(range(N - 1))
    assert (rows[-1]["index"], rows[-1]["given"], rows[-1]["quality"]) == ("10", "", "")
    assert float(rows[0]["quality"]) == result.quality[int(rows[0]["index"])]
    read = pd.read_csv(path).sort_values("index", ignore_index=True)
    np.testing.assert_allclose(read["margin"], result.margin)


def test_an_example_that_never_came_has_no_probabilities() -> None:
    labels = torch.arange(40) % 2
    auditor = Auditor(labels, plant=0.1)
    came = torch.arange(39)
    auditor.update(came, 3 * F.one_hot(labels[came], 2).float(), auditor.targets[came])
    found = auditor.result()
    assert np.isnan(found.pred_probs[39]).all()
    np.testing.assert_allclose(found.pred_probs[:39].sum(1), 1.0)
    assert np.isnan(found.columns()["confidence"][39])


def test_parquet(result: AuditResult, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    result.to_parquet(tmp_path / "labels.parquet", classes=NAMES)
    read = pd.read_parquet(tmp_path / "labels.parquet")
    pd.testing.assert_frame_equal(read, result.to_pandas(classes=NAMES))


def test_what_to_train_on_next(result: AuditResult) -> None:
    keep, labels = result.second_round()
    assert set(range(N)) - set(keep) == {*WRONG, 10}
    true = np.arange(N) % C
    true[10] = -100
    np.testing.assert_array_equal(labels, true)


def test_the_matrix_counts_what_was_put_right(result: AuditResult) -> None:
    """Labels 1 and 1 were given as 2 and 2, each class has 20 examples but for the one missing."""
    matrix = result.noise_matrix
    assert matrix is not None
    expected = np.eye(3)
    expected[1] = [0, 17 / 19, 2 / 19]
    np.testing.assert_allclose(matrix, expected)


def test_numbers_have_a_table_of_theirs() -> None:
    y = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    outputs = y + 0.1 * y.sign()
    y[3, 1] += 9
    result = audit(outputs, None, y, kind="regression")
    frame = result.to_pandas()
    assert list(frame) == (
        "index given_0 given_1 suggested_0 suggested_1 quality margin rank suspect".split()
    )
    assert result.suspects().tolist() == [3]
    corrected = result.second_round().labels
    assert corrected[3, 1] == pytest.approx(float(outputs[3, 1]))
    np.testing.assert_array_equal(corrected[4:], y[4:].double())


def test_several_labels_have_a_row_each() -> None:
    y = torch.tensor([[0, 1], [1, 1], [1, 0], [0, 0]]).repeat(10, 1)
    outputs = 8.0 * y - 4
    y[5, 1] = 1 - y[5, 1]
    result = audit(outputs, None, y, kind="multilabel")
    frame = result.to_pandas()
    assert len(frame) == len(result) == 80
    assert frame[frame["suspect"]][["index", "position"]].to_numpy().tolist() == [[5, 1]]
    assert set(range(40)) - set(result.second_round().keep) == {5}
    with pytest.raises(ValueError, match="examples have several labels; use columns"):
        result.add_to(None)


def test_the_figures_on_the_page_are_those_on_record() -> None:
    root = Path(__file__).parents[1]
    record = pd.read_json(root / "benchmarks" / "results" / "audit.json")
    page = (root / "docs" / "how-to" / "audit.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if re.match(r"\| \w+, \d+% ", line)]
    means = record.groupby(["data", "noise", "rate", "optimizer"], sort=False)
    assert len(rows) == len(means) == 8
    for row, (key, runs) in zip(rows, means, strict=True):
        name, optimizer, precision, f1, end, f1_end, share, recall, valid = map(str.strip, row)
        assert name.startswith(f"{key[0]}, {key[2]:.0%}")
        assert ("PopRisk" in optimizer) == (key[3] == "gate")
        mean = runs.mean(numeric_only=True)
        assert [precision, f1, end, f1_end] == [
            f"{mean[column]:.2f}"
            for column in ("average_precision", "f1", "average_precision_end", "f1_end")
        ]
        assert share == f"{mean['wrong_share']:.1%} of {mean['true_share']:.1%}"
        assert recall == f"{mean['recall_planted']:.2f} for {mean['recall_wrong']:.2f}"
        assert valid == f"{(runs['reason'] == '').sum()} of {len(runs)}"
