"""Put what `poprisk explain` found on record: python benchmarks/explain.py RUN OUT.

RUN is the directory of an explanation, such as runs/explain-digits; OUT the JSON file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from poprisk_lab.runner import environment
from poprisk_lab.store import write_json


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The plan, and how each optimizer ended, with the label noise and without."""
    arms = {
        arm["optimizer"]: {
            "steps": arm["steps"],
            "closure": arm["closure"],
            **{key: arm["rows"][-1][key] for key in ("epoch", "metric", "without_noise")},
        }
        for arm in found["arms"]
    }
    return {"plan": found["plan"], "arms": arms}


if __name__ == "__main__":
    content = json.loads((Path(sys.argv[1]) / "explanation.json").read_text(encoding="utf-8"))
    write_json(Path(sys.argv[2]), {"environment": environment(1), **summary(content)})
