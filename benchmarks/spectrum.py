"""The spectrum of a tangent kernel with 100,000 rows: python benchmarks/spectrum.py OUT [MODEL].

MODEL: mlp or cnn; None: both, each in a process of its own. 10,000 images of digits with pixel
noise, 10 outputs, float32, one thread, after 300 steps of Adam. The kernel itself would be 37 GiB.
Its trace is known exactly, from the factors. The same figures for 200 of the images, against the
dense kernel in float64. Peaks in MiB, beyond what the process had before; seconds of the processor.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from poprisk import Kernel, entk
from poprisk.linalg import Estimate
from poprisk_lab.runner import environment
from poprisk_lab.store import write_json

N, CHECKED, K = 10_000, 200, 10
MAX_MEMORY = 256 << 20
MODELS = ("mlp", "cnn")


def data() -> tuple[Tensor, Tensor]:
    images, digits = load_digits(return_X_y=True)
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(images), (N,), generator=g)
    x = torch.tensor(images / 16).float()[drawn] + 0.1 * torch.randn(N, 64, generator=g)
    return x, torch.tensor(digits)[drawn]


def trained(name: str, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    if name == "mlp":
        layers: list[nn.Module] = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    else:
        layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for rows in torch.randint(N, (300, 128)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def peak() -> float:
    """MiB of this program: ru_maxrss begins with what its parent had."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) / 1024


def figures(kernel: Kernel, targets: Tensor) -> dict[str, Any]:
    before, start = peak(), time.process_time()
    found = kernel.spectrum(K, targets=targets)
    cost = {"seconds": time.process_time() - start, "peak": peak() - before}
    named = {k: v[:4] for k, v in found._asdict().items() if isinstance(v, Estimate)}
    pairs = found.eigenpairs
    eigen = {"eigenvalues": pairs.values.tolist(), "residuals": pairs.residuals.tolist()}
    return {**cost, "products": found.products, **named, **eigen}


def exact(matrix: Tensor, y: Tensor) -> dict[str, float]:
    """The same from the dense kernel."""
    values, vectors = torch.linalg.eigh(matrix)
    values, p = values.clamp(min=0), values.clamp(min=0) / values.clamp(min=0).sum()
    return {
        "trace": float(values.sum()),
        "frobenius_norm": float(values.norm()),
        "participation_ratio": float(1 / p.square().sum()),
        "effective_rank": float(torch.special.entr(p).sum().exp()),
        "alignment": float(y @ matrix @ y / (values.norm() * (y @ y))),
        "target_energy": float((vectors[:, -K:].T @ y).square().sum() / (y @ y)),
    }


def measured(name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    x, digits = data()
    model = trained(name, x, digits)
    y = nn.functional.one_hot(digits).float()
    # What the first use of everything takes is no part of it.
    entk(model, x[:50]).spectrum(1)
    kernel = entk(model, x, max_memory=MAX_MEMORY)
    large = figures(kernel, y)
    large["trace_from_factors"] = kernel.trace().value
    double, some = copy.deepcopy(model).double(), slice(CHECKED)
    small = entk(double, x[some].double())
    of_products = figures(small, y[some].double())
    truth = exact(small.dense(), y[some].double().flatten())
    errors = {
        key: {"error": of_products[key][0] - value, "standard_error": of_products[key][1]}
        for key, value in truth.items()
    }
    return {"rows": N * 10, "spectrum": large, "rows_checked": CHECKED * 10, "errors": errors}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    if len(sys.argv) > 2:
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        settings = {"k": K, "max_memory": MAX_MEMORY, "environment": environment(1)}
        write_json(out, {**found, **settings, sys.argv[2]: measured(sys.argv[2])})
    else:
        for name in MODELS:
            subprocess.run([sys.executable, __file__, str(out), name], check=True)
