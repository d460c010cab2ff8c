r"""Figures of a kernel's spectrum, naively: from all eigenvalues of the dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def centred(K: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    r""":math:`HKH` and Hy, each output's mean over n examples taken off."""
    H = torch.eye(n, dtype=K.dtype) - torch.ones(n, n, dtype=K.dtype) / n
    H = torch.kron(H, torch.eye(len(K) // n, dtype=K.dtype))
    return H @ K @ H, H @ y


def entropy_trace(K: Tensor) -> float:
    r""":math:`-\operatorname{tr} K \log K` of a positive semidefinite K."""
    return float(torch.special.entr(torch.linalg.eigvalsh(K).clamp(min=0)).sum())


def figures(K: Tensor, y: Tensor, k: int) -> dict[str, float]:
    """What a spectrum says of K (n, n) with targets y (n,), by the names of its fields."""
    values, vectors = torch.linalg.eigh(K)
    values = values.clamp(min=0)
    p = values / values.sum()
    return {
        "trace": float(values.sum()),
        "frobenius_norm": float(values.square().sum().sqrt()),
        "participation_ratio": float(values.sum() ** 2 / values.square().sum()),
        "effective_rank": float((-(p * p.log()).nan_to_num(0.0).sum()).exp()),
        "alignment": float(y @ K @ y / (y @ y) / values.square().sum().sqrt()),
        "target_energy": float((vectors[:, -k:].T @ y).square().sum() / (y @ y)),
    }
