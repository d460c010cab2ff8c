"""Digits and signals for networks whose layers learn by themselves, and by backpropagation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from poprisk._validate import check_choice, check_positive
from poprisk.losses import cross_entropy
from poprisk.protocols import PerExampleLoss
from poprisk.task import METRICS, Metric, Task
from poprisk_lab.tasks.local_nets import (
    SUMMED_ACCURACY,
    ForwardForward,
    MonoForward,
    goodness_loss,
    layered_cross_entropy,
)
from poprisk_lab.tasks.mislabelled import mislabelled
from poprisk_lab.tasks.nets import mlp

DATA = ("digits", "mnist1d")
EPOCHS, HIDDEN = 60, 256


class LocalRule(NamedTuple):
    """A way to train layers.

    Attributes:
        label: in tables and plots.
        net: from widths (inputs and layers), classes and activation to a net.
        loss: of its outputs.
        metric: likewise.
    """

    label: str
    net: Callable[..., nn.Module]
    loss: PerExampleLoss
    metric: Metric = SUMMED_ACCURACY


def _mlp(*widths: int, classes: int, **settings: Any) -> nn.Module:
    return mlp(*widths, classes, **settings)


RULES = {
    "forward-forward": LocalRule("Forward-Forward", ForwardForward, goodness_loss),
    "mono-forward": LocalRule("Mono-Forward", MonoForward, layered_cross_entropy),
    "backpropagation": LocalRule("backpropagation", _mlp, cross_entropy, METRICS["accuracy"]),
}


def local_task(
    seed: int,
    *,
    rule: str,
    data: str = "digits",
    noise: float = 0.0,
    hidden: int = HIDDEN,
    epochs: int = EPOCHS,
    name: str = "",
) -> Task:
    """Ten classes for two hidden layers that learn by one of :data:`RULES`.

    Args:
        seed: of the split and of the wrong labels.
        rule: its name.
        data: ``digits`` (1,000 for training, 797 for testing) or ``mnist1d`` (2,000 and 3,000).
        noise: share of the training labels that are wrong, another class at random.
        hidden: units of each layer.
        epochs: passes.
        name: of the task.

    Raises:
        TypeError, ValueError: for a bad argument.
        ImportError: for ``mnist1d`` without the package of that name.
    """
    check_choice("rule", rule, tuple(RULES))
    check_choice("data", data, DATA)
    check_positive("hidden", hidden)
    drawn, chosen = mislabelled(data, "random", noise, seed=seed), RULES[rule]
    widths = drawn.x.shape[1], hidden, hidden
    return Task(
        name=name or f"{data}-{rule}",
        model=partial(chosen.net, *widths, classes=drawn.classes),
        loss=chosen.loss,
        train=(drawn.x, drawn.given),
        test=(drawn.x_test, drawn.y_test),
        metric=chosen.metric,
        clean=drawn.true,
        epochs=epochs,
        description=f"{data}, {chosen.label}, {noise:.0%} of the training labels wrong",
    )


def digits_forward_forward(seed: int = 0, *, noise: float = 0.0, hidden: int = HIDDEN) -> Task:
    """The digits, two layers that tell right labels from wrong ones by their goodness."""
    return local_task(seed, rule="forward-forward", noise=noise, hidden=hidden)


def digits_mono_forward(seed: int = 0, *, noise: float = 0.0, hidden: int = HIDDEN) -> Task:
    """The digits, two layers with a classifier each."""
    return local_task(seed, rule="mono-forward", noise=noise, hidden=hidden)
