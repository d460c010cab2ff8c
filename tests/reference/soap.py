r"""The gated step in a Kronecker basis, naively: float64, every example's gradient formed."""

from __future__ import annotations

from typing import Any

import numpy as np

from reference.optimizer import mask_value, momentum_noise


class ReferenceSOAP:
    """PopRiskSOAP on the weight of one linear layer, from the written definitions.

    Args:
        w: (o, i).
        settings: as of the optimizer, complete.
        open_gate: let all pass.
    """

    def __init__(self, w: np.ndarray, *, open_gate: bool = False, **settings: Any) -> None:
        self.w, self.c, self.open_gate = w.astype(float), settings, open_gate
        self.m, self.v, self.s = (np.zeros_like(self.w) for _ in range(3))
        self.bases: list[np.ndarray] | None = None
        self.factors: list[np.ndarray] | None = None
        self.t = 0

    def step(self, d: np.ndarray, a: np.ndarray) -> np.ndarray:
        """One step from the gradients (b, o) of each example's own loss and its inputs (b, i)."""
        b, c = len(d), self.c
        found = [np.sum([np.outer(x, x) for x in rows], axis=0) / b for rows in (d, a)]
        left, right = self.bases or [np.eye(n) for n in self.w.shape]
        each = [left.T @ np.outer(d[i], a[i]) @ right for i in range(b)]
        self.t += 1
        self._average(each)
        adam = self.m / (1 - c["betas"][0] ** self.t)
        v_hat = self.v / (1 - c["betas"][1] ** self.t)
        step = self._masks() * adam / (np.sqrt(v_hat) + c["eps"])
        decayed = self.w * (1 - c["lr"] * c["weight_decay"])
        self.w = decayed - c["lr"] * left @ step @ right.T
        decay = c["factor_decay"]
        if self.factors is None:
            self.factors = found
            self._turn([self._eigenvectors(f) for f in found])
        else:
            pairs = zip(self.factors, found, strict=True)
            self.factors = [decay * x + (1 - decay) * y for x, y in pairs]
            self._refresh()
        return self.w

    def _average(self, each: list[np.ndarray]) -> None:
        b, (beta1, beta2) = len(each), self.c["betas"]
        g = np.sum(each, axis=0) / b
        variance = np.sum([(x - g) ** 2 for x in each], axis=0) / (b * (b - 1))
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.s = beta1**2 * self.s + (1 - beta1**2) * variance

    def _masks(self) -> np.ndarray:
        if self.open_gate:
            return np.ones_like(self.w)
        c, (beta1, beta2) = self.c, self.c["betas"]
        z, slack = (c["z"], c["slack"]) if self.bases else (c["coordinate_z"], 0.0)
        alpha = z**2 * (
            momentum_noise(self.t, beta1) + c["batch_size"] / (c["dataset_size"] - c["batch_size"])
        )
        q = np.empty_like(self.w)
        for at in np.ndindex(q.shape):
            m_hat = self.m[at] / (1 - beta1**self.t)
            v_hat = self.v[at] / (1 - beta2**self.t)
            s_hat = max(self.s[at] / (1 - beta1 ** (2 * self.t)) - slack * v_hat, 0.0)
            q[at] = mask_value("soft", m_hat, s_hat, alpha, c["softness"], 0.0)
        return q

    def _refresh(self) -> None:
        every = self.c["refresh_every"]
        first = [2**k for k in range(1, 30) if 2**k < every]
        if self.t not in first and self.t % every:
            return
        assert self.bases is not None
        assert self.factors is not None
        new = [
            self._eigenvectors(f) if self.t < every else self._iterated(f, old)
            for f, old in zip(self.factors, self.bases, strict=True)
        ]
        self._turn(new)

    def _turn(self, new: list[np.ndarray]) -> None:
        """Carry the averages over into new bases."""
        old_ones = self.bases or [np.eye(n) for n in self.w.shape]
        rows, columns = (n.T @ old for n, old in zip(new, old_ones, strict=True))
        self.m = rows @ self.m @ columns.T
        self.v = rows**2 @ self.v @ (columns**2).T
        self.s = rows**2 @ self.s @ (columns**2).T
        self.bases = new

    def _eigenvectors(self, factor: np.ndarray) -> np.ndarray:
        """By falling eigenvalue, which is the order that orthogonal iteration keeps."""
        return np.linalg.eigh(factor)[1][:, ::-1]

    def _iterated(self, factor: np.ndarray, old: np.ndarray) -> np.ndarray:
        return np.linalg.qr(factor @ old)[0]
