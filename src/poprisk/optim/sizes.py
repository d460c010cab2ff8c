r"""How many examples stand behind a step, and of how many; of a loss of several terms, each.

Let the gradient of a step be a sum of independent terms, :math:`g = \sum_k g_k`, where
:math:`s_k` is the variance of :math:`g_k`, a mean over :math:`b_k` examples: measurements drawn
from :math:`n_k` of them that come again, or points drawn afresh for each step. Two errors stand
between the averaged gradient :math:`\hat m` and that of the population,

.. math:: \operatorname{Var}\hat m = \sum_k (r_t + \rho_k)\, s_k, \qquad
          \rho_k = \begin{cases} b_k/(n_k - b_k) & \text{repeated} \\ 0 & \text{fresh}
          \end{cases}

that of the batches, of which the average keeps :math:`r_t`, whatever the term; and that of the data
set, of which only a term that comes again has one. The calibrated test is hence

.. math:: \hat m^2 > z^2 \sum_k (r_t + \rho_k)\, s_k
          = z^2 \Big( r_t\, s + \sum_k \rho_k s_k \Big), \qquad s = \sum_k s_k .

It needs the variance s of the whole, which the gate has anyway, and :math:`c = \sum_k \rho_k s_k`.
That is the variance of one vector, however many terms there are,

.. math:: h = \sum_k \sqrt{\rho_k}\, g_k, \qquad \operatorname{Var} h = \sum_k \rho_k s_k = c,

so that an average of h and the averaged squares of its deviations, two vectors of state, do for
all; both variances are inflated alike, by :math:`1 + r_t`. Of c the calibrated test
(``alpha="auto"``) takes the share that other terms do not hold in balance
(:mod:`poprisk.optim.balance`). Where all terms have one ratio ρ, c is :math:`\rho s`, nothing is
measured, and the test is that of one term, bit for bit. Source: ours; of one term,
:func:`poprisk.optim.gate.threshold`.

Independent are terms whose examples are drawn independently of each other. Terms that see the same
examples of a step are one: give their sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poprisk._validate import plain
from poprisk.optim.gate import finite_ratio

Sizes = int | None | Mapping[str, int | None]
"""A number of examples, or of each term of the loss by its name."""

TERM_KEYS = ("term_avg", "term_var")
"""State of a parameter: the average of h, and the averaged squares of its deviations."""

BOTH = (
    "batch_size and dataset_size must both be given by term, with the same names, as in "
    'batch_size={"measured": 32, "inside": 32}, dataset_size={"measured": 100, "inside": None}'
)


def plain_sizes(value: Any) -> Any:
    """Sizes with Python numbers for numpy's."""
    if isinstance(value, Mapping):
        return {name: plain(size) for name, size in value.items()}
    return plain(value)


def by_term(settings: Mapping[str, Any]) -> dict[str, tuple[int | None, int | None]]:
    """Batch and data set size of each term; none where the loss is taken as one."""
    batch, whole = settings["batch_size"], settings["dataset_size"]
    if not isinstance(batch, Mapping):
        return {}
    return {name: (plain(batch[name]), plain(whole[name])) for name in batch}


def first_sizes(settings: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Batch and data set size; of terms, which are charged alike then, those of the first."""
    for sizes in by_term(settings).values():
        return sizes
    return settings["batch_size"], settings["dataset_size"]


def charges_by_term(settings: Mapping[str, Any]) -> dict[str, float]:
    r"""What each term is charged of its variance, :math:`\rho_k`; nothing if it is all the same.

    In ``mode="paper"`` a fresh term's threshold is 1, as without terms.

    Example:
        >>> sizes = {"batch_size": {"a": 20, "b": 20}, "dataset_size": {"a": 100, "b": None}}
        >>> charges_by_term({**sizes, "alpha": "auto", "mode": "auto", "gate": True})
        {'a': 0.25, 'b': 0.0}
    """
    alpha, paper = settings["alpha"], settings["mode"] == "paper"
    terms = by_term(settings)
    if not terms or not settings["gate"] or alpha not in ("auto", "finite"):
        return {}
    fresh = 1.0 if paper and alpha == "auto" else 0.0
    found = {k: fresh if n is None else finite_ratio(b, n) for k, (b, n) in terms.items()}
    return found if len(set(found.values())) > 1 else {}


def check_sizes(batch_size: Any, dataset_size: Any) -> None:
    """Refuse sizes that are none (TypeError, ValueError)."""
    kinds = (Mapping, list, tuple)
    if not isinstance(batch_size, kinds) and not isinstance(dataset_size, kinds):
        _check_pair("batch_size", batch_size, "dataset_size", dataset_size)
        return
    if not isinstance(batch_size, Mapping) or not isinstance(dataset_size, Mapping):
        raise TypeError(f"{BOTH}, but got {batch_size!r} and {dataset_size!r}.")
    if not batch_size or set(batch_size) != set(dataset_size):
        raise ValueError(f"{BOTH}, but got {batch_size!r} and {dataset_size!r}.")
    for name in batch_size:
        if not isinstance(name, str):
            raise TypeError(f"the name of a term must be a string, but got {name!r}.")
        at = f"[{name!r}]"
        sizes = plain(batch_size[name]), plain(dataset_size[name])
        _check_pair(f"batch_size{at}", sizes[0], f"dataset_size{at}", sizes[1])


def _check_pair(batch: str, batch_size: Any, dataset: str, dataset_size: Any) -> None:
    for name, value in ((batch, batch_size), (dataset, dataset_size)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"{name} must be an integer or None, but got {value!r} ({type(value).__name__})."
            )
        if value <= 0:
            raise ValueError(f"{name} must be positive, but got {value}.")
    if dataset_size is None:
        return
    if batch_size is None:
        raise ValueError(
            f"{dataset}={dataset_size} was given without {batch}; pass the number of "
            "examples behind one step (batch × accumulation steps × processes)."
        )
    if batch_size >= dataset_size:
        raise ValueError(
            f"{batch}={batch_size} must be smaller than {dataset}={dataset_size}: a "
            f"full batch has no sampling noise to estimate. Pass {dataset}=None to ignore the "
            "finite size, or give alpha as a number."
        )
