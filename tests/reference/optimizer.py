r"""The equations, naively: float64, one function per equation, never fast. For tests only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def momentum_noise(t: int, beta1: float) -> float:
    r"""Var of :math:`\hat m_t` for unit-variance gradients: the sum of its squared weights."""
    weights = [(1 - beta1) * beta1 ** (t - k) / (1 - beta1**t) for k in range(1, t + 1)]
    return sum(w * w for w in weights)


def mask_value(
    mask: str, m_hat: float, s_hat: float, alpha: float, softness: float, eps: float
) -> float:
    """The three masks at one coordinate; 0/0 counts as closed."""
    excess = m_hat**2 - alpha * s_hat
    if mask == "hard":
        return 1.0 if excess > 0 else 0.0
    if mask == "soft":
        top, bottom = max(excess, 0.0), max(excess, 0.0) + softness * s_hat + eps
    else:
        top, bottom = m_hat**2, m_hat**2 + softness * alpha * s_hat + eps
    return top / bottom if bottom > 0 else 0.0


class ReferenceOptimizer:
    """PopRiskAdamW on one tensor, coordinate by coordinate from the written definitions.

    Keeps the whole history of gradients and evaluates every average as an explicit weighted sum,
    so that a wrong recursion cannot hide in both places.
    """

    def __init__(self, w: Tensor, **settings: Any) -> None:
        self.w = w.detach().double().flatten().tolist()
        self.shape = w.shape
        self.settings = settings
        self.grads: list[list[float]] = []
        self.deviations: list[list[float]] = []

    def step(self, grad: Tensor) -> Tensor:
        """Apply one gradient and return the weights."""
        g = grad.detach().double().flatten().tolist()
        if self.settings.get("maximize", False):
            g = [-x for x in g]
        self._deviate(g)
        self.grads.append(g)
        c = self.settings
        lr, decay = c["lr"], c["weight_decay"]
        m_hat, v_hat = self._average(c["betas"][0], 1), self._average(c["betas"][1], 2)
        q = self._masks(m_hat, v_hat)
        for i in range(len(g)):
            adam = m_hat[i] / (math.sqrt(v_hat[i]) + c["eps"])
            self.w[i] += -lr * q[i] * adam - lr * decay * self.w[i]
        return torch.tensor(self.w, dtype=torch.float64).reshape(self.shape)

    def _average(self, beta: float, power: int) -> list[float]:
        """Bias-corrected exponential average of the gradients to a power."""
        t = len(self.grads)
        weights = [(1 - beta) * beta ** (t - 1 - k) / (1 - beta**t) for k in range(t)]
        columns = zip(*self.grads, strict=True)
        return [sum(w * x**power for w, x in zip(weights, col, strict=True)) for col in columns]

    def _deviate(self, g: list[float]) -> None:
        """Record (g - mean of the gradients before it)² if the mode does."""
        paper = self.settings["mode"] == "paper"
        beta1 = self.settings["betas"][0]
        if not self.grads:
            if paper:
                self.deviations.append([x * x for x in g])
            return
        mean = self._average(beta1, 1)
        if paper:
            mean = [x * (1 - beta1 ** len(self.grads)) for x in mean]
        self.deviations.append([(x - y) ** 2 for x, y in zip(g, mean, strict=True)])

    def _variance(self, m_hat: list[float], v_hat: list[float]) -> list[float] | None:
        if self.settings["variance"] == "second-moment":
            if len(self.grads) == 1 and self.settings["mode"] == "auto":
                return None
            return [max(v - m * m, 0.0) for v, m in zip(v_hat, m_hat, strict=True)]
        if not self.deviations:
            return None
        rho, k = self.settings["rho"], len(self.deviations)
        weights = [(1 - rho) * rho ** (k - 1 - j) / (1 - rho**k) for j in range(k)]
        columns = zip(*self.deviations, strict=True)
        return [sum(w * x for w, x in zip(weights, col, strict=True)) for col in columns]

    def _alpha(self) -> float:
        c = self.settings
        b, n = c["batch_size"], c["dataset_size"]
        finite = b / (n - b) if n is not None else 0.0
        alpha = c["alpha"]
        if alpha == "auto" and c["mode"] == "paper":
            alpha = "fresh" if n is None else "finite"
        if alpha == "auto":
            r = momentum_noise(len(self.grads), c["betas"][0])
            inflation = 1 - r if c["variance"] == "second-moment" else 1 + r
            return c["z"] ** 2 * (r + finite) / inflation
        return {"fresh": 1.0, "finite": finite}.get(alpha, alpha)

    def _alphas(self, s_hat: list[float]) -> list[float]:
        return [self._alpha()] * len(s_hat)

    def _masks(self, m_hat: list[float], v_hat: list[float]) -> list[float]:
        c = self.settings
        s_hat = self._variance(m_hat, v_hat)
        if s_hat is None or not c["gate"]:
            return [1.0] * len(m_hat)
        eps = c["eps"] if c["mode"] == "paper" else 0.0
        if c["reduction"] == "per_tensor":
            n = len(m_hat)
            m_rms, pooled = math.sqrt(sum(m * m for m in m_hat) / n), sum(s_hat) / n
            (alpha,) = set(self._alphas(s_hat))
            q = mask_value(c["mask"], m_rms, pooled, alpha, c["softness"], eps)
            return [max(q, c["q_min"])] * n
        return [
            max(mask_value(c["mask"], m, s, alpha, c["softness"], eps), c["q_min"])
            for m, s, alpha in zip(m_hat, s_hat, self._alphas(s_hat), strict=True)
        ]


class ReferenceTerms(ReferenceOptimizer):
    """The same for a loss of several terms, each charged by its own sizes.

    Keeps the history of h, the terms weighted by the roots of their charges, in the same way.
    """

    def __init__(self, w: Tensor, **settings: Any) -> None:
        super().__init__(w, **settings)
        first = next(iter(settings["batch_size"]))
        single = {key: settings[key][first] for key in ("batch_size", "dataset_size")}
        self.weighted = ReferenceOptimizer(w, **{**settings, **single})

    def charges(self) -> dict[str, float]:
        """What is charged of the variance of each term."""
        c = self.settings
        fresh = 1.0 if (c["mode"], c["alpha"]) == ("paper", "auto") else 0.0
        return {
            k: fresh if n is None else c["batch_size"][k] / (n - c["batch_size"][k])
            for k, n in c["dataset_size"].items()
        }

    def step_terms(self, grads: dict[str, Tensor]) -> Tensor:
        """Apply the sum of the gradients of the terms and return the weights."""
        h = sum(charge**0.5 * grads[k].double() for k, charge in self.charges().items())
        flat = torch.as_tensor(h).flatten().tolist()
        self.weighted._deviate(flat)
        self.weighted.grads.append(flat)
        return self.step(torch.stack([g.double() for g in grads.values()]).sum(0))

    def _alphas(self, s_hat: list[float]) -> list[float]:
        c, charges = self.settings, self.charges().values()
        if c["alpha"] not in ("auto", "finite"):
            return [{"fresh": 1.0}.get(c["alpha"], c["alpha"])] * len(s_hat)
        c_hat = self.weighted._variance([], [])
        assert c_hat is not None
        if c["reduction"] == "per_tensor":
            c_hat, s_hat = ([sum(x) / len(x)] * len(x) for x in (c_hat, s_hat))
        shares = [x / s if s > 0 else 0.0 for x, s in zip(c_hat, s_hat, strict=True)]
        shares = [min(max(x, min(charges)), max(charges)) for x in shares]
        if c["alpha"] == "finite" or c["mode"] == "paper":
            return shares
        r, kappa = momentum_noise(len(self.grads), c["betas"][0]), self._unbalanced(s_hat, c_hat)
        return [c["z"] ** 2 * (r + kappa * x) / (1 + r) for x in shares]

    def _unbalanced(self, s_hat: list[float], c_hat: list[float]) -> float:
        """How large the gradient is beside that of the repeated terms, noise taken off."""
        r, beta1 = (
            momentum_noise(len(self.grads), self.settings["betas"][0]),
            self.settings["betas"][0],
        )
        m_hat, h_hat = self._average(beta1, 1), self.weighted._average(beta1, 1)
        moved = sum(m * m - r / (1 + r) * s for m, s in zip(m_hat, s_hat, strict=True))
        held = sum(h * h - r / (1 + r) * x for h, x in zip(h_hat, c_hat, strict=True))
        if held <= 0:
            return 1.0
        return math.sqrt(min(max(max(self.charges().values()) * moved / held, 0.0), 1.0))
