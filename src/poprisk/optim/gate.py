r"""The gate: how much of an update the evidence for its sign supports.

With ``mean`` the (bias-corrected) average gradient of a coordinate and ``var`` the variance of
its batch mean, a step on that coordinate lowers the population risk, to first order, only if
``mean² > alpha · var`` ([LG, Thm 6.5]). The three masks turn that comparison into a factor
``q ∈ [0, 1]`` on the step; :func:`threshold` chooses ``alpha``.

The public masks are pure and take one tensor or a list of tensors. Underneath, lists go through
``torch._foreach_*`` in place, so that the loop and the foreach path of an optimizer share one
source of the maths.

[LG]: E. Litman, G. Guo, *A Theory of Generalization in Deep Learning*, arXiv:2605.01172.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from poprisk.optim.balance import Balance, sums, unbalanced

TensorList = list[Tensor]
Tensors = TypeVar("Tensors", Tensor, list[Tensor])


def add_scaled_(x: TensorList, y: TensorList, scale: float | Tensor) -> None:
    """Add ``scale * y`` to ``x`` in place; ``scale`` is a tensor where steps are captured."""
    if isinstance(scale, Tensor):
        torch._foreach_add_(x, scaled(y, scale))
    else:
        torch._foreach_add_(x, y, alpha=scale)


def subtract_noise_(
    mean_sq: TensorList, var: TensorList, alpha: float | Tensor | TensorList, factor: float
) -> None:
    """Subtract ``factor * alpha * var`` in place; ``alpha``: one for all, or one a coordinate."""
    if isinstance(alpha, list):
        torch._foreach_addcmul_(mean_sq, var, alpha, -factor)
    else:
        add_scaled_(mean_sq, var, -alpha * factor)


def scaled(x: TensorList, scale: float | Tensor) -> TensorList:
    """``scale * x``, newly allocated, in the dtype of ``x`` also where both are 0-d tensors."""
    if isinstance(scale, Tensor):
        scale = scale.to(x[0].dtype)
    return list(torch._foreach_mul(x, scale))


class Mask(Protocol):
    """A mask on lists of tensors; may overwrite ``mean_sq`` with its result, not ``var``.

    ``alpha`` is a list of tensors like ``var`` where terms of the loss are charged differently;
    masks by name take both.
    """

    def __call__(
        self,
        mean_sq: TensorList,
        var: TensorList,
        *,
        alpha: Any,
        softness: float,
        eps: float,
        var_scale: float,
    ) -> TensorList: ...


def _hard_(
    mean_sq: TensorList,
    var: TensorList,
    *,
    alpha: float | TensorList,
    softness: float,
    eps: float,
    var_scale: float,
) -> TensorList:
    tie = 1 + 8 * torch.finfo(mean_sq[0].dtype).eps
    subtract_noise_(mean_sq, var, alpha, var_scale * tie)
    torch._foreach_sign_(mean_sq)
    torch._foreach_clamp_min_(mean_sq, 0.0)
    return mean_sq


def _soft_(
    mean_sq: TensorList,
    var: TensorList,
    *,
    alpha: float | TensorList,
    softness: float,
    eps: float,
    var_scale: float,
) -> TensorList:
    subtract_noise_(mean_sq, var, alpha, var_scale)
    torch._foreach_clamp_min_(mean_sq, 0.0)
    return _fraction_(mean_sq, var, softness * var_scale, eps)


def _snr_(
    mean_sq: TensorList,
    var: TensorList,
    *,
    alpha: float | TensorList,
    softness: float,
    eps: float,
    var_scale: float,
) -> TensorList:
    if isinstance(alpha, list):
        return _fraction_(mean_sq, list(torch._foreach_mul(var, alpha)), softness * var_scale, eps)
    return _fraction_(mean_sq, var, softness * alpha * var_scale, eps)


def _fraction_(signal: TensorList, var: TensorList, weight: float, eps: float) -> TensorList:
    """Signal / (signal + weight·var + eps) in place, with 0/0 = 0."""
    total = [x.clone() for x in signal] if isinstance(weight, Tensor) else None
    if total is None:
        total = list(torch._foreach_add(signal, var, alpha=weight))
    else:
        add_scaled_(total, var, weight)
    if isinstance(eps, Tensor) or eps > 0:
        torch._foreach_add_(total, eps.to(total[0].dtype) if isinstance(eps, Tensor) else eps)
    torch._foreach_clamp_min_(total, torch.finfo(signal[0].dtype).tiny)
    torch._foreach_div_(signal, total)
    return signal


MASKS_: dict[str, Mask] = {"hard": _hard_, "soft": _soft_, "snr": _snr_}
"""The masks by name, overwriting ``mean_sq`` with the result: what an optimizer step calls."""


def hard(
    mean_sq: Tensors,
    var: Tensors,
    *,
    alpha: float,
    softness: float = 0.0,
    eps: float = 0.0,
    var_scale: float = 1.0,
) -> Tensors:
    r"""Mask of the hard threshold, :math:`q = 1\{\hat m^2 > \alpha \hat s\}` [LG, Thm 6.5].

    Args:
        mean_sq: :math:`\hat m^2`, any shape, floating point; or a list of such tensors.
        var: variance of the batch-mean gradient, same shape, units of gradient squared.
        alpha: threshold, dimensionless.
        softness: not used; here so that all masks have one signature.
        eps: not used.
        var_scale: factor on ``var``: :math:`\hat s` = ``var_scale · var``.

    Returns:
        The mask, zeros and ones, same shape and dtype. Equality up to rounding is closed: at the
        first step of ``mode="paper"`` both sides are equal algebraically.

    Example:
        >>> hard(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 1.0]), alpha=2.0)
        tensor([1., 0.])
    """
    settings = {"alpha": alpha, "softness": softness, "eps": eps, "var_scale": var_scale}
    return _on_copy("hard", mean_sq, var, **settings)


def soft(
    mean_sq: Tensors,
    var: Tensors,
    *,
    alpha: float,
    softness: float,
    eps: float = 0.0,
    var_scale: float = 1.0,
) -> Tensors:
    r"""Mask of Algorithm 1 of [LG].

    .. math:: q = \frac{(\hat m^2 - \alpha \hat s)_+}{(\hat m^2 - \alpha \hat s)_+
              + \lambda \hat s + \varepsilon}

    Args:
        mean_sq: :math:`\hat m^2`, any shape, floating point; or a list of such tensors.
        var: variance of the batch-mean gradient, same shape, units of gradient squared.
        alpha: threshold, dimensionless.
        softness: :math:`\lambda`, dimensionless: how slowly the mask opens above the threshold.
        eps: in units of ``mean_sq``; raised to the smallest normal number of the dtype, so that
            0/0 is a closed gate.
        var_scale: factor on ``var``: :math:`\hat s` = ``var_scale · var``.

    Returns:
        The mask in [0, 1], same shape and dtype.

    Example:
        >>> soft(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 1.0]), alpha=2.0, softness=2.0)
        tensor([0.5000, 0.0000])
    """
    settings = {"alpha": alpha, "softness": softness, "eps": eps, "var_scale": var_scale}
    return _on_copy("soft", mean_sq, var, **settings)


def snr(
    mean_sq: Tensors,
    var: Tensors,
    *,
    alpha: float,
    softness: float,
    eps: float = 0.0,
    var_scale: float = 1.0,
) -> Tensors:
    r"""Shrinkage by the signal-to-noise ratio, the default of the paper's authors.

    .. math:: q = \frac{\hat m^2}{\hat m^2 + \lambda \alpha \hat s + \varepsilon}

    The shape of M-SVAG's variance adaptation (Balles & Hennig 2018). Arguments and result as
    for :func:`soft`.

    Example:
        >>> snr(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 1.0]), alpha=2.0, softness=2.0)
        tensor([0.5000, 0.0000])
    """
    settings = {"alpha": alpha, "softness": softness, "eps": eps, "var_scale": var_scale}
    return _on_copy("snr", mean_sq, var, **settings)


def _on_copy(name: str, mean_sq: Tensors, var: Tensors, **settings: float) -> Tensors:
    """Evaluate a mask and leave its arguments as they are."""
    mask = cast(Callable[..., TensorList], MASKS_[name])
    if isinstance(mean_sq, Tensor):
        return cast(Tensors, mask([mean_sq.clone()], [var], **settings)[0])
    copies = [x.clone() for x in mean_sq]
    return cast(Tensors, mask(copies, var, **settings) if copies else [])


ALPHAS = ("auto", "fresh", "finite")


def momentum_noise(t: int, beta1: float) -> float:
    r"""Variance of the bias-corrected momentum over the variance of one batch mean.

    .. math:: r_t = \frac{(1-\beta_1)(1+\beta_1^t)}{(1+\beta_1)(1-\beta_1^t)}

    for i.i.d. batches; ``t ≥ 1`` counts the gradients averaged. Source: ours (geometric series).

    Example:
        >>> momentum_noise(1, 0.9), momentum_noise(7, 0.0)
        (1.0, 1.0)
    """
    decay = beta1**t
    return (1 - beta1) * (1 + decay) / ((1 + beta1) * (1 - decay))


def finite_ratio(batch_size: int | None, dataset_size: int | None) -> float:
    """Noise of a finite training set, b/(n-b); 0 for a stream (``dataset_size=None``)."""
    if batch_size is None or dataset_size is None:
        return 0.0
    return batch_size / (dataset_size - batch_size)


def threshold(
    alpha: float | str,
    *,
    noise_ratio: float,
    inflation: float,
    z: float,
    batch_size: int | None,
    dataset_size: int | None,
) -> float:
    r"""Resolve ``alpha`` to the number that multiplies :math:`\hat s`.

    ``"fresh"`` is 1 and ``"finite"`` is :math:`b/(n-b)` [LG]. ``"auto"`` (ours) compares like
    with like: :math:`\hat m` keeps a fraction :math:`r_t` of the noise of one batch mean, the
    training set itself is a sample with noise :math:`b/(n-b)` of it, and the estimator reports
    ``inflation`` times the variance:

    .. math:: \alpha_{auto} = z^2 \frac{r_t + b/(n-b)}{\text{inflation}}

    Args:
        alpha: a number ≥ 0, or one of the three names.
        noise_ratio: :math:`r_t`, see :func:`momentum_noise`.
        inflation: expected value of the variance estimate over the variance of the batch mean.
        z: 1 makes :math:`\hat m^2 - \alpha\hat s` an unbiased estimate of the squared population
            gradient, in the long run; 2 lets about 5% of pure noise pass.
        batch_size: effective batch b.
        dataset_size: n, or None for a stream.

    Example:
        >>> threshold("finite", noise_ratio=1, inflation=1, z=1, batch_size=20, dataset_size=100)
        0.25
    """
    finite = finite_ratio(batch_size, dataset_size)
    return threshold_at(finite, alpha, noise_ratio=noise_ratio, inflation=inflation, z=z)


def threshold_at(
    finite: float, alpha: float | str, *, noise_ratio: float, inflation: float, z: float
) -> float:
    """:func:`threshold` for a given noise of the training set, b/(n-b), in which it is linear."""
    if isinstance(alpha, str):
        if alpha == "fresh":
            return 1.0
        if alpha == "finite":
            return finite
        return z * z * (noise_ratio + finite) / inflation
    return float(alpha)


class Charges(NamedTuple):
    r"""What the terms of a loss add to the threshold: the variance of each by its own ratio.

    Attributes:
        slope: how much of :math:`\hat c = \sum_k \rho_k \hat s_k` the threshold takes.
        least: the smallest :math:`\rho_k`.
        most: the largest.
        balance: tells what other terms hold in balance; None: all is charged.
    """

    slope: float
    least: float
    most: float
    balance: Balance | None = None


Pool = Callable[[Tensor, Sequence[int] | Tensor], Tensor]
"""From sums of tensors, shape (2, tensors), and their sizes to averages."""


def local_means(sums: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """Averages of tensors that are not spread over processes."""
    return sums / torch.as_tensor(counts, device=sums.device)


class Gate(NamedTuple):
    """A mask with its settings, ready to be evaluated on raw moment estimates."""

    mask: Mask
    alpha: float
    softness: float = 0.1
    eps: float = 0.0
    q_min: float = 0.0
    per_tensor: bool = False
    pool: Pool = local_means
    slack: float = 0.0
    r"""Tolerance :math:`\kappa`: of the variance what exceeds :math:`\kappa \hat v` counts."""
    opened: Tensor | None = None
    """Where steps are captured: whether there is no estimate yet, so that all passes."""
    charges: Charges | None = None
    """Of a loss whose terms are charged differently (:mod:`poprisk.optim.sizes`)."""

    @property
    def whole_tensors(self) -> bool:
        """Whether it looks at sums over a tensor, which no piece of it has."""
        return self.per_tensor or self.charges is not None

    def __call__(
        self,
        mean: TensorList,
        var: TensorList,
        charged: TensorList | None = None,
        terms_mean: TensorList | None = None,
        *,
        mean_scale: float = 1.0,
        var_scale: float = 1.0,
    ) -> TensorList:
        r"""Masks for :math:`\hat m` = ``mean_scale·mean`` and :math:`\hat s` = ``var_scale·var``.

        The scales (bias corrections) enter as numbers, which saves passes over memory: every mask
        depends on :math:`\hat s/\hat m^2` alone. With ``per_tensor`` both are averaged over a
        tensor first, and its mask is a 0-d tensor. The result is newly allocated. ``charged`` is
        the variance :math:`\hat c` of :class:`Charges`, on the scale of ``var``, and ``terms_mean``
        the average of h, whose own bias correction it holds.
        """
        rows = [list(torch._foreach_mul(mean, mean)), var]
        if self.charges is not None and charged is not None and terms_mean is not None:
            rows += [charged, list(torch._foreach_mul(terms_mean, terms_mean))]
        if self.per_tensor:
            found = torch.stack([sums(row) for row in rows])
            rows = self.averages(found, [x.numel() for x in var], var[0].dtype)
        return self.on_squares(*rows, mean_scale=mean_scale, var_scale=var_scale)

    def averages(self, sums: Tensor, counts: Sequence[int], dtype: torch.dtype) -> list[TensorList]:
        """The per-tensor averages of each row of float64 ``sums``, shape (rows, tensors)."""
        return [list(row.unbind()) for row in self.pool(sums, counts).to(dtype)]

    def on_squares(
        self,
        mean_sq: TensorList,
        var: TensorList,
        charged: TensorList | None = None,
        terms_sq: TensorList | None = None,
        *,
        mean_scale: float,
        var_scale: float,
    ) -> TensorList:
        """The masks for squared averages, or their averages over tensors, as in ``__call__``."""
        alpha: float | TensorList = self.alpha
        if charged is not None and terms_sq is not None:
            scales = {"mean_scale": mean_scale, "var_scale": var_scale}
            alpha = self._thresholds([mean_sq, var, charged, terms_sq], **scales)
        q = self.mask(
            mean_sq,
            var,
            alpha=alpha,
            softness=self.softness,
            eps=self.eps / mean_scale**2,
            var_scale=var_scale / mean_scale**2,
        )
        if self.q_min > 0.0:
            q = list(torch._foreach_clamp_min(q, self.q_min))
        if self.opened is not None:
            q = [torch.where(self.opened, torch.ones_like(x), x) for x in q]
        return q

    def _thresholds(self, rows: list[TensorList], **scales: float) -> float | TensorList:
        """The threshold: one for all, or of each coordinate by whose variance it has.

        The ratio of the estimates is a mean of the terms' ratios and lies between them, which noise
        is not to change: no coordinate pays more than if all of its variance were of the term that
        costs most. Of what it pays counts what the other terms do not hold in balance.
        """
        if self.charges is None:
            return self.alpha
        slope, least, most, balance = self.charges
        _, var, charged, _ = rows
        ratios = list(torch._foreach_div(charged, var))
        ratios = [x.nan_to_num_(least).clamp_(least, most) for x in ratios]
        if balance is not None:
            shares = unbalanced(balance, rows, **scales).to(var[0].dtype).unbind()
            torch._foreach_mul_(ratios, list(shares))
        return [x.mul_(slope).add_(self.alpha) for x in ratios]
