r"""Spectral figures of a positive semidefinite operator, from products alone, each with its error.

With orthonormal leading vectors V, :math:`P = I - VV^\top` and random signs z, for any f,

.. math:: \operatorname{tr} f(K) = \operatorname{tr} V^\top f(K) V
    + \mathbb E\,(Pz)^\top f(K)\,Pz

exactly, however well V is converged: Hutch++ (Meyer et al. 2021) with a Krylov space for its sketch
(Chen and Hallman 2023). The forms come from Lanczos quadrature (Golub and Meurant 2010; Ubaru,
Chen and Saad 2017), one run of it for all f.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from poprisk.linalg import Eigenpairs, Estimate, standard_error
from poprisk.printing import short_html, short_repr

SHARE_OF_ERROR = 0.25
"""Of the error that the probes leave: quadrature within it is good enough."""
RELATIVE = 1e-4
"""Quadrature of the entropy within so much is good enough in any case."""


class KernelSpectrum(NamedTuple):
    r"""Figures of the spectrum :math:`\lambda_1 \ge \lambda_2 \ge \ldots` of a tangent kernel K.

    Errors leave rounding out: in float32 about 1e-6 of a value.

    Attributes:
        eigenpairs: the k largest eigenvalues, with residuals that bound their errors.
        trace: :math:`\operatorname{tr} K`.
        frobenius_norm: :math:`\|K\|_F = (\operatorname{tr} K^2)^{1/2}`.
        participation_ratio: :math:`(\operatorname{tr} K)^2 / \operatorname{tr} K^2`.
        effective_rank: :math:`\exp(-\sum_i p_i \log p_i)`, :math:`p_i = \lambda_i/\operatorname{tr}
            K` (Roy and Vetterli 2007). Its error adds what the quadrature may be off by.
        alignment: kernel-target alignment, :math:`y^\top K y / (\|K\|_F \|y\|^2)` (Cristianini et
            al. 2001); None without targets y.
        target_energy: share of the targets in the k leading eigenvectors,
            :math:`\|V^\top y\|^2/\|y\|^2`; its error is a bound, by the residuals and the gap to
            the next eigenvalue (Davis and Kahan 1970). Not valid where that gap is not resolved.
        products: with K, that were spent.
    """

    eigenpairs: Eigenpairs
    trace: Estimate
    frobenius_norm: Estimate
    participation_ratio: Estimate
    effective_rank: Estimate
    alignment: Estimate | None
    target_energy: Estimate | None
    products: int

    __repr__ = short_repr
    _repr_html_ = short_html


class Traces(NamedTuple):
    """Traces of functions of K in units of its largest eigenvalue, from probes.

    Attributes:
        known: what the leading pairs give, (3,): of x, x² and -x log x.
        samples: what each probe adds, (s, 3).
        bound: what quadrature may be off by, in the last.
        unit: the largest eigenvalue.
    """

    known: Tensor
    samples: Tensor
    bound: float
    unit: float

    __repr__ = short_repr

    @property
    def values(self) -> list[float]:
        """The three traces."""
        return (self.known + self.samples.mean(dim=0)).tolist()

    def error(self, *slopes: float) -> float:
        """Standard error of a function of the traces with these derivatives."""
        return standard_error(self.samples @ torch.tensor(slopes, dtype=self.samples.dtype))

    def trace(self) -> Estimate:
        """Of K."""
        return Estimate.of(self.unit * self.values[0], self.unit * self.error(1.0, 0.0, 0.0))

    def frobenius_norm(self) -> Estimate:
        """Of K."""
        norm = math.sqrt(self.values[1])
        return Estimate.of(self.unit * norm, self.unit * self.error(0.0, 0.5 / norm, 0.0))

    def participation_ratio(self) -> Estimate:
        """Of the eigenvalues."""
        trace, square, _ = self.values
        ratio = trace**2 / square
        return Estimate.of(ratio, ratio * self.error(2 / trace, -1 / square, 0.0))

    def effective_rank(self) -> Estimate:
        r"""Of the eigenvalues, by their entropy :math:`\log T + E/T` with the traces T and E."""
        trace, _, entropy = self.values
        rank = math.exp(math.log(trace) + entropy / trace)
        probes = self.error((1 - entropy / trace) / trace, 0.0, 1 / trace)
        return Estimate.of(rank, rank * (probes + self.bound / trace))

    def alignment(self, form: float) -> Estimate:
        r"""From :math:`y^\top K y/\|y\|^2`."""
        norm = self.frobenius_norm()
        value = form / norm.value
        return Estimate.of(value, value * norm.standard_error / norm.value)


def traces(
    product: Callable[[Tensor], Tensor], leading: Eigenpairs, signs: Tensor, *, steps: int
) -> Traces:
    r"""The traces of K, K² and :math:`-K\log K`.

    Args:
        product: K times the columns of (n, s).
        leading: approximate pairs of K; the better, the smaller the errors.
        signs: (n, s), independent and random, of which ``leading`` knows nothing.
        steps: products for each probe, at most.
    """
    unit = float(leading.values[0])
    low, high = _known(
        *(part.cpu().double() / unit for part in (leading.values, leading.residuals))
    )
    known, bound = (low + high) / 2, float(high[2] - low[2]) / 2
    V = leading.vectors
    found = Traces(known, torch.zeros(signs.shape[1], 3, dtype=known.dtype), bound, unit)
    if V.shape[1] == len(V):
        return found
    rest = torch.addmm(signs, V, V.T @ signs, alpha=-1)
    size = torch.linalg.vector_norm(rest, dim=0).cpu().double().square().unsqueeze(1)
    for alpha, beta in itertools.islice(lanczos(product, rest), steps):
        low, high = (size * part for part in quadrature(alpha / unit, beta / unit))
        off = float((high - low)[:, 2].mean()) / 2
        found = Traces(known, (low + high) / 2, bound + off, unit)
        enough = max(SHARE_OF_ERROR * found.error(0.0, 0.0, 1.0), RELATIVE * found.values[0])
        if off <= enough:
            break
    return found


def _known(values: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    r"""Bounds on :math:`v^\top f(K) v` of all pairs together, exact for x and x².

    Such a form is a mean of f over a spectral measure, whose mean is the eigenvalue found and whose
    variance is the squared residual: a run of Lanczos with one step.
    """
    low, high = quadrature(values.unsqueeze(1), residuals.unsqueeze(1))
    return low.sum(dim=0), high.sum(dim=0)


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    r"""Lanczos' tridiagonal matrices of K from the columns of ``start``, grown by each product.

    Without reorthogonalization, which quadrature can do without (Greenbaum 1989): rounding makes
    copies of eigenvalues that share the weight of one.

    Args:
        product: K times the columns of (n, s).
        start: (n, s), overwritten.

    Yields:
        Diagonals (s, m) and off-diagonals (s, m), in float64 on the CPU; the last off-diagonal
        leads to the next step.
    """
    norms = torch.linalg.vector_norm(start, dim=0)
    q, before, beta = _divided(start, norms), torch.zeros_like(start), torch.zeros_like(norms)
    del start
    diagonals, others = list[Tensor](), list[Tensor]()
    while True:
        image = torch.addcmul(product(q), before, beta, value=-1)
        alpha = (q * image).sum(dim=0)
        image.addcmul_(q, alpha, value=-1)
        beta = torch.linalg.vector_norm(image, dim=0)
        diagonals.append(alpha.cpu().double())
        others.append(beta.cpu().double())
        yield torch.stack(diagonals, dim=1), torch.stack(others, dim=1)
        before, q = q, _divided(image, beta)


def _divided(columns: Tensor, norms: Tensor) -> Tensor:
    """Columns over their norms, in place; zeros stay, where there is nothing left to divide."""
    return columns.div_(norms.clamp(min=torch.finfo(norms.dtype).tiny))


def quadrature(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    r"""Bounds on the means of x, x² and :math:`-x \log x` over the measures of Lanczos matrices.

    Gauss' rule is exact for the first two from two nodes on and lies above the third, whose
    derivatives of even order are negative from the second on; Gauss and Radau's with a node at
    zero lies below, as those of odd order are positive from the third on, where no eigenvalue is
    negative (Golub and Meurant 2010, chapter 6).

    Args:
        alpha: (s, m), diagonals.
        beta: (s, m), off-diagonals; the last leads to a step that was not taken.

    Returns:
        Lower and upper bounds, (s, 3) each.

    Example:
        >>> half = torch.tensor([[0.5]], dtype=torch.float64)
        >>> [bound[0, :2].tolist() for bound in quadrature(half, 0 * half)]
        [[0.5, 0.25], [0.5, 0.25]]
    """
    pivot = alpha[:, 0]
    floor = torch.finfo(alpha.dtype).eps * alpha.abs().amax(dim=1) + torch.finfo(alpha.dtype).tiny
    for j in range(1, alpha.shape[1]):
        pivot = alpha[:, j] - beta[:, j - 1].square() / pivot.maximum(floor)
    # With it the matrix has a zero eigenvalue: the Schur complement of its last entry vanishes.
    last = beta[:, -1].square() / pivot.maximum(floor)
    mean = alpha[:, 0]
    exact = torch.stack([mean, mean.square() + beta[:, 0].square()], dim=1)
    radau = _entropy_mean(torch.cat([alpha, last.unsqueeze(1)], dim=1), beta)
    gauss = _entropy_mean(alpha, beta[:, :-1])
    low, high = (torch.cat([exact, third.unsqueeze(1)], dim=1) for third in (radau, gauss))
    return low, high


def _entropy_mean(alpha: Tensor, beta: Tensor) -> Tensor:
    """The mean of -x log x by the rule of a Lanczos matrix, (s,)."""
    matrix = torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    # Below zero there is rounding only.
    return (vectors[:, 0].square() * torch.special.entr(nodes.clamp(min=0))).sum(dim=1)


def target_energy(targets: Tensor, pairs: Eigenpairs, k: int) -> Estimate:
    r"""Share of the targets in the leading k of n eigenvectors, with a bound on its error.

    What a found vector has outside of the true leading space is at most its residual over its
    distance to the eigenvalues outside, so that with all of them
    :math:`\sin^2\theta \le \sum_j r_j^2/(\lambda_j - \lambda_{k+1})^2`, and the share is off by at
    most :math:`\sin\theta`.

    Args:
        targets: (n,).
        pairs: the k + 1 leading pairs, or all n.
        k: how many count.
    """
    part = torch.linalg.vector_norm(pairs.vectors[:, :k].T @ targets)
    share = min(1.0, float(part / torch.linalg.vector_norm(targets)) ** 2)
    if k == len(targets):
        return Estimate.of(share, 0.0)
    values, residuals = pairs.values.cpu().double(), pairs.residuals.cpu().double()
    gaps = values[:k] - values[k] - residuals[k]
    bound = float((residuals[:k] / gaps).norm()) if bool((gaps > 0).all()) else 1.0
    if bound < 1:
        return Estimate.of(share, bound)
    reason = f"eigenvalues {k} and {k + 1} are not told apart: take another k, or a lower tolerance"
    return Estimate(share, 1.0, False, reason, math.nan)
