"""PopRiskSOAP where nothing of it was chosen: python benchmarks/bases_elsewhere.py OUT.json [PART].

``grokking`` (steps to 95% of the unseen table), ``pinn`` (relative error of the noisy convection
problem) and ``dpo`` (accuracy on held-out pairs; needs TRL), each by the code and on the seeds of
the claim of that name, whose record holds the rivals. Factors from the gradient. Resumable.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from poprisk_lab.checkpoint import Workspace
from poprisk_lab.runner import environment
from poprisk_lab.store import write_json
from poprisk_lab.studies.grokking import arms as grokking_arms
from poprisk_lab.studies.grokking import runs as grokking_runs
from poprisk_lab.studies.pinn import runs as pinn_runs

DEFAULT = {"lr": 1.6e-3, "weight_decay": 1.0}
GROKKING = {
    "defaults": (DEFAULT, {}),
    "defaults, gate=False": (DEFAULT, {"gate": False}),
    "SOAP's best lr and decay": ({"lr": 3e-3, "weight_decay": 3.0}, {}),
    "SOAP's best lr and decay, gate=False": ({"lr": 3e-3, "weight_decay": 3.0}, {"gate": False}),
}
PINN = {
    "defaults": DEFAULT,
    "lr 3e-3, decay 0.01": {"lr": 3e-3, "weight_decay": 0.01},
    "lr 1e-2, decay 0.01": {"lr": 1e-2, "weight_decay": 0.01},
}
DPO_RATES = (1e-4, 3e-4)
FLIPPED = (0.2, 0.4)
Found = dict[str, Any]


def grokking() -> Iterator[tuple[str, Callable[[], Found]]]:
    """Three seeds of each setting, full batches."""
    for seed in (0, 1, 2):
        for name, (rates, more) in GROKKING.items():
            settings = {**grokking_arms.BASE, **grokking_arms.FINE, **rates, "gate": more}
            settings |= {"arm": "basis", "seed": seed}
            yield f"{name}, seed {seed}", lambda s=settings: grokking_runs.run(s, Workspace())


def pinn() -> Iterator[tuple[str, Callable[[], Found]]]:
    """Five seeds at once."""
    (like, *_) = (t for t in pinn_runs.trials(quick=False) if t.settings["arm"] == "adamw")
    for noise in pinn_runs.NOISES:
        for name, rates in PINN.items():
            settings = {**like.settings, **rates, "arm": "basis", "noise": noise}
            yield f"{name}, noise {noise:g}", lambda s=settings: pinn_runs.run(s, Workspace())


def dpo() -> Iterator[tuple[str, Callable[[], Found]]]:
    """Two rates and shares of flipped pairs, three seeds."""
    from poprisk_lab.studies.dpo import arms, runs

    size = {**arms.FULL, **arms.PAIRS, "reward": arms.MAIN}
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: Path(folder) / f"{name}.pt" for name in (runs.PRETRAINED, "pairs")}
        runs.pretrained(size, Workspace(product=kept[runs.PRETRAINED]))
        for seed in (510, 511, 512):
            given = {runs.PRETRAINED: kept[runs.PRETRAINED]}
            drawn = {**size, "seed": seed}
            runs.pairs(drawn, Workspace(product=kept["pairs"], given=given))
            for rate in FLIPPED:
                for lr in DPO_RATES:
                    way = {"arm": "basis", "lr": lr, "loss": "dpo", "adapters": False}
                    settings = {**drawn, **way, "rate": rate, "matched": False}
                    name = f"lr {lr:g}, {rate:.0%} flipped, seed {seed}"
                    yield name, lambda s=settings: runs.one(s, Workspace(given=kept))["run"]


PARTS = {"grokking": grokking, "pinn": pinn, "dpo": dpo}


def main(out: Path, parts: list[str]) -> None:
    """Do what is left."""
    torch.set_num_threads(1)
    results: dict[str, Found] = (
        json.loads(out.read_text("utf-8"))["results"] if out.exists() else {}
    )
    for part in parts:
        for name, run in PARTS[part]():
            key = f"{part}: {name}"
            if key not in results:
                results[key] = run()
                write_json(out, {"environment": environment(0), "results": results})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", default=[*PARTS])
    given = parser.parse_args()
    main(given.out, given.parts)
