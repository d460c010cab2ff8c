"""Time of whole training steps in a basis of the layer, and state: basis_time.py OUT.json.

Each optimizer takes turns with pytorch-optimizer's SOAP, in blocks of steps that hold a change of
basis of either: forward pass, backward pass and step, by processor time, one thread. Resumable.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_optimizer as peers
import torch
from bases_peers import ADAM
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from poprisk import PopRiskAdamW, PopRiskSOAP
from poprisk_lab.arms import backward_mean, muon_groups
from poprisk_lab.bench import take_turns, write_results
from poprisk_lab.bench.models import BenchCase
from poprisk_lab.bench.step import state_size

BLOCK = 40
CASES = [
    BenchCase("mlp", 64, 64),
    BenchCase("mlp", 64, 256),
    BenchCase("mlp", 512, 256),
    BenchCase("cnn", 32, 16, depth=1),
    BenchCase("transformer", 16, 64),
    BenchCase("mlp", 64, 512, depth=1),
    BenchCase("transformer", 8, 128, depth=1),
]
LOOP: dict[str, Any] = {"factors": "gradient", "variance": "ema"}
BUILD: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda model: AdamW(model.parameters()),
    "PopRiskAdamW": PopRiskAdamW,
    "Muon": lambda model: peers.Muon(muon_groups(model, lr=1e-3, weight_decay=0.01, **ADAM)),
    "SOAP": lambda model: peers.SOAP(model.parameters(), lr=4e-4),
    "SOAP, basis every 40": lambda model: peers.SOAP(
        model.parameters(), lr=4e-4, precondition_frequency=40
    ),
    "PopRiskSOAP": PopRiskSOAP,
    "PopRiskSOAP, from the gradient": lambda model: PopRiskSOAP(model, **LOOP),
    "PopRiskSOAP, from the gradient, gate=False": lambda model: PopRiskSOAP(
        model, gate=False, **LOOP
    ),
}


class BasisTime(NamedTuple):
    """Times of a training step, and the state.

    Attributes:
        case: network and batch.
        optimizer: a key of :data:`BUILD`.
        milliseconds: median time of a step, over blocks.
        soap_milliseconds: SOAP's in the same rounds.
        ratio: median over blocks of the time over SOAP's.
        ratio_low: lower quartile of that ratio.
        ratio_high: upper quartile of that ratio.
        state: bytes of state over bytes of parameters.
    """

    case: str
    optimizer: str
    milliseconds: float
    soap_milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    state: float


def trained(case: BenchCase, name: str) -> tuple[Callable[[], None], Optimizer, int]:
    """A block of steps, its optimizer, and the bytes of the parameters."""
    model, x = case.build()
    y = torch.randint(0, case.outputs, (len(x),), generator=torch.Generator().manual_seed(1))
    optimizer = BUILD[name](model)

    def block() -> None:
        for _ in range(BLOCK):
            optimizer.zero_grad()
            backward_mean(optimizer, F.cross_entropy(model(x), y, reduction="none"))
            optimizer.step()

    return block, optimizer, sum(p.numel() * p.element_size() for p in model.parameters())


def timed(case: BenchCase, name: str, seconds: float) -> BasisTime:
    """One optimizer beside SOAP."""
    block, optimizer, size = trained(case, name)
    baseline, _, _ = trained(case, "SOAP")
    found = take_turns(block, baseline, rounds=9, seconds=seconds, timer=time.process_time)
    own, base, *ratios = found
    state = state_size(optimizer) / size
    return BasisTime(case.label(), name, own / BLOCK, base / BLOCK, *ratios, state)


def main(out: Path, seconds: float = 8.0) -> None:
    """All cases and optimizers."""
    torch.set_num_threads(1)
    kept = json.loads(out.read_text("utf-8"))["results"] if out.exists() else []
    results = [BasisTime(**row) for row in kept]
    done = {(row.case, row.optimizer) for row in results}
    for case in CASES:
        for name in BUILD:
            if name != "SOAP" and (case.label(), name) not in done:
                results.append(timed(case, name, seconds))
                print(results[-1], flush=True)
                write_results(out, results, threads=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
