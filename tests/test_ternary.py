"""The layer of the ternary study: what it computes, and what its gradient is."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from poprisk_lab.arms import Arm

SCRIPT: dict[str, Any] = runpy.run_path(
    str(Path(__file__).parents[1] / "benchmarks" / "ternary.py")
)


def test_weights_are_three_values_and_gradients_pass_straight() -> None:
    layer = SCRIPT["Ternary"](3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, -0.9, 2.0], [0.6, -0.2, 0.4]]))
    scale = 4.2 / 6
    expected = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, 1.0]])
    assert torch.equal(layer.signs, expected)
    x = torch.tensor([[1.0, 2.0, 4.0]])
    out = layer(x)
    assert out[0].tolist() == pytest.approx([2 * scale, 5 * scale])
    out.sum().backward()
    assert torch.equal(layer.weight.grad, x.expand(2, 3))  # as of a plain layer


def test_a_training_ends_with_its_figures() -> None:
    task = SCRIPT["ternary"](0, noise=0.4, hidden=8)
    object.__setattr__(task, "epochs", 2)
    found = SCRIPT["trained"](task, Arm("poprisk", "", "poprisk", "poprisk"), 0)
    assert 0 < found["changed"] < 1
    assert 0 < found["zeros"] < 1
    assert found["best"] >= found["final"] > 0
    assert sum(p.numel() for p in task.new_model().parameters()) == 8 * (64 + 8 + 10) + 26 + 4 * 8
