"""Where a predictor of test movement errs: what none can see, and where it is not the best one."""

from __future__ import annotations

import torch

from poprisk.path.coupling import TransferError, coupling_matrix, transfer_error
from poprisk.path.operators import PathOperators
from poprisk_lab.results import Results
from poprisk_lab.studies.claim import Metrics
from poprisk_lab.studies.criteria import Criterion, at_least, at_most, geometric

CHANNEL = 1e-12
"""Tolerance of the channel that a coupling is made in, as :meth:`PathOperators.coupling` has it."""
PREDICTORS = {
    "own": "the run's own coupling",
    "other": "the coupling of a run with other labels",
    "frozen": "the kernel at the start",
}


def error_parts(first: PathOperators, other: PathOperators) -> Metrics:
    """Parts of the error with which each of :data:`PREDICTORS` predicts the movement of ``other``.

    Returns for each the norms of the four vectors of :class:`TransferError`, of their sum and of
    what the sum misses of the error, all over the norm of the movement, and ``share``: of the
    squared transfer error of Theorem E.3, over all starting output gradients, what is mismatch.
    """
    integrals, channel = other.integrals, other.channel(CHANNEL)
    matrices = {
        "own": coupling_matrix(integrals, channel),
        "other": coupling_matrix(first.integrals, first.channel(CHANNEL)),
        "frozen": integrals.frozen,
    }
    start, end = integrals.snapshots[0], integrals.snapshots[-1]
    train = end.train_outputs - start.train_outputs + integrals.affine.train
    query = end.query_outputs - start.query_outputs
    size = float(query.norm())
    found: Metrics = {}
    for name, A in matrices.items():
        error = transfer_error(integrals, channel, A)
        gap = error.total() - (query + integrals.affine.query - A @ train)
        found[name] = {key: value / size for key, value in _norms(error).items()}
        found[name] |= {"gap": float(gap.norm()) / size, "share": _share(error)}
    return found


def _norms(error: TransferError) -> dict[str, float]:
    parts = error._asdict()
    vectors = {key: v for key, v in parts.items() if isinstance(v, torch.Tensor)}
    return {key: float(v.norm()) for key, v in {**vectors, "total": error.total()}.items()}


def _share(error: TransferError) -> float:
    unseen, mismatch = error.unseen_norm**2, error.mismatch_norm**2
    return mismatch / (unseen + mismatch) if mismatch else 0.0


def error_criteria(results: Results) -> list[Criterion]:
    """That the parts add up, how large each is, and which of the two of Theorem E.3 is larger."""
    if not results:
        return []
    gaps = Results(results).largest(("own", "gap"))
    found = [
        at_most("parts of the transfer error (E.3): what their sum misses of the error, over the "
                "movement, largest", gaps, 1e-6)
    ]  # fmt: skip
    for name in ("other", "frozen"):
        about = f"by {PREDICTORS[name]}"
        errors = geometric([max(v, 1e-16) for v in results.all((name, "mismatch"))])
        found += [
            at_least(f"share of mismatch in the squared transfer error (E.3), {about}",
                     results.mean((name, "share")), 0.5),
            at_most(f"mismatch over the movement, {about}", errors, 0.5),
        ]  # fmt: skip
    unseen = geometric([max(v, 1e-16) for v in results.all(("own", "unseen"))])
    return [*found, at_most("unseen by every predictor, over the movement", unseen, 0.5)]
