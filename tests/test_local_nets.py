"""Networks whose layers learn by themselves: against their definitions, one layer at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poprisk import PopRiskAdamW
from poprisk_lab.studies.local_paths import LOSSES
from poprisk_lab.tasks import load_task
from poprisk_lab.tasks.local_nets import (
    ForwardForward,
    MonoForward,
    goodness_loss,
    layered_cross_entropy,
    summed_accuracy,
)
from poprisk_lab.tasks.local_rules import RULES, local_task
from samplers import randn

C = 3


def forward_forward(**settings: Any) -> ForwardForward:
    torch.manual_seed(0)
    return ForwardForward(4, 6, 5, classes=C, **settings).double()


def mono_forward() -> MonoForward:
    torch.manual_seed(0)
    return MonoForward(4, 6, 5, classes=C).double()


def goodnesses(net: ForwardForward, x: Tensor, label: int) -> list[float]:
    """The mean square of each layer's activations for one example with one label."""
    given = torch.zeros(C, dtype=torch.float64)
    given[label] = net.label
    h, found = torch.cat([x, given]), list[float]()
    for layer in net.layers:
        assert isinstance(layer, nn.Linear)
        h = (layer.weight @ h + layer.bias).clamp_min(0)
        goodness = (h * h).sum().item() / len(h)
        found.append(goodness)
        h = h / math.sqrt(goodness + 1e-8)
    return found


def softplus(z: float) -> float:
    return math.log1p(math.exp(z))


@pytest.mark.parametrize("label", [1.0, 2.5])
def test_goodness_is_the_mean_square_with_each_label_in_the_input(label: float) -> None:
    net, x = forward_forward(threshold=0.3, sharpness=7.0, label=label), randn(5, 4, seed=1)
    u = net(x)
    assert u.shape == (5, C, 2)
    for i in range(5):
        for a in range(C):
            for layer, goodness in enumerate(goodnesses(net, x[i], a)):
                assert u[i, a, layer].item() == pytest.approx(7.0 * (goodness - 0.3), abs=1e-9)


@pytest.mark.parametrize("negatives", ["random", "hard"])
def test_the_loss_is_that_of_hinton_in_expectation_over_wrong_labels(negatives: str) -> None:
    u, y = 2 * randn(4, C, 2, seed=2), torch.tensor([0, 2, 1, 1])
    found = goodness_loss(u, y, negatives=negatives, temperature=3.0)
    for i in range(4):
        wrong = [a for a in range(C) if a != int(y[i])]
        scores = [math.exp(float(u[i, a].sum()) / 3.0) for a in wrong]
        chances = [s / sum(scores) if negatives == "hard" else 1 / len(wrong) for s in scores]
        expected = sum(softplus(-float(u[i, y[i], k])) for k in range(2))
        for a, q in zip(wrong, chances, strict=True):
            expected += q * sum(softplus(float(u[i, a, k])) for k in range(2))
        assert float(found[i]) == pytest.approx(expected, rel=1e-9)


def test_the_mean_of_drawn_wrong_labels_is_the_expectation() -> None:
    """Hinton draws one: its gradient has the expectation's mean."""
    u, y = randn(1, C, 2, seed=3).requires_grad_(), torch.tensor([1])
    (expected,) = torch.autograd.grad(goodness_loss(u, y, temperature=1.0).sum(), u)
    q = u.detach().sum(-1)[0]
    q[1] = -math.inf
    mean = torch.zeros_like(u)
    for a, chance in enumerate(q.softmax(0)):
        if a != 1:
            loss = nn.functional.softplus(-u[0, 1]).sum() + nn.functional.softplus(u[0, a]).sum()
            mean += chance * torch.autograd.grad(loss, u)[0]
    torch.testing.assert_close(mean, expected)


def test_logits_of_each_layer_are_those_of_its_own_classifier() -> None:
    net, x = mono_forward(), randn(5, 4, seed=1)
    h = x
    for k in range(2):
        h = net.layers[k](h).relu()
        torch.testing.assert_close(net(x)[..., k], net.heads[k](h))
    y = torch.tensor([0, 1, 2, 0, 1])
    each = [nn.functional.cross_entropy(net(x)[..., k], y, reduction="none") for k in range(2)]
    torch.testing.assert_close(layered_cross_entropy(net(x), y), sum(each))
    soft = nn.functional.one_hot(y, C).double()
    torch.testing.assert_close(layered_cross_entropy(net(x), soft), sum(each))


@pytest.mark.parametrize("rule", ["forward-forward", "mono-forward"])
def test_no_layer_learns_from_the_loss_of_another(rule: str) -> None:
    net = forward_forward() if rule == "forward-forward" else mono_forward()
    loss, x, y = LOSSES[rule], randn(5, 4, seed=1), torch.tensor([0, 1, 2, 0, 1])
    loss(net(x), y).sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    for k in range(2):
        net.zero_grad()
        loss(net(x)[..., k : k + 1], y).sum().backward()
        for name, p in net.named_parameters():
            own = f".{k}." in name
            assert (p.grad is not None and bool(p.grad.any())) == own
            if own:
                torch.testing.assert_close(p.grad, grads[name])


def test_a_net_of_one_layer_of_its_own_is_backpropagation() -> None:
    net = MonoForward(4, 6, classes=C).double()
    whole = nn.Sequential(net.layers[0], nn.ReLU(), net.heads[0])
    x, y = randn(5, 4, seed=1), torch.tensor([0, 1, 2, 0, 1])
    ours = torch.autograd.grad(layered_cross_entropy(net(x), y).sum(), [*net.parameters()])
    theirs = torch.autograd.grad(
        nn.functional.cross_entropy(whole(x), y, reduction="sum"), [*net.parameters()]
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rule", ["forward-forward", "mono-forward"])
def test_the_exact_variance_is_that_of_per_example_gradients(rule: str) -> None:
    """Local losses have per-example gradients as others have."""
    net = forward_forward() if rule == "forward-forward" else mono_forward()
    loss, x, y = RULES[rule].loss, randn(6, 4, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
    rows = [torch.autograd.grad(loss(net(x[i : i + 1]), y[i : i + 1]).sum(), [*net.parameters()])
            for i in range(6)]  # fmt: skip
    opt = PopRiskAdamW(net, lr=1e-2, batch_size=6, variance="exact", rho=0.0)
    opt.zero_grad()
    opt.backward(loss(net(x), y))
    opt.step()
    expected = torch.cat([torch.stack(g).var(0).flatten() / 6 for g in zip(*rows, strict=True)])
    found = torch.cat([opt.state[p]["grad_mean_var"].flatten() for p in net.parameters()])
    factor = found.sum() / expected.sum()  # of the average over steps, alike for all
    torch.testing.assert_close(found, factor * expected)


def test_accuracy_is_of_the_sum_over_layers() -> None:
    u = torch.tensor([[[3.0, -5.0], [0.0, 0.0]], [[1.0, 1.0], [5.0, -4.0]]])
    assert summed_accuracy(u, torch.tensor([1, 0])) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ForwardForward(4, classes=3), "widths must be those of the inputs and of a layer"),
        (lambda: MonoForward(4, 0, classes=3), "widths must be"),
        (lambda: MonoForward(4, 3, classes=1), "classes must be at least 2"),
        (lambda: ForwardForward(4, 3, classes=3, sharpness=0.0), "sharpness must lie"),
        (lambda: goodness_loss(torch.zeros(1, 3, 1), torch.zeros(1).long(), negatives="soft"),
         "negatives must be"),
        (lambda: goodness_loss(torch.zeros(1, 3, 1), torch.zeros(1).long(), temperature=0.0),
         "temperature must lie"),
        (lambda: local_task(0, rule="backprop"), "rule must be"),
        (lambda: local_task(0, rule="mono-forward", data="mnist"), "data must be"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["digits-forward-forward", "digits-mono-forward"])
def test_tasks_know_what_was_memorized(name: str) -> None:
    task = load_task(name, seed=0, noise=0.2, hidden=8)
    assert task.clean is not None
    wrong = task.train[1] != task.clean
    assert int(wrong.sum()) == 200
    follows = nn.functional.one_hot(task.train[1], 10).unsqueeze(-1).expand(-1, -1, 2).double()
    assert task.memorized(follows) == 1.0
    right = nn.functional.one_hot(task.clean, 10).unsqueeze(-1).expand(-1, -1, 2).double()
    assert task.memorized(right) == 0.0
    assert task.scored_by.function(follows, task.train[1]) == 1.0
