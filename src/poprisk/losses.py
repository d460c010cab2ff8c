r"""The training loss as a function of outputs: its gradient g and Hessian B, per example.

The total is the mean, :math:`\Phi_S(u) = \frac1n \sum_i \ell(u_i, y_i)`; the factor 1/n is put in
by whoever sums.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from poprisk._renamed import renamed_names
from poprisk._validate import check_choice, check_losses, shapes_hint
from poprisk.protocols import PerExampleLoss

IGNORED = -100
"""The label that torch's losses ignore unless told otherwise."""


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    r""":math:`\frac12 \|u - y\|^2` per example.

    Raises:
        ValueError: for as many targets in another shape, where torch would compare all with all.

    Example:
        >>> squared_error(torch.tensor([[3.0]]), torch.tensor([[1.0]]))
        tensor([2.])
    """
    if hint := shapes_hint(outputs, targets):
        raise ValueError(f"squared_error compares each output with its own target.{hint}")
    return (outputs - targets).square().flatten(1).sum(1) / 2


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (b, c) against classes (b,) or probabilities (b, c)."""
    return F.cross_entropy(outputs, targets, reduction="none")


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Logistic loss of logits (b, ...) against probabilities of the same shape, summed."""
    values = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def next_token(logits: Tensor, tokens: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Loss of each sequence: :math:`-\log p(s_t \mid s_{<t})` over its tokens but the first.

    Args:
        logits: of the token after each, (b, t, c), as a causal language model puts them out.
        tokens: the sequences, (b, t); those that are :data:`IGNORED` have no loss.
        reduction: ``"mean"`` or ``"sum"`` over the tokens of a sequence that have one. A mean over
            all tokens of a batch weighs sums.

    Raises:
        ValueError: for another reduction.

    Example:
        >>> next_token(torch.zeros(1, 3, 4), torch.tensor([[1, 2, 0]]))
        tensor([1.3863])
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    known = tokens[:, 1:]
    lost = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), known.flatten(), ignore_index=IGNORED, reduction="none"
    )
    sums = lost.unflatten(0, known.shape).sum(1)
    return sums if reduction == "sum" else sums / (known != IGNORED).sum(1).clamp_min(1)


def direct_preference(log_ratios: Tensor, reference: Tensor, *, beta: float = 0.1) -> Tensor:
    r"""DPO's loss of each pair, :math:`-\log\sigma(\beta(r - r_0))` (Rafailov et al., 2023).

    Args:
        log_ratios: :math:`r = \log\pi(y_w \mid x) - \log\pi(y_l \mid x)` of the chosen answer
            to the rejected one under the policy, (b,).
        reference: the same under the reference, (b,).
        beta: in front of the implicit reward.

    Example:
        >>> direct_preference(torch.tensor([2.0]), torch.tensor([2.0]))
        tensor([0.6931])
    """
    return -F.logsigmoid(beta * (log_ratios - reference))


LOSSES: dict[str, PerExampleLoss] = {
    "squared_error": squared_error,
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
}


def resolve_loss(loss: str | PerExampleLoss) -> PerExampleLoss:
    """The loss called by a name of :data:`LOSSES`, or the given function."""
    if callable(loss):
        return loss
    check_choice("loss", loss, LOSSES)
    return LOSSES[loss]


def values(loss: PerExampleLoss, u: Tensor, y: Tensor) -> Tensor:
    """Losses per example, (b,).

    Raises:
        ValueError: if the loss gives anything but one value per example.
    """
    return check_losses(loss(u, y), len(u), hint=shapes_hint(u, y))


def gradient(loss: PerExampleLoss, u: Tensor, y: Tensor) -> Tensor:
    r""":math:`\partial \ell_i / \partial u_i`, shape of ``u``."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        return _grad(values(loss, u, y).sum(), u)


def hessian(loss: PerExampleLoss, u: Tensor, y: Tensor) -> Tensor:
    r""":math:`\partial^2 \ell_i / \partial u_i^2` as (b, c, c), for outputs flattened to c."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        g = _grad(values(loss, u, y).sum(), u, create_graph=True).reshape(len(u), -1)
        rows = [_grad(g[:, j].sum(), u).reshape(len(u), -1) for j in range(g.shape[1])]
    return torch.stack(rows, dim=1)


def hessian_product(loss: PerExampleLoss, u: Tensor, y: Tensor, vectors: Tensor) -> Tensor:
    """The Hessian of each example times ``vectors`` (b, c, r), same shape; formed if c < r."""
    if u[0].numel() < vectors.shape[-1]:
        return hessian(loss, u, y) @ vectors
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        g = _grad(values(loss, u, y).sum(), u, create_graph=True).reshape(len(u), -1)
        columns = [
            _grad((g * vectors[..., j]).sum(), u).reshape(len(u), -1)
            for j in range(vectors.shape[-1])
        ]
    return torch.stack(columns, dim=-1)


def ignored_labels(loss: PerExampleLoss, y: Tensor) -> Tensor:
    """Which of the labels of classes the loss leaves out, in the shape of ``y``."""
    return y == getattr(loss, "ignore_index", IGNORED)


def _grad(total: Tensor, u: Tensor, *, create_graph: bool = False) -> Tensor:
    """Gradient of a sum; zero where it does not depend on ``u`` (a loss linear in it)."""
    if not total.requires_grad:
        return torch.zeros_like(u)
    (grad,) = torch.autograd.grad(
        total, u, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )
    return grad


__getattr__ = renamed_names(__name__, Loss="poprisk.protocols.PerExampleLoss")
