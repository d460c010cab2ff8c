"""What an installed `poprisk` does without the laboratory's packages, for built_wheel.py."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import poprisk
from poprisk.optim.fused.build import library

SEEN = 40
"""Training examples."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per example."""
    return F.cross_entropy(outputs, targets, reduction="none")


def check_installed(checkout: Path) -> None:
    """The package is the installed one, typed, and the extra's packages are not there."""
    where = Path(poprisk.__file__).resolve()
    assert not where.is_relative_to(checkout), where
    assert where.with_name("py.typed").exists()
    there = [name for name in ("typer", "rich", "plotly", "scipy", "sklearn") if find_spec(name)]
    assert not there, there
    try:
        import poprisk_lab as found
    except ModuleNotFoundError as error:
        found = str(error)
    assert re.fullmatch(r"poprisk_lab needs typer, .*: pip install 'poprisk\[lab\]'", str(found))


def train(net: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    """Ten steps, which must lower the loss."""
    before = cross_entropy(net(x), y).mean().item()
    for _ in range(10):
        optimizer.zero_grad()
        cross_entropy(net(x), y).mean().backward()
        optimizer.step()
    assert cross_entropy(net(x), y).mean().item() < before


def sgd(model: nn.Module) -> Optimizer:
    """Plain gradient descent."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def network() -> nn.Module:
    """Four inputs, two classes."""
    return nn.Linear(4, 2)


def check_risk(x: Tensor, y: Tensor) -> None:
    """A twin's estimate after three passes is a loss with an error."""
    twin = poprisk.TwinRisk(network, sgd, cross_entropy, dataset_size=SEEN)
    for index in torch.arange(SEEN).split(10) * 3:
        for run in twin.runs(index):
            run.optimizer.zero_grad()
            run.loss(run.model(x[index]), y[index]).mean().backward()
            run.optimizer.step()
    estimate = twin.estimate(x, y)
    assert 0.3 < estimate.value < 1.5, estimate
    assert 0 < estimate.standard_error < 1.0, estimate


def main(checkout: Path) -> None:
    """Try what the README shows of the library, on a toy."""
    check_installed(checkout)
    torch.manual_seed(0)
    x = torch.randn(SEEN, 4)
    y = (x[:, 0] > 0).long()
    for fused in (False, True):
        net = network()
        sizes = {"batch_size": SEEN, "dataset_size": 10 * SEEN}
        train(net, poprisk.PopRiskAdamW(net, lr=1e-2, fused=fused, **sizes), x, y)
    assert library() is not None, "the native kernel was not compiled"
    net = network()
    train(net, poprisk.gated(sgd(net), batch_size=SEEN), x, y)
    kernel = poprisk.entk(net, x).dense()
    torch.testing.assert_close(kernel[::2, ::2], x @ x.T + 1)  # weights and bias of one output
    check_risk(x, y)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
