"""The words of the claims: ``claims.toml``, read without torch, which their modules import."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

WORDS: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)
"""Of each claim, by its name, in the order of the summary."""
