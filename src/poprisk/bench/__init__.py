"""Measurements beside peers, in one run: optimizer steps, and kernels with gradient statistics."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


def environment(**settings: Any) -> dict[str, Any]:
    """What a measurement depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "gpu": "not measured",
        **settings,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write results, making the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
