"""Random cases against the reference: settings, shapes, layouts, dtypes and orders of calls.

    python tests/fuzz.py --cases 10000 --out benchmarks/results/fuzz.json

A case is a function of its seed. It is wrong if a path leaves the reference, if state changes where
nothing may, or if anything but a clear error is raised.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import platform
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from poprisk import PopRiskAdamW
from reference.optimizer import ReferenceOptimizer

Case = random.Random
CLEAR = (ValueError, TypeError, NotImplementedError)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
PATHS: tuple[dict[str, Any], ...] = ({"foreach": False}, {"foreach": True}, {"fused": True})


def scalar(dtype: torch.dtype, values: Tensor) -> Tensor:
    return values.flatten()[:1].reshape(()).to(dtype)


LAYOUTS: dict[str, Callable[[torch.dtype, Tensor], Tensor]] = {
    "scalar": scalar,
    "vector": lambda dtype, x: x.to(dtype),
    "empty": lambda dtype, x: x[:0].to(dtype),
    "matrix": lambda dtype, x: x[:6].reshape(2, 3).to(dtype),
    "transposed": lambda dtype, x: x[:6].reshape(2, 3).to(dtype).t(),
    "holes": lambda dtype, x: x.to(dtype)[::2],
    "channels last": lambda dtype, x: (
        x.repeat(2)[:12].reshape(1, 3, 2, 2).to(dtype).contiguous(memory_format=torch.channels_last)
    ),
    "offset view": lambda dtype, x: torch.cat([x, x]).to(dtype)[1 : 1 + len(x)],
}


def settings_of(case: Case) -> dict[str, Any]:
    """Valid settings, extreme ones included."""
    b = case.randint(1, 40)
    finite = case.random() < 0.4
    variance = case.choice(["ema", "ema", "second-moment"])
    beta1 = case.choice([0.0, 0.3, 0.9, 0.9, 0.99])
    if variance == "second-moment" and beta1 == 0.0:
        beta1 = 0.9
    settings = {
        "lr": case.choice([0.0, 1e-3, 0.01, 0.1]),
        "betas": (beta1, case.choice([0.0, 0.9, 0.99, 0.999])),
        "eps": case.choice([0.0, 1e-8, 1e-3]) or 1e-30,
        "weight_decay": case.choice([0.0, 0.1, 1.0]),
        "rho": case.choice([0.0, 0.5, 0.95, 0.999]),
        "mask": case.choice(["soft", "hard", "snr"]),
        "alpha": case.choice(["auto", "fresh", "finite" if finite else "auto", 0.0, 0.3, 10.0]),
        "z": case.choice([0.0, 1.0, 1.5, 3.0]),
        "softness": case.choice([0.0, 0.1, 1.0]),
        "batch_size": b if finite else None,
        "dataset_size": b + case.randint(1, 1000) if finite else None,
        "mode": case.choice(["auto", "paper"]),
        "variance": variance,
        "reduction": case.choice([None, None, "per_tensor"]),
        "q_min": case.choice([0.0, 0.0, 0.3, 1.0]),
        "maximize": case.random() < 0.2,
        "gate": case.random() < 0.9,
    }
    if settings["mode"] == "paper" and discontinuous(settings) and settings["alpha"] != 10.0:
        settings["alpha"] = 0.3  # at 1 both sides are equal algebraically, and rounding decides
    return settings


def discontinuous(settings: dict[str, Any]) -> bool:
    """A mask that jumps turns a rounding into a whole step."""
    return settings["mask"] == "hard" or settings["softness"] == 0.0


def gradient(case: Case, p: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    """A gradient around ``mean``, in one of several memory layouts."""
    g = (mean + torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
    form = case.choice(["plain", "expanded", "strided", "conformal"])
    if form == "expanded" and p.dim() == 2:
        return g[:1].expand(p.shape)
    if form == "strided" and p.dim() >= 1:
        return torch.stack([g, g], -1)[..., 0]
    return torch.empty_like(p.detach()).copy_(g) if form == "conformal" else g


def reloaded(opt: PopRiskAdamW, make: Callable[[], PopRiskAdamW]) -> PopRiskAdamW:
    """Another optimizer on the same parameters with the state saved and loaded."""
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


class Run:
    """One path beside one reference per parameter."""

    def __init__(self, params: list[Parameter], settings: dict[str, Any], path: dict[str, Any]):
        self.params = params
        self.make = lambda: PopRiskAdamW(params, **settings, **path)
        self.opt = self.make()

    def activation(self, action: str, grads: list[Tensor | None]) -> None:
        if action == "reload":
            self.opt = reloaded(self.opt, self.make)
        if action == "copy":
            self.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))
        if action == "gate_stats":
            self.opt.gate_stats()
        if action == "not finite":
            self.skip(grads)
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.opt.step()

    def skip(self, grads: list[Tensor | None]) -> None:
        """A step on a NaN must change nothing."""
        before = [p.detach().clone() for p in self.params]
        bad = [None if g is None else g.clone() for g in grads]
        if not any(g is not None and g.numel() for g in bad):
            return
        first = next(g for g in bad if g is not None and g.numel())
        first[(-1,) * first.dim()] = float("nan")
        for p, g in zip(self.params, bad, strict=True):
            p.grad = g
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.opt.step()
        for p, w in zip(self.params, before, strict=True):
            assert torch.equal(p, w), "a skipped step changed a weight"


def parameters(case: Case, generator: torch.Generator) -> list[Tensor]:
    dtype = case.choice(
        [torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]
    )
    layouts = [case.choice(list(LAYOUTS)) for _ in range(case.randint(1, 3))]
    values = [torch.randn(case.choice([6, 7, 17, 40]), generator=generator) for _ in layouts]
    return [LAYOUTS[name](dtype, x.double()) for name, x in zip(layouts, values, strict=True)]


def clone(t: Tensor) -> Parameter:
    """The same values in the same, possibly gappy, layout."""
    size = (
        1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    )
    twin = torch.zeros(size, dtype=t.dtype).as_strided(t.shape, t.stride()) if size else t.clone()
    return Parameter(twin.copy_(t))


def packed(tensors: list[Tensor]) -> list[Parameter]:
    """Parameters that are neighbours in one storage, as flattened models have them."""
    base = torch.cat([t.flatten() for t in tensors])
    parts = base.split([t.numel() for t in tensors])
    return [Parameter(x.view(t.shape)) for x, t in zip(parts, tensors, strict=True)]


def check(seed: int) -> str:
    """Run one case; return what it was, or raise AssertionError."""
    case, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    settings, starts = settings_of(case), parameters(case, generator)
    one_storage = case.random() < 0.15
    runs = [
        Run(packed(starts) if one_storage else [clone(t) for t in starts], settings, path)
        for path in PATHS
    ]
    references = [ReferenceOptimizer(t, **settings) for t in starts]
    means = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in starts]
    expected = [t.double() for t in starts]
    low = starts[0].dtype in (torch.bfloat16, torch.float16)
    for _ in range(case.randint(1, 12)):
        action = case.choice(["step"] * 6 + ["reload", "copy", "gate_stats", "not finite"])
        grads: list[Tensor | None] = [
            None if case.random() < 0.15 else gradient(case, t, mean, generator)
            for t, mean in zip(starts, means, strict=True)
        ]
        for run in runs:
            run.activation(action, grads)
        for i, g in enumerate(grads):
            if g is not None and g.numel():
                expected[i] = references[i].step(g)
                if low:
                    expected[i] = expected[i].to(starts[i].dtype).double()
                    references[i].w = expected[i].flatten().tolist()
    compare(runs, expected, settings, starts[0].dtype)
    return str(starts[0].dtype)


def compare(
    runs: list[Run], expected: list[Tensor], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    loop, foreach, fused = ([p.detach().double() for p in run.params] for run in runs)
    tolerance = TOLERANCE[dtype]
    exact = dtype == torch.float64 or not discontinuous(settings)
    for i, truth in enumerate(expected):
        scale = 1.0 + truth.abs() + 12 * settings["lr"]
        assert torch.equal(loop[i], foreach[i]), f"loop and foreach differ at {i}"
        apart = ((fused[i] - foreach[i]).abs() / scale).max() if truth.numel() else 0.0
        assert apart <= tolerance, f"fused is {apart:.2e} off foreach at {i}"
        off = ((foreach[i] - truth).abs() / scale).max() if truth.numel() else 0.0
        assert not exact or off <= tolerance, f"foreach is {off:.2e} off the reference at {i}"


BAD: dict[str, list[Any]] = {
    "lr": [-1.0, float("nan"), "fast", None],
    "betas": [(0.9,), (1.0, 0.9), (0.9, -0.1), 0.9],
    "rho": [1.0, -0.1, "x"],
    "mask": ["softer", 3],
    "alpha": [-1.0, "never", "finite"],
    "z": [-1.0, float("inf")],
    "batch_size": [0, -3, 2.5, True],
    "mode": ["Auto", None],
    "variance": ["exact variance", 1],
    "reduction": ["per-tensor", 0],
    "q_min": [-0.1, 1.5],
    "eps": [-1e-8, None],
}


def check_refusal(seed: int) -> str:
    """One bad setting must be refused with a message that names it."""
    case = random.Random(seed)
    name = case.choice(list(BAD))
    value = case.choice(BAD[name])
    with pytest.raises(CLEAR, match=name):
        PopRiskAdamW([Parameter(torch.ones(2))], **{name: value})
    return "refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds: Counter[str] = Counter()
    wrong: list[str] = []
    started = time.monotonic()
    for seed in range(options.first, options.first + options.cases):
        try:
            kinds[check(seed) if seed % 10 else check_refusal(seed)] += 1
        except Exception as error:  # a case may fail in any way; the seed says which
            wrong.append(f"{seed}: {type(error).__name__}: {error}")
            print(wrong[-1], flush=True)
    result = {
        "environment": {"python": platform.python_version(), "torch": torch.__version__},
        "cases": options.cases,
        "kinds": dict(kinds),
        "wrong": wrong,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(result, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
