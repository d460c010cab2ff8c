r"""The eigenvalues of the cumulative dissipation W: signal channel and reservoir.

:math:`\mathrm{range}(W)` is the signal channel, :math:`\ker W` the reservoir, which neither
training nor any query can see [LG, Prop. 3.2]. Numerically there is no kernel, only a tolerance:
directions below it are the *soft reservoir*.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poprisk import _validate as checks
from poprisk.printing import short_repr

TOLERANCES = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)


@dataclass(frozen=True)
class Spectrum:
    r"""Eigenvalues and eigenvectors of W, largest first.

    Attributes:
        eigenvalues: (N,), descending; round-off below zero is kept.
        directions: (N, N), eigenvectors as columns, in the space of output gradients.
    """

    eigenvalues: Tensor
    directions: Tensor

    __repr__ = short_repr

    @classmethod
    def of(cls, W: Tensor) -> Spectrum:
        """The spectrum of a symmetric matrix (N, N)."""
        eigenvalues, directions = torch.linalg.eigh(W)
        return cls(eigenvalues.flip(0), directions.flip(1))

    def channel(self, tol: float = 1e-6) -> Channel:
        """The directions whose eigenvalue is above ``tol`` times the largest.

        Raises:
            ValueError: unless ``tol`` lies in [0, 1).
        """
        checks.check_number("tol", tol, low=0.0, high=1.0, include_high=False)
        dimension = int((self.eigenvalues > tol * self.eigenvalues[0].clamp_min(0)).sum())
        return Channel(
            tol,
            self.eigenvalues[:dimension],
            self.directions[:, :dimension],
            self.directions[:, dimension:],
        )

    def dimensions(self, tolerances: tuple[float, ...] = TOLERANCES) -> dict[float, int]:
        """Dimension of the channel at each tolerance."""
        return {tol: self.channel(tol).dimension for tol in tolerances}

    def participation(self) -> float:
        r""":math:`(\sum_i\lambda_i)^2/\sum_i\lambda_i^2`: how many directions share W.

        Example:
            >>> Spectrum.of(torch.diag(torch.tensor([3.0, 3.0, 0.0]))).participation()
            2.0
        """
        positive = self.eigenvalues.clamp_min(0)
        return float(positive.sum().square() / positive.square().sum())

    def dissipation(self, g: Tensor) -> Tensor:
        r"""Share :math:`\lambda_i (v_i^T g)^2 / g^T W g` of each direction in :math:`g^T W g`."""
        part = self.eigenvalues.clamp_min(0) * (self.directions.T @ g).square()
        return part / part.sum()

    def dissipation_dimension(self, g: Tensor) -> float:
        r""":math:`1/\sum_i s_i^2` of the shares: how many directions did the dissipating."""
        return float(1 / self.dissipation(g).square().sum())


@dataclass(frozen=True)
class Channel:
    r"""A signal channel at one tolerance, and its complement.

    Attributes:
        tol: relative to the largest eigenvalue.
        eigenvalues: of the channel, descending.
        basis: of the channel, (N, dimension), orthonormal.
        reservoir: basis of the soft reservoir, (N, N - dimension), orthonormal.
    """

    tol: float
    eigenvalues: Tensor
    basis: Tensor
    reservoir: Tensor

    __repr__ = short_repr

    @property
    def dimension(self) -> int:
        """Directions in the channel."""
        return self.basis.shape[1]

    def project(self, g: Tensor) -> Tensor:
        r""":math:`\Pi g`, for (N,) or (N, r)."""
        return self.basis @ (self.basis.T @ g)

    def share(self, g: Tensor) -> float:
        r""":math:`\|\Pi g\|^2/\|g\|^2`; 0 for g = 0."""
        total = float(g.square().sum())
        return float((self.basis.T @ g).square().sum()) / total if total > 0 else 0.0
