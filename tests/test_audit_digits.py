"""Wrong labels of real images, found by one run behind the gate."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk import Auditor, AuditResult, Canaries, PopRiskAdamW, audit

N, EPOCHS = 600, 30
pytestmark = pytest.mark.slow


class Found(NamedTuple):
    """A run's audit, an audit of the model at its end, and which labels are wrong."""

    along: AuditResult
    end: AuditResult
    wrong: Tensor

    def precision(self, result: AuditResult) -> float:
        return float(average_precision_score(self.wrong, -result.margin))


def run(noise: str, optimizer: str) -> Found:
    images, digits = load_digits(return_X_y=True)
    x, true = torch.tensor(images[:N] / 16).float(), torch.tensor(digits[:N])
    g = torch.Generator().manual_seed(0)
    wrong = torch.rand(N, generator=g) < (0.3 if noise == "pairs" else 0.2)
    step = torch.ones(N, dtype=torch.long)
    if noise == "random":
        step = torch.randint(1, 10, (N,), generator=g)
    given = torch.where(wrong, (true + step) % 10, true)
    canaries = Canaries(given, fraction=0.1)
    auditor = Auditor(canaries)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    opt: torch.optim.Optimizer = (
        PopRiskAdamW(model.parameters(), lr=3e-3, batch_size=50, dataset_size=N)
        if optimizer == "gate"
        else torch.optim.AdamW(model.parameters(), lr=1e-2)
    )
    for _ in range(EPOCHS):
        for index in torch.randperm(N).split(50):
            outputs, y = model(x[index]), auditor.targets[index]
            auditor.update(index, outputs, y)
            opt.zero_grad()
            F.cross_entropy(outputs, y).backward()
            opt.step()
    return Found(auditor.result(), audit(model, x, canaries, structure=False), wrong)


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], Found]:
    cases = [("random", "gate"), ("pairs", "gate"), ("random", "adamw")]
    return {case: run(*case) for case in cases}


@pytest.mark.parametrize(("noise", "least"), [("random", 0.85), ("pairs", 0.75)])
def test_a_gated_run_finds_wrong_digits(
    runs: dict[tuple[str, str], Found], noise: str, least: float
) -> None:
    found = runs[noise, "gate"]
    result = found.along
    assert result.valid, result.reason
    assert found.precision(result) > 0.9
    assert f1_score(found.wrong, result.suspect) > least
    assert result.value == pytest.approx(float(found.wrong.float().mean()), abs=0.05)
    assert result.recall is not None
    recall = float(result.suspect[found.wrong.numpy()].mean())
    assert abs(result.recall.value - recall) < 0.2


def test_the_noise_between_pairs_of_classes_is_seen(
    runs: dict[tuple[str, str], Found],
) -> None:
    matrix = runs["pairs", "gate"].along.noise_matrix
    assert matrix is not None
    off = matrix - np.diag(matrix.diagonal())
    assert (off.argmax(1) == (np.arange(10) + 1) % 10).mean() >= 0.9


def test_adamw_is_heard_until_it_memorizes(runs: dict[tuple[str, str], Found]) -> None:
    found = runs["random", "adamw"]
    believed = [look.believed for look in found.along.looks]
    assert believed[0]
    assert not believed[-1]
    assert found.along.valid, found.along.reason
    assert found.precision(found.along) > found.precision(found.end) + 0.1
