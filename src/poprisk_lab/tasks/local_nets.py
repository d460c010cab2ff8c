r"""Networks whose layers learn from losses of their own, without a backward pass through others.

*Forward-Forward* (Hinton 2022, arXiv:2212.13345): the label goes in with the input, and a layer
tells right labels from wrong ones by its *goodness*, the mean square of its activations, of which
:math:`u = \beta(\text{goodness} - \theta)` is the logit:
:math:`\ell = \sum_l \log(1+e^{-u_l(y)}) + \sum_{a\ne y} q_a \log(1+e^{u_l(a)})`, with q the
distribution of the wrong label a. What a layer hands on has length one, so that the next cannot
read its goodness. Hinton draws one wrong label at a time; the expectation taken here has the same
mean gradient and no noise of the draw, and makes the loss a function of outputs and label.

*Mono-Forward* (Gong, Li and Abdulla 2025, arXiv:2501.09238): each layer has a linear classifier of
its own, trained together with it by the cross-entropy of its logits. The second rule here because
its loss is affine in labels, its curvature knows no label, and its outputs are those of a
classifier, which is what the operators of a path are easiest to read for.

Both put out a score of every class in every layer, (b, c, L), and predict by their sum over layers.
What a layer hands on is detached: the gradient of the sum of all losses is that of each layer's own
loss by its own weights, so that any optimizer trains all layers at once.
"""

from __future__ import annotations

import itertools
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk._validate import check_choice, check_number, check_positive
from poprisk.task.metrics import Metric, accuracy

NEGATIVES = ("hard", "random")
TINY = 1e-8


@final
class ForwardForward(nn.Module):
    """Fully connected layers trained by their goodness; the label is an input.

    Args:
        widths: of the inputs and of the layers, at least one.
        classes: c.
        activation: after each layer.
        threshold: θ, in mean squares.
        sharpness: β; the number of units would make a sum of squares of the mean.
        label: value of the input that stands for the label; the others are 0.

    Raises:
        TypeError, ValueError: for a bad argument.
    """

    def __init__(
        self,
        *widths: int,
        classes: int,
        activation: type[nn.Module] = nn.ReLU,
        threshold: float = 0.5,
        sharpness: float = 16.0,
        label: float = 1.0,
    ) -> None:
        super().__init__()
        _check_sizes(widths, classes)
        self.threshold = check_number("threshold", threshold, low=0.0)
        self.sharpness = check_number("sharpness", sharpness, low=0.0, include_low=False)
        self.classes, self.label = classes, check_number("label", label)
        inputs = (widths[0] + classes, *widths[1:-1])
        self.layers = nn.ModuleList(map(nn.Linear, inputs, widths[1:]))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the goodness with each label, (b, c, L), for inputs (b, ...)."""
        x = x.flatten(1)
        labels = self.label * torch.eye(self.classes, dtype=x.dtype, device=x.device)
        given = x.unsqueeze(1).expand(-1, self.classes, -1), labels.expand(len(x), -1, -1)
        h, scores = torch.cat(given, -1), list[Tensor]()
        for layer in self.layers:
            h = self.activation(layer(h.detach()))
            goodness = h.square().mean(-1, keepdim=True)
            scores.append(self.sharpness * (goodness - self.threshold))
            h = h / (goodness + TINY).sqrt()
        return torch.cat(scores, -1)


@final
class MonoForward(nn.Module):
    """Fully connected layers, each with a linear classifier that trains it.

    Args:
        widths: of the inputs and of the layers, at least one.
        classes: c.
        activation: after each layer.

    Raises:
        TypeError, ValueError: for a bad size.
    """

    def __init__(self, *widths: int, classes: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        _check_sizes(widths, classes)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.heads = nn.ModuleList(nn.Linear(width, classes) for width in widths[1:])
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each layer's classifier, (b, c, L), for inputs (b, ...)."""
        h, scores = x.flatten(1), list[Tensor]()
        for layer, head in zip(self.layers, self.heads, strict=True):
            h = self.activation(layer(h.detach()))
            scores.append(head(h))
        return torch.stack(scores, -1)


def goodness_loss(
    outputs: Tensor, labels: Tensor, *, negatives: str = "hard", temperature: float = 8.0
) -> Tensor:
    """Forward-Forward's loss of each example, summed over layers, (b,).

    Args:
        outputs: logits of the goodness with each label, (b, c, L).
        labels: classes (b,).
        negatives: how wrong labels are weighed: ``"random"``, all alike; ``"hard"``, by the softmax
            of the net's own summed logits over ``temperature``, through which no gradient goes.
        temperature: of hard ones; the larger, the more alike.

    Raises:
        TypeError, ValueError: for a bad setting.

    Example:
        >>> goodness_loss(torch.zeros(1, 3, 2), torch.tensor([0]))
        tensor([2.7726])
    """
    check_choice("negatives", negatives, NEGATIVES)
    check_number("temperature", temperature, low=0.0, include_low=False)
    right = F.one_hot(labels, outputs.shape[1]).to(outputs).unsqueeze(-1)
    q = (1 - right) / (outputs.shape[1] - 1)
    if negatives == "hard":
        scores = outputs.detach().sum(-1, keepdim=True) / temperature
        q = scores.masked_fill(right > 0, -torch.inf).softmax(1)
    return (right * F.softplus(-outputs) + q * F.softplus(outputs)).flatten(1).sum(1)


def layered_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the logits of every layer, summed over layers, (b,).

    Args:
        outputs: logits (b, c, L).
        targets: classes (b,), or probabilities (b, c).

    Example:
        >>> layered_cross_entropy(torch.zeros(1, 2, 3), torch.tensor([0]))
        tensor([2.0794])
    """
    of_layers = targets.unsqueeze(-1).expand(*targets.shape, outputs.shape[-1])
    return F.cross_entropy(outputs, of_layers, reduction="none").sum(1)


def summed_accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of examples (n, c, L) whose largest sum over layers is at their label (n,)."""
    return accuracy(outputs.sum(-1), labels)


SUMMED_ACCURACY = Metric("accuracy", summed_accuracy, percent=True)


def _check_sizes(widths: tuple[int, ...], classes: int) -> None:
    """Raise unless there are inputs, a layer and two classes."""
    if len(widths) < 2:
        raise ValueError(f"widths must be those of the inputs and of a layer, but got {widths}.")
    for width in widths:
        check_positive("widths", width)
    check_positive("classes", classes)
    if classes < 2:
        raise ValueError("classes must be at least 2: one class has no wrong label.")
