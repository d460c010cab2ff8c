"""Every claim of the paper, and one of ours, checked by one command each, with controls."""

from __future__ import annotations

from poprisk_lab.studies import (
    audit,
    benign_overfitting,
    coupling,
    double_descent,
    dpo,
    drift_diffusion,
    feature_learning,
    forward_forward,
    grokking,
    image,
    implicit_bias,
    memorization,
    pinn,
    stopping,
)
from poprisk_lab.studies.claim import Claim, claim_of
from poprisk_lab.studies.grokking import multistep

__all__ = ["CLAIMS", "Claim"]

_MODULES = (
    grokking, multistep, pinn, image, benign_overfitting, double_descent, implicit_bias,
    drift_diffusion, coupling, feature_learning, memorization, dpo, audit, stopping,
    forward_forward,
)  # fmt: skip
CLAIMS: dict[str, Claim] = {claim.name: claim for claim in map(claim_of, _MODULES)}
"""The claims, by name, in the order of the summary."""
