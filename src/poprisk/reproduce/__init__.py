"""Every claim of the paper, checked by one command each, with controls and a verdict."""

from __future__ import annotations

from poprisk.reproduce.claim import Claim

__all__ = ["CLAIMS", "Claim"]

CLAIMS: dict[str, Claim] = {}
"""The claims, by name, in the order of the summary."""
