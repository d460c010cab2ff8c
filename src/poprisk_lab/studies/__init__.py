"""Every claim of the paper, and one of ours, checked by one command each, with controls."""

from __future__ import annotations

from poprisk_lab.studies import (
    audit,
    benign_overfitting,
    coupling,
    double_descent,
    drift_diffusion,
    feature_learning,
    grokking,
    image,
    implicit_bias,
    memorization,
    pinn,
)
from poprisk_lab.studies.claim import Claim
from poprisk_lab.studies.grokking import multistep

__all__ = ["CLAIMS", "Claim"]

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        grokking.CLAIM,
        multistep.CLAIM,
        pinn.CLAIM,
        image.CLAIM,
        benign_overfitting.CLAIM,
        double_descent.CLAIM,
        implicit_bias.CLAIM,
        drift_diffusion.CLAIM,
        coupling.CLAIM,
        feature_learning.CLAIM,
        memorization.CLAIM,
        audit.CLAIM,
    )
}
"""The claims, by name, in the order of the summary."""
