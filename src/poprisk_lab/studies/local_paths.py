r"""Paths of small nets whose layers learn by themselves: what of the theory holds for them exactly.

Let :math:`u_l` be the outputs of layer l, by which it is trained, :math:`u = (u_1, \dots, u_L)`
those of all, and :math:`\Phi(u) = \sum_l \Phi_l(u_l)`. What a layer hands on is detached, so that
the gradient of training is :math:`J_{loc}^T S g` with :math:`g = \nabla\Phi` and a Jacobian that is
block-diagonal over layers. What the outputs do follows from J, with the blocks below the diagonal
in it too: a layer's outputs move with its inputs. Along a realized run (THEORY §3)

.. math:: Q_k = \beta_1 Q_{k-1} + (1-\beta_1) J_{loc,k}^T S_k P_k,\quad
          P_{k+1} = P_k - \bar B_k \bar J_k\, \eta M Q_k,\quad
          G = \sum_k \bar J^Q_k\, \eta M Q_k,\quad W = \sum_k \eta\, Q_k^T M Q_k.

*Exact, as they are*: both displacements and the propagator (:math:`\bar J\Delta w = \Delta u` knows
nothing of how the step was made), :math:`W \succeq 0`, :math:`\ker W \subseteq \ker G \cap \ker D`
(G and D read Q alone), the split of :math:`g_0` by labels, and so the four cells and
:math:`A_\circ`. *Not any more*: the kernel :math:`J M J_{loc}^T` is neither symmetric nor positive,
so that :math:`\Phi_0 - \Phi_K = g_0^T W g_0` fails in the limit of small steps, and a step may
raise Φ however small it is: lower layers move the inputs of upper ones without asking. *Different
by rule*: the gradient of Mono-Forward's loss is affine in labels and its curvature B free of them;
Forward-Forward's gradient is affine in one-hot labels where wrong labels are weighed alike, but B
depends on them, so that P does.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from poprisk.path import Run, record
from poprisk.path.closure import relative
from poprisk.path.operators import PathOperators, path_operators
from poprisk.path.quadrature import averaged, gauss
from poprisk_lab.plots import short
from poprisk_lab.studies.claim import Metrics
from poprisk_lab.studies.small_nets import Examples
from poprisk_lab.tasks.local_nets import ForwardForward, goodness_loss
from poprisk_lab.tasks.local_rules import RULES

CLASSES, INPUTS, UNITS, N, M = 3, 16, 6, 60, 30
TOLERANCES = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)
random_goodness = partial(goodness_loss, negatives="random")
"""Forward-Forward's loss with wrong labels weighed alike: a function of outputs and labels."""
LOSSES = {name: rule.loss for name, rule in RULES.items()} | {"forward-forward": random_goodness}


class SmallDigits(NamedTuple):
    """Digits 0 to 2 on 4 × 4 pixels, float64.

    Attributes:
        train: with some wrong labels.
        query: with right ones.
        clean: right labels of the first.
    """

    train: Examples
    query: Examples
    clean: Tensor


def small_digits(seed: int, noise: float) -> SmallDigits:
    """Draw :data:`N` and :data:`M` pictures, and give ``round(noise·N)`` another class."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(n_class=CLASSES, return_X_y=True)
    x = nn.functional.avg_pool2d(torch.tensor(pixels).view(-1, 1, 8, 8) / 16, 2).flatten(1)
    y, g = torch.tensor(classes, dtype=torch.int64), torch.Generator().manual_seed(seed)
    train, query = torch.randperm(len(x), generator=g)[: N + M].split([N, M])
    given = y[train].clone()
    wrong = torch.randperm(N, generator=g)[: round(noise * N)]
    given[wrong] = (given[wrong] + torch.randint(1, CLASSES, (len(wrong),), generator=g)) % CLASSES
    return SmallDigits((x[train], given), (x[query], y[query]), y[train])


def small_net(rule: str, seed: int) -> nn.Module:
    """Two tanh layers, float64; activations below 1 take a lower threshold than those of ReLU."""
    torch.manual_seed(seed)
    widths, settings = (INPUTS, UNITS, UNITS), {"classes": CLASSES, "activation": nn.Tanh}
    if rule == "forward-forward":
        return ForwardForward(*widths, **settings, threshold=0.25, sharpness=8.0).double()
    return RULES[rule].net(*widths, **settings).double()


def follow_rule(rule: str, data: SmallDigits, *, seed: int, optimizer: str, steps: int) -> Run:
    """Train by a rule and record it: ``"sgd"`` on the full batch, ``"adamw"`` on minibatches."""
    net, g = small_net(rule, seed), torch.Generator().manual_seed(seed)
    if optimizer == "sgd":
        taking, batches = torch.optim.SGD(net.parameters(), lr=0.05), [torch.arange(N)] * steps
    else:
        taking = torch.optim.AdamW(net.parameters(), lr=0.005)
        batches = [torch.randperm(N, generator=g)[: N // 3] for _ in range(steps)]
    return record(net, LOSSES[rule], taking, batches, data.query, train=data.train)


def measure(run: Run, clean: Tensor) -> Metrics:
    r"""What the operators of a run say, and how far each identity is off.

    Returns:
        ``closure``: the worst; ``one_jacobian``: of the training displacement if outputs followed
        the gradients that training takes; ``accounted``: of the drop of the loss; ``quadratic``:
        :math:`g_0^T W g_0` over that drop; ``lowest``: the least eigenvalue of the kernel's
        symmetric part over the largest, at the end; ``psd``: likewise of W; ``coupling``: error of
        :math:`A_\circ`; ``leaks``, ``dimensions``: by tolerance; ``cells``: see :func:`_cells`.
    """
    ops = path_operators(run, "gauss5")
    drop, accounted, quadratic = ops.accounting
    last, values = ops.integrals.snapshots[-1], ops.spectrum.eigenvalues
    symmetric = torch.linalg.eigvalsh((last.kernel + last.kernel.T) / 2)
    return {
        "closure": ops.closure.worst,
        "one_jacobian": short(own_mismatch(run)),
        "accounted": abs(accounted - drop) / abs(drop),
        "drop": short(drop),
        "quadratic": short(quadratic / drop),
        "lowest": float(symmetric[0] / symmetric[-1]),
        "psd": float(values[-1] / values[0]),
        "coupling": ops.coupling().prediction.error,
        "leaks": {f"{t:g}": leak(ops, t) for t in TOLERANCES},
        "dimensions": {f"{t:g}": ops.channel(t).dimension for t in TOLERANCES},
        "cells": _cells(ops, clean),
    }


def own_mismatch(run: Run) -> float:
    """Relative error of the training displacement by the Jacobian that the gradients come from."""
    J, x = run.problem.J, run.problem.train[0]
    predicted = torch.zeros(run.problem.n, run.problem.c, dtype=torch.float64)
    for k in range(len(run)):
        w, end = run.weights[k], run.weights[k + 1]
        step = (end - w).unsqueeze(1)
        predicted += averaged(
            lambda a: J.jvp(torch.lerp(w, end, a), x, step).squeeze(-1),  # noqa: B023
            gauss(3),
        )
    first, last = (J.values(run.weights[k], x) for k in (0, len(run)))
    return relative(predicted, last - first)


def leak(ops: PathOperators, tol: float) -> float:
    r"""What queries see of the soft reservoir, :math:`\|G R\|_2/\|G\|_2` with its basis R."""
    reservoir = ops.channel(tol).reservoir
    if not reservoir.shape[1]:
        return 0.0
    norm = torch.linalg.matrix_norm
    return float(norm(ops.G @ reservoir, 2) / norm(ops.G, 2))


def _cells(ops: PathOperators, clean: Tensor) -> Metrics:
    """Movement of queries by the four cells, shares of signal and noise in the channel.

    Movements are root mean squares over that of the realized movement; ``memorized``: the share of
    wrong training labels that the trained net gives.
    """
    found, problem = ops.four_cells(clean), ops.run.problem
    total = found.cells.total().norm()
    u = ops.integrals.snapshots[-1].train_outputs.view(problem.n, *problem.output_shape)
    guessed = (u.sum(-1) if u.ndim > 2 else u).argmax(1)
    wrong = problem.train[1] != clean
    return {
        **{name: short(float(part.norm() / total)) for name, part in found.cells._asdict().items()},
        "signal_share": short(found.signal_share),
        "noise_share": short(found.noise_share),
        "closure": found.closure,
        "memorized": short(float((guessed == problem.train[1])[wrong].double().mean())),
    }
