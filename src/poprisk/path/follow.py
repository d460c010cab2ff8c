r"""The path operators applied to a few vectors, for models of any size.

To follow :math:`P_k \xi` takes one transposed-Jacobian product on the batch and a few Jacobian
products a step and vector; no matrix of size N is formed. THEORY §3 (ours).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poprisk import _validate as checks
from poprisk.path.checks import check_probes
from poprisk.path.closure import Closure
from poprisk.path.march import Applied, Followed, March, is_early
from poprisk.path.quadrature import Nodes, composite
from poprisk.path.run import Run
from poprisk.protocols import ProgressCallback


def follow(
    run: Run,
    probes: Tensor,
    *,
    every: int = 1,
    quadrature: str = "gauss3",
    segments: int = 1,
    points: int = 2,
    decaying: bool = False,
    dtype: torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> Followed:
    r"""Follow output gradients along a run, and what is affine beside them.

    With ``every=1`` this is the exact recursion of :func:`poprisk.path.integrate`. A larger one
    moves all n + m outputs only every so many intervals, along the chord, and in between only
    those of the present batch, which costs less and is second-order accurate.

    Args:
        run: a recorded run.
        probes: starting output gradients, (n, c, r).
        every: intervals between updates of all outputs; before the first of them there are some
            after 1, 2, 4, ... intervals.
        quadrature: of the chord.
        segments: pieces of the chord.
        points: moments to keep, the last among them.
        decaying: let weight decay act on what each probe moved, and on the weights of the start in
            the affine part: how the run would have answered to other labels. Otherwise all of
            decay is affine, as in :math:`D` and :math:`G`. Either way all columns add up.
        dtype: to compute in; None: that of the weights.
        progress: told of each interval.

    Raises:
        ValueError: for probes of another shape, or bad settings.
    """
    checks.check_positive("every", every)
    check_probes(probes, (run.problem.n, run.problem.c))
    nodes = composite(quadrature, segments)
    kept = {len(run), *(round(i * len(run) / max(points - 1, 1)) for i in range(points))}
    with torch.inference_mode(False):
        march = _start(run, probes.clone(), dtype or run.weights.dtype, nodes, decaying=decaying)
        for k, interval in enumerate(run.intervals):
            end = run.weights[k + 1].to(march.w)
            march.advance(run.rule(k, end.dtype), interval.examples, interval.sampling, end)
            done = k + 1
            if done % every == 0 or done == len(run):
                march.refresh()
                if any(done - every < i <= done for i in kept):
                    march.keep()
            elif is_early(done, every):
                march.refresh()
            if progress is not None:
                progress(k + 1, len(run))
        return march.result()


def follow_all(run: Run, probes: Tensor, **settings: Any) -> tuple[Applied, Closure]:
    r"""Follow any probes, and beside them what they leave of :math:`g_0`, to know the closure.

    Args:
        run: a recorded run.
        probes: starting output gradients, (n, c, r).
        settings: of :func:`follow`.
    """
    check_probes(probes, (run.problem.n, run.problem.c))
    w = run.weights[0].to(settings.get("dtype") or run.weights.dtype)
    problem, probes, r = run.problem.to(w.dtype), probes.to(w), probes.shape[-1]
    g = problem.output_gradient(problem.J.values(w, problem.train[0]))
    rest = (g - probes.sum(-1)).unsqueeze(-1)
    followed = follow(run, torch.cat([probes, rest], -1), **settings)
    return Applied(*(t[..., :r] for t in followed.applied)), followed.closure()


def _start(run: Run, probes: Tensor, dtype: torch.dtype, nodes: Nodes, *, decaying: bool) -> March:
    """The columns before the first step; an affine one only where something is affine."""
    w, affine = run.weights[0].to(dtype), has_affine_part(run)
    return March(
        run.problem.to(dtype),
        w,
        probes,
        nodes,
        momentum=run.momentum_in.to(w) if affine else None,
        decaying=affine and decaying,
    )


def has_affine_part(run: Run) -> bool:
    """Whether anything but the starting output gradient moved the weights."""
    return bool(run.momentum_in.any()) or any(i.rule.decays for i in run.intervals)
