"""The auditor in a training loop: kinds of labels, looks, planting, resume, refusals."""

from __future__ import annotations

import doctest
import importlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk import Auditor, AuditResult, Canaries
from poprisk.audit.looks import KEPT_LOOKS, Look, Predictions
from poprisk.audit.planted import planted_labels
from poprisk.audit.scores import fit_noise
from reference import audit as naive

N, C = 200, 4


def labels(n: int = N, c: int = C) -> Tensor:
    return torch.arange(n) % c


def look(number: int, *, believed: bool = True) -> Look:
    return Look(number, 0, 0.0, 0.0, None, believed)


def feed(auditor: Auditor, outputs: Tensor, *, batch: int = 32, seed: int = 0) -> None:
    """One look at given outputs for all examples."""
    g = torch.Generator().manual_seed(seed)
    for index in torch.randperm(len(outputs), generator=g).split(batch):
        auditor.update(index, outputs[index], auditor.targets[index])


def confident(y: Tensor, c: int = C, *, by: float = 6.0) -> Tensor:
    return by * F.one_hot(y, c).float()


def with_errors(y: Tensor, wrong: list[int], c: int = C) -> Tensor:
    found = y.clone()
    found[wrong] = (found[wrong] + 1) % c
    return found


def test_wrong_labels_are_found_and_put_right() -> None:
    y = labels()
    auditor = Auditor(with_errors(y, [3, 70]))
    feed(auditor, confident(y))
    result = auditor.result()
    assert result.suspects().tolist() == [3, 70]
    np.testing.assert_array_equal(result.suggested, y)
    assert sorted(result.rank[[3, 70]]) == [0, 1]
    assert result.value == result.wrong_share.value == 2 / N
    assert result.standard_error > 0
    assert result.valid
    assert result.cost == 0
    assert result.recall is not None
    assert result.recall.value == pytest.approx(1)
    assert result.memorization is not None
    assert abs(result.memorization.value) < 0.02


def test_planted_labels_are_not_among_the_suspects() -> None:
    y = labels()
    auditor = Auditor(y, plant=0.2)
    assert int((auditor.targets != y).sum()) > 20
    feed(auditor, confident(y))
    result = auditor.result()
    np.testing.assert_array_equal(result.labels, y)
    assert not result.suspect.any()


def test_planted_labels_that_are_right_by_chance_are_not_missed_ones() -> None:
    """Of 0s a third is wrong: planted 1s are right there, and are rightly not caught."""
    true = labels(1200, 2)
    given = torch.where((true == 1) & (torch.arange(1200) % 8 < 3), 0, true)
    auditor = Auditor(given, kind="binary", plant=0.3)
    feed(auditor, 6.0 * true - 3)
    result = auditor.result()
    np.testing.assert_array_equal(result.suspect, given != true)
    assert result.recall is not None
    assert result.recall.value == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["classes", "binary", "multilabel", "preferences"])
def test_planted_labels_of_a_clean_set_are_caught(kind: str) -> None:
    y = labels(c=C if kind == "classes" else 2)
    y = y.repeat(3, 1).T.contiguous() if kind == "multilabel" else y
    auditor = Auditor(y, kind=kind, plant=0.2)
    feed(auditor, confident(y, by=4.0) if kind == "classes" else 4.0 * y - 2)
    result = auditor.result()
    assert not result.suspect.any()
    assert result.recall is not None
    assert result.recall.value == pytest.approx(1)
    assert result.recall.valid  # of pairs that never occur none is right by chance


@pytest.mark.parametrize("kind", ["classes", "binary"])
def test_a_run_that_repeats_labels_is_not_believed(kind: str) -> None:
    y = labels(c=C if kind == "classes" else 2)
    auditor = Auditor(y, kind=kind, plant=0.2)
    planted = auditor.targets
    outputs = confident(planted) if kind == "classes" else 12.0 * planted - 6
    feed(auditor, outputs)
    result = auditor.result()
    assert [look.believed for look in result.looks] == [False]
    assert result.look == 0
    assert not result.valid
    assert re.match(r"memorization of the planted labels is (0.99|1.00), above 0.2", result.reason)
    assert len(result) == N


def test_looks_before_labels_are_memorized_count() -> None:
    y = labels()
    auditor = Auditor(with_errors(y, [3]), plant=0.2)
    for outputs in (confident(y, by=4.0), confident(y), confident(auditor.targets)):
        feed(auditor, outputs)
        auditor.end_look()
    result = auditor.result()
    assert [look.believed for look in result.looks] == [True, True, False]
    assert result.look == 2
    assert result.suspects().tolist() == [3]
    assert result.valid
    np.testing.assert_allclose(
        auditor.result(average=False).predictions, confident(y).softmax(1), rtol=1e-6
    )
    assert result.history.shape == (N, 3)


def test_without_planting_nothing_certifies() -> None:
    y = labels()
    auditor = Auditor(y, plant=0)
    assert torch.equal(auditor.targets, y)
    feed(auditor, confident(y))
    result = auditor.result()
    assert not result.valid
    assert "no labels were planted" in result.reason
    assert result.recall is None
    assert result.memorization is None
    assert not result.wrong_share.valid


def test_predictions_that_know_little_are_said_to() -> None:
    y = labels()
    auditor = Auditor(y, plant=0.2)
    feed(auditor, confident(y, by=0.5))
    result = auditor.result()
    assert not result.valid
    assert result.reason.startswith("unsure: predictions have a mean confidence of 3")
    assert "folds=5" in result.reason


def test_few_planted_labels_are_said_to_be_few() -> None:
    y = labels(40)
    auditor = Auditor(y, plant=0.05)
    feed(auditor, confident(y))
    assert auditor.result().reason == "too few planted labels to tell"


def test_the_average_weighs_later_looks_more() -> None:
    g = torch.Generator().manual_seed(0)
    looks = torch.rand(5, 3, 2, generator=g)
    kept = Predictions(3, 2)
    for k, p in enumerate(looks):
        kept.note(torch.arange(3), p)
        kept.close(look(k + 1, believed=k != 2), torch.zeros(3))
    believed = looks[[0, 1, 3, 4]].double()
    for i in range(3):
        expected = naive.averaged(believed[:, i].tolist(), [1, 2, 4, 5])
        assert kept.average[i].tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(kept.last, looks[4])


def test_looks_that_are_not_believed_count_until_one_is() -> None:
    looks = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0))
    kept = Predictions(2, 2)
    kept.note(torch.arange(2), looks[0])
    kept.close(look(1, believed=False), torch.zeros(2))
    torch.testing.assert_close(kept.average, looks[0])
    assert (kept.weight > 0).all()
    for k in (1, 2):
        kept.note(torch.arange(2), looks[k])
        kept.close(look(k + 1, believed=k == 1), torch.zeros(2))
    torch.testing.assert_close(kept.average, looks[1], atol=1e-5, rtol=0)
    assert torch.equal(kept.last, looks[1])


def test_half_precision_keeps_an_average_over_many_looks() -> None:
    g = torch.Generator().manual_seed(0)
    exact, half = Predictions(50, 3), Predictions(50, 3, dtype=torch.float16)
    for k in range(150):
        p = torch.rand(50, 3, generator=g).softmax(1)
        for kept in (exact, half):
            kept.note(torch.arange(50), p)
            kept.close(look(k + 1), torch.zeros(50))
    assert half.average.dtype == torch.float16
    assert float((exact.average - half.average.float()).abs().max()) < 3e-3


def test_history_is_thinned_but_spans_the_run() -> None:
    kept = Predictions(2, 2)
    looks = 5 * KEPT_LOOKS
    for k in range(looks):
        kept.note(torch.arange(2), torch.full((2, 2), 0.5))
        kept.close(look(k + 1), torch.full((2,), float(k + 1)))
    assert len(kept.kept) <= KEPT_LOOKS
    assert kept.kept[0] == 1
    assert kept.kept[-1] > 0.8 * looks
    assert len(set(np.diff(kept.kept))) == 1
    assert kept.history[0, : len(kept.kept)].tolist() == [float(k) for k in kept.kept]


def test_a_look_ends_by_itself_when_examples_come_again() -> None:
    y = labels()
    auditor = Auditor(y)
    for epoch in range(3):
        g = torch.Generator().manual_seed(epoch)
        for index in torch.randperm(N, generator=g).split(64)[:-1]:  # drop_last
            auditor.update(index, confident(y[index]), auditor.targets[index])
    assert len(auditor.looks) == 2
    auditor.end_look()
    auditor.end_look()
    assert [look.number for look in auditor.looks] == [1, 2, 3]
    assert [look.items for look in auditor.looks] == [192, 192, 192]
    assert int(auditor.predictions.weight.sum()) == (1 + 2 + 3) * 192


def test_memorization_is_that_of_the_canaries() -> None:
    g = torch.Generator().manual_seed(0)
    y, outputs = labels(), torch.randn(N, C, generator=g)
    canaries = Canaries(y, fraction=0.2)
    planted = planted_labels(canaries).planted
    assert planted is not None
    found = planted.memorization(outputs.softmax(1), torch.ones(N, dtype=torch.bool))
    expected = canaries.memorization(outputs)
    assert found.value == pytest.approx(expected.value, abs=1e-6)
    assert found.standard_error == pytest.approx(expected.standard_error, abs=1e-6)
    rows = outputs.softmax(1)[canaries.index].tolist()
    changed = canaries.targets[canaries.index] != canaries.original
    contrasts = [
        naive.contrast(row, int(z), int(o))
        for row, z, o, other in zip(
            rows, canaries.targets[canaries.index], canaries.original, changed, strict=True
        )
        if other
    ]
    assert found.value == pytest.approx(float(np.mean(contrasts)), abs=1e-6)


def test_memorization_of_numbers_is_that_of_the_canaries() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(N, 2, generator=g)
    auditor = Auditor(y, kind="regression", plant=0.2)
    canaries = Canaries(y.double(), fraction=0.2)
    torch.testing.assert_close(auditor.targets, canaries.targets.float())
    outputs = 0.7 * y + 0.3 * auditor.targets
    assert auditor.planted is not None
    found = auditor.planted.memorization(outputs, torch.ones(N, dtype=torch.bool))
    assert found.value == pytest.approx(canaries.memorization(outputs).value, abs=1e-5)
    assert found.value == pytest.approx(0.3, abs=1e-5)


def test_memorization_of_two_classes_is_beyond_that_of_labels_that_stayed() -> None:
    g = torch.Generator().manual_seed(0)
    y = labels(400, 2)
    auditor = Auditor(y, kind="binary", plant=0.2)
    planted = auditor.targets != y
    chance = torch.rand(400, generator=g)
    for memorized in (0.0, 0.5):
        p = (1 - memorized) * chance + memorized * auditor.targets
        feed(auditor, torch.logit(p, eps=1e-6))
        auditor.end_look()
        found = auditor.looks[-1].memorization
        assert found is not None
        values = []
        for i in planted.nonzero().squeeze(1):
            z = int(auditor.targets[i])
            others = p[(y == 1 - z) & ~planted]
            values.append(float(p[i] - others.mean()) * (1 if z == 1 else -1))
        assert found.value == pytest.approx(float(np.mean(values)), abs=1e-5)
        expected = float(np.std(values, ddof=1)) / len(values) ** 0.5
        assert found.standard_error == pytest.approx(expected, rel=1e-4)
        assert abs(found.value - memorized) < 3 * found.standard_error


def test_two_classes_that_are_known_exactly_are_not_memorized() -> None:
    y = labels(400, 2)
    for seed in range(5):
        auditor = Auditor(y, kind="binary", plant=0.1, seed=seed)
        feed(auditor, 20.0 * y - 10)
        memorization = auditor.result().memorization
        assert memorization is not None
        assert abs(memorization.value) < 1e-3
        assert memorization.standard_error < 1e-3


def trained(steps: int, auditor: Auditor, x: Tensor, loss: Callable[..., Tensor], out: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[-1], 32), nn.ReLU(), nn.Linear(32, out))
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(steps):
        for index in torch.randperm(len(x)).split(50):
            u, y = model(x[index]), auditor.targets[index]
            auditor.update(index, u, y)
            opt.zero_grad()
            loss(u, y).backward()
            opt.step()


def test_several_labels_an_example() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=g)
    y = (x[:, :3] > 0).float()
    given = y.clone()
    wrong = torch.rand(400, 3, generator=g) < 0.1
    given[wrong] = 1 - given[wrong]
    auditor = Auditor(given, kind="multilabel")
    assert auditor.targets.shape == given.shape
    assert auditor.targets.dtype == given.dtype
    trained(30, auditor, x, F.binary_cross_entropy_with_logits, 3)
    result = auditor.result()
    found = np.zeros((400, 3), bool)
    found[result.example, result.position] = result.suspect
    assert (found == wrong.numpy()).mean() > 0.93
    assert result.noise_matrix is not None
    assert result.noise_matrix.shape == (3, 2, 2)
    assert result.value == pytest.approx(0.1, abs=0.05)
    kept = result.second_round().keep
    assert set(kept).isdisjoint(result.example[result.suspect])


def test_numbers() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=g)
    y = x[:, :1] - x[:, 1:2] + 0.1 * torch.randn(400, 1, generator=g)
    given = y.clone()
    given[:20] += 5
    auditor = Auditor(given, kind="regression", limit=0.3)
    trained(30, auditor, x, F.mse_loss, 1)
    result = auditor.result()
    assert set(range(20)) <= set(result.suspects())
    assert result.suspect.sum() < 60
    assert result.noise_matrix is None
    np.testing.assert_array_equal(result.suggested[:20], result.predictions[:20])
    np.testing.assert_array_equal(result.suggested[~result.suspect], result.labels[~result.suspect])
    with pytest.raises(ValueError, match="targets are numbers, which have no probabilities"):
        _ = result.pred_probs


def test_predictions_of_numbers_that_explain_nothing_are_said_to() -> None:
    y = torch.randn(N, generator=torch.Generator().manual_seed(0))
    auditor = Auditor(y, kind="regression", plant=0.2)
    feed(auditor, torch.zeros(N))
    assert auditor.result().reason.startswith("unsure: residuals spread as the targets do")


def test_pairs_whose_first_is_said_to_be_better() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=g)
    first = (x[:, 0] > 0).long()
    given = first.clone()
    wrong = torch.rand(600, generator=g) < 0.15
    given[wrong] = 1 - given[wrong]
    auditor = Auditor(given, kind="preferences")

    def loss(u: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(u.squeeze(1), y.float())

    trained(12, auditor, x, loss, 1)
    result = auditor.result()
    assert np.mean(result.suspect == wrong.numpy()) > 0.93
    assert result.valid, result.reason
    model = fit_noise(result.predictions, result.labels, symmetric=True)
    assert model.matrix is not None
    assert model.matrix[0, 1] == model.matrix[1, 0]
    np.testing.assert_allclose(result.margin, model.margin(result.predictions, given.numpy())[0])


def test_pairs_whose_chosen_side_always_comes_first() -> None:
    """All labels are 1: the planted flips and the predictions are what tells."""
    auditor = Auditor(torch.ones(N, dtype=torch.long), kind="preferences", plant=0.2)
    scores = torch.full((N,), 3.0)
    scores[[5, 9]] = -3.0
    feed(auditor, scores)
    result = auditor.result()
    assert result.suspects().tolist() == [5, 9]
    assert result.suggested[[5, 9]].tolist() == [0, 0]


def tokens() -> Tensor:
    y = torch.arange(60 * 5).reshape(60, 5) % 3
    y[::2, 3:] = -100  # shorter sentences
    y[:, 1] = -100  # a word between
    return y


def test_tokens() -> None:
    y = tokens()
    given = y.clone()
    given[4, 2] = (given[4, 2] + 1) % 3
    auditor = Auditor(given, kind="tokens", plant=0.1)
    assert torch.equal(auditor.targets == -100, given == -100)
    outputs = confident(y.clamp_min(0), 3)
    for index in torch.arange(60).split(16):
        short = index[index % 2 == 0]
        auditor.update(short, outputs[short, :3], auditor.targets[short, :3])  # padded to 3
        long = index[index % 2 == 1]
        auditor.update(long, outputs[long], auditor.targets[long])
    result = auditor.result()
    (found,) = result.suspects()
    assert (result.example[found], result.position[found]) == (4, 2)
    assert len(result) == int((y != -100).sum())
    with pytest.raises(ValueError, match="outputs have 3 positions, but there are labels beyond"):
        auditor.update([1], outputs[1:2, :3], auditor.targets[1:2, :3])


def test_tokens_in_rows_of_their_own_lengths() -> None:
    rows = [[0, 1, 2], [1, 0], [2]]
    auditor = Auditor(rows, kind="tokens", plant=0)
    assert auditor.targets.tolist() == [[0, 1, 2], [1, 0, -100], [2, -100, -100]]


def test_what_has_no_label_is_predicted_and_never_suspect() -> None:
    y = labels()
    given = with_errors(y, [3])
    given[[8, 9]] = -100
    auditor = Auditor(given)
    feed(auditor, confident(y))
    result = auditor.result()
    assert result.suspects().tolist() == [3]
    assert result.labelled.sum() == N - 2
    assert result.suggested[[8, 9]].tolist() == y[[8, 9]].tolist()
    assert np.isnan(result.quality[[8, 9]]).all()
    assert result.rank[[8, 9]].tolist() == [-1, -1]
    assert sorted(result.rank)[2:] == list(range(N - 2))


def test_labels_that_are_missing_among_several_stay_so() -> None:
    y = torch.tensor([[0.0, 1.0], [1.0, torch.nan]]).repeat(50, 1)
    auditor = Auditor(y, kind="multilabel", plant=0.2)
    assert torch.equal(auditor.targets.isnan(), y.isnan())
    assert set(auditor.targets.nan_to_num(9.0).unique().tolist()) == {0, 1, 9}
    feed(auditor, 8 * y.nan_to_num(1.0) - 4)
    result = auditor.result()
    assert result.labelled.sum() == 150
    np.testing.assert_array_equal(result.suggested[~result.labelled], 1)


def test_missing_numbers_are_left_out() -> None:
    y = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    given = y.clone()
    given[4, 1] = torch.nan
    auditor = Auditor(given, kind="regression", plant=0.1)
    feed(auditor, y + 0.01 * torch.randn(N, 2, generator=torch.Generator().manual_seed(1)))
    result = auditor.result()
    assert not result.labelled[4]
    np.testing.assert_array_equal(result.suggested[4], result.predictions[4])


def test_outputs_that_are_not_finite_are_left_out_and_said() -> None:
    y = labels()
    outputs = confident(y)
    outputs[:20] = torch.nan
    auditor = Auditor(y, plant=0.2)
    feed(auditor, outputs)
    result = auditor.result()
    assert np.isnan(result.quality[:20]).all()
    assert not result.suspect[:20].any()
    assert "20 of 200 labels have no believed prediction, 20 were NaN or Inf" in result.reason


def test_probabilities_are_taken_as_they_are() -> None:
    y = labels()
    one, two = Auditor(y), Auditor(y, probabilities=True)
    feed(one, confident(y))
    feed(two, confident(y).softmax(1))
    np.testing.assert_allclose(one.result().predictions, two.result().predictions, rtol=1e-6)
    with pytest.raises(ValueError, match="rows that sum to 1"):
        two.update([0], confident(y)[:1], two.targets[:1])
    pairs = Auditor(labels(c=2), kind="binary", probabilities=True)
    with pytest.raises(ValueError, match="probabilities from 0 to 1"):
        pairs.update([0], torch.tensor([1.5]), pairs.targets[:1])


def state_of(auditor: Auditor) -> dict[str, Any]:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(auditor.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a: AuditResult, b: AuditResult) -> None:
    for name in ("predictions", "quality", "margin", "suggested", "suspect", "history"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.looks, a.recall, a.memorization, a.wrong_share) == (
        b.looks,
        b.recall,
        b.memorization,
        b.wrong_share,
    )


@pytest.mark.parametrize("cut", [2, 5, 9])
def test_a_resumed_run_ends_bit_for_bit_the_same(cut: int) -> None:
    y = with_errors(labels(), [3])
    whole, first, second = Auditor(y), Auditor(y), Auditor(y)
    for step in range(14):
        index = torch.randperm(N, generator=torch.Generator().manual_seed(step // 4))[
            50 * (step % 4) : 50 * (step % 4) + 50
        ]
        outputs = torch.randn(50, C, generator=torch.Generator().manual_seed(step))
        outputs += confident(labels()[index])
        if step == cut:
            second.load_state_dict(state_of(first))
        for auditor in (whole, first if step < cut else second):
            auditor.update(index, outputs, auditor.targets[index])
    same(second.result(), whole.result())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 1}, "labels"),
        ({"plant": 0}, "labels"),
        ({"limit": 0.3}, "limit=0.3"),
        ({"dtype": torch.float16}, "dtype='torch.float16'"),
        ({"classes": 5}, "classes=5"),
        ({"probabilities": True}, "probabilities=True"),
    ],
)
def test_a_state_of_other_settings_is_refused(other: dict[str, Any], named: str) -> None:
    theirs, mine = Auditor(labels(), **other), Auditor(labels())
    outputs = confident(labels(), other.get("classes", C))
    feed(theirs, outputs.softmax(1) if "probabilities" in other else outputs)
    with pytest.raises(ValueError, match=f"state_dict is of an auditor with {named}"):
        mine.load_state_dict(theirs.state_dict())
    assert not mine.looks
    assert not mine.predictions.seen.any()
    with pytest.raises(ValueError, match="state_dict lacks looks, not_finite, predictions"):
        mine.load_state_dict({"settings": {}})
    with pytest.raises(TypeError, match="state_dict must be what state_dict"):
        mine.load_state_dict([])  # pyrefly: ignore


def test_files_hold_what_memory_would(tmp_path: Path) -> None:
    y = with_errors(labels(), [3, 4])
    inside, outside = Auditor(y), Auditor(y, directory=tmp_path / "audit")
    for auditor in (inside, outside):
        feed(auditor, confident(labels()))
    same(outside.result(), inside.result())
    size = {p.name: p.stat().st_size for p in (tmp_path / "audit").iterdir()}
    assert size == {
        "present.bin": 4 * N * C,
        "last.bin": 4 * N * C,
        "average.bin": 4 * N * C,
        "history.bin": 2 * N * KEPT_LOOKS,
    }


def test_memory_is_linear_in_the_data() -> None:
    def held(n: int, c: int) -> int:
        kept = Predictions(n, c, dtype=torch.float16)
        return sum(
            v.numel() * v.element_size() for v in vars(kept).values() if isinstance(v, Tensor)
        )

    assert held(2000, 10) == 2 * held(1000, 10)
    assert held(1000, 110) - held(1000, 10) == 3 * 2 * 1000 * 100


def test_canaries_of_ones_own() -> None:
    y = with_errors(labels(), [3])
    canaries = Canaries(y, fraction=0.1, seed=4)
    auditor = Auditor(canaries)
    assert torch.equal(auditor.targets, canaries.targets)
    feed(auditor, confident(labels()))
    result = auditor.result()
    np.testing.assert_array_equal(result.labels, y)
    assert result.recall is not None
    with pytest.raises(ValueError, match="canaries are of 3 classes, but kind='binary' has 2"):
        Auditor(Canaries(labels(c=2), classes=3, fraction=0.1), kind="binary")


class Pairs(torch.utils.data.Dataset[Any]):
    def __init__(self, *, named: bool) -> None:
        self.named = named

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        x, y = torch.tensor([float(index)]), int(labels()[index])
        return {"x": x, "labels": y} if self.named else (x, y)


def test_a_data_set_says_which_example_is_which() -> None:
    auditor = Auditor(labels(), plant=0.3)
    loader = torch.utils.data.DataLoader(
        auditor.dataset(Pairs(named=False)), batch_size=20, shuffle=True
    )
    for x, y, index in loader:
        assert torch.equal(x.squeeze(1).long(), index)
        assert torch.equal(y, auditor.targets[index])
        auditor.update(index, confident(labels()[index]), y)
    named = auditor.dataset(Pairs(named=True))
    assert len(named) == N  # pyrefly: ignore
    assert named[7]["index"] == 7
    assert named[-1]["index"] == N - 1
    assert [x["index"] for x in named] == list(range(N))  # a loop ends
    assert int(named[7]["labels"]) == int(auditor.targets[7])
    with pytest.raises(KeyError, match="no 'label' but x, labels; pass label="):
        _ = auditor.dataset(Pairs(named=True), label="label")[0]
    with pytest.raises(ValueError, match="dataset has 200 examples, but the auditor 20 targets"):
        Auditor(labels(20)).dataset(Pairs(named=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Auditor(labels(), kind="ranks"), "kind must be one of 'classes', 'binary'"),
        (lambda: Auditor(labels(), plant=0.6), r"plant must lie in \[0.0, 0.5\]"),
        (lambda: Auditor(labels(), limit=0), r"limit must lie in \(0.0"),
        (lambda: Auditor(labels(), dtype=torch.bfloat16), "dtype must be one of 'torch.float16'"),
        (lambda: Auditor([0, 1]), "a tensor, with numbers in place of names, but got list"),
        (lambda: Auditor(torch.zeros(1).long()), r"targets must hold at least two, but got shape"),
        (lambda: Auditor(labels().float()), "must be integers"),
        (lambda: Auditor(F.one_hot(labels())), "kind='classes' must be integers"),
        (lambda: Auditor(labels(), kind="regression"), "kind='regression' must be numbers"),
        (lambda: Auditor(labels(), kind="binary"), r"labels must lie in 0..1 .*0..3"),
        (lambda: Auditor(labels(), kind="multilabel"), r"kind='multilabel' must be \(n, k\)"),
        (lambda: Auditor(labels(), classes=3), r"labels must lie in 0..2"),
        (lambda: Auditor(labels(), classes=1), r"classes must be at least 2"),
        (lambda: Auditor(torch.full((9,), -100)), "at least two labels, but the others are miss"),
        (
            lambda: Auditor(torch.tensor([1.0, torch.nan]), kind="regression"),
            "at least two labels, but the others are miss",
        ),
        (lambda: Auditor(torch.tensor([1.0, torch.inf]), kind="regression"), "targets hold Inf"),
    ],
)
def test_a_bad_argument_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("index", "outputs", "targets", "message"),
    [
        ([0, 1], confident(labels())[:3], None, "have 2, 3 and 2 rows"),
        ([N], confident(labels())[:1], labels()[:1], "index must lie in 0..199"),
        ([0], confident(labels(), 5)[:1], None, r"outputs must have shape \(b, 4\).*classes="),
        ([0], confident(labels())[:1, 0], None, r"outputs must have shape \(b, 4\)"),
        ([0], [1.0], None, "outputs must be a tensor"),
        ([0], confident(labels())[:1], [0], "targets must be a tensor"),
        ([0, 1], confident(labels())[:2], F.one_hot(labels()[:2]), r"shape \(2,\) as in training"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    index: Any, outputs: Any, targets: Any, message: str
) -> None:
    auditor = Auditor(labels(), plant=0)
    targets = labels()[index] if targets is None else targets
    with pytest.raises((TypeError, ValueError), match=message):
        auditor.update(index, outputs, targets)
    assert not auditor.predictions.seen.any()


def test_training_on_other_labels_is_refused() -> None:
    y = labels()
    auditor = Auditor(y, plant=0.3)
    with pytest.raises(ValueError, match=r"are not those of the auditor.*auditor\.targets"):
        auditor.update(torch.arange(N), confident(y), y)


def test_shapes_of_other_kinds_are_refused_by_name() -> None:
    two = Auditor(labels(c=2), kind="binary")
    with pytest.raises(ValueError, match=r"outputs must have the shape of the targets, \(3,\)"):
        two.update([0, 1, 2], torch.zeros(3, 2), two.targets[:3])


def test_a_result_before_any_batch_is_refused() -> None:
    with pytest.raises(RuntimeError, match="seen no batch; call update"):
        Auditor(labels()).result()


def test_outputs_are_copied_and_their_graph_is_left_alone() -> None:
    y = labels()
    auditor = Auditor(y)
    outputs = confident(y).requires_grad_()
    auditor.update(torch.arange(N), outputs, auditor.targets)
    assert outputs.grad is None
    assert not auditor.predictions.present.requires_grad
    with torch.no_grad():
        outputs.zero_()
    assert auditor.result().suspect.sum() == 0


def test_it_shows_itself_on_one_line() -> None:
    auditor = Auditor(labels())
    assert repr(auditor) == "Auditor(classes, 200 examples, planted=10, looks=0)"
    feed(auditor, confident(labels()))
    result = auditor.result()
    assert repr(result).startswith("AuditResult(classes, 0 of 200 labels suspect, wrong_share=0.0")
    assert "\n" not in repr(result)


@pytest.mark.parametrize(
    "module",
    [
        *(f"poprisk.audit.{name}" for name in "auditor noise rate scores trained".split()),
        "poprisk.protocols",
    ],
)
def test_examples_of_docstrings_are_exact(module: str) -> None:
    failed, attempted = doctest.testmod(
        importlib.import_module(module), extraglobs={"torch": torch, "np": np}
    )
    assert attempted
    assert failed == 0
