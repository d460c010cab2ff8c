r"""Signal and label noise in language models of 0.1 to 124 million weights.

A causal transformer learns the next symbol of windows of the standard library's own text. In half
of the training windows 40% of the targets are other symbols, in known places: a fifth of all. Every
size sees the same windows in the same batches. :class:`poprisk.CellTracer` splits what AdamW did to
the outputs, of windows of other texts and of some of the training set, into what right targets and
what wrong ones did; :func:`poprisk.attribute` says which windows raised the loss on other texts.

``python -m poprisk_lab.studies.scale`` does 0.1M, 1M and 10M on the processor and puts them on
record. ``python -m poprisk_lab.studies.scale --sizes 124M --device cuda --seeds 1`` is made for one
GPU of 80 GB.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from poprisk import CellTracer, attribute, replay
from poprisk.path import CellTrace
from poprisk.randomness import generator_of
from poprisk_lab.plots import short, short_interval
from poprisk_lab.studies.record import do_study
from poprisk_lab.studies.stopping.text import SYMBOLS, Reader, Windows, pages
from poprisk_lab.study import Metrics, Results, Settings, Study, Trial, Workspace

SEEDS = range(560, 563)
"""The data, weights and order of a training; of each size."""
LENGTH, N, BATCH, EPOCHS = 32, 256, 16, 8
"""Symbols of a window that are told, training windows, those of a step, and passes."""
CORRUPTED, WRONG = 0.5, 0.4
"""Share of the windows with wrong targets, and of their targets that are."""
FRESH, SEEN = 48, 16
"""Windows of other texts that are asked about, and training windows of either kind."""
MOMENTS = 12
MAX_MEMORY = 64 * 2**30


class ModelSize(NamedTuple):
    """A transformer, and the learning rate that goes with its width."""

    width: int
    blocks: int
    lr: float


SIZES = {
    "0.1M": ModelSize(64, 2, 1.5e-3),
    "1M": ModelSize(128, 5, 7e-4),
    "10M": ModelSize(384, 6, 2.5e-4),
    "124M": ModelSize(928, 12, 2e-4),
}
USUAL = ["0.1M", "1M", "10M"]
"""Sizes of the record."""
PARTS = ("all", "noise", "influence", "right targets")
"""What is measured; the last is a training on right targets, which the signal alone is not."""


class NextSymbols(Reader):
    """Tells the symbol after each of a window, (b, t, symbols)."""

    def forward(self, x: Tensor) -> Tensor:
        """From symbols (b, t)."""
        return self.head(self.states(x))


class Corpus(NamedTuple):
    """Windows (n, t), right and given targets, which are wrong, and windows of other texts.

    The first half of the training windows are those with wrong targets.
    """

    x: Tensor
    clean: Tensor
    given: Tensor
    wrong: Tensor
    fresh: Tensor
    fresh_targets: Tensor


def corpus(seed: int, n: int, device: str) -> Corpus:
    """Draw the windows; training texts are not those of the others."""
    said = pages()
    order = torch.randperm(len(said), generator=generator_of(seed, "texts")).tolist()
    halves = ([said[i] for i in order[k::2]] for k in range(2))
    (train, _), (fresh, _) = (
        Windows(half, LENGTH + 1).draw(count, generator_of(seed, stream))
        for half, count, stream in zip(halves, (n, FRESH), ("windows", "fresh"), strict=True)
    )
    g, clean = generator_of(seed, "wrong targets"), train[:, 1:]
    wrong = torch.rand(clean.shape, generator=g) < WRONG
    wrong[round(CORRUPTED * n) :] = False
    other = (clean + torch.randint(1, SYMBOLS, clean.shape, generator=g)) % SYMBOLS
    found = Corpus(
        train[:, :-1], clean, other.where(wrong, clean), wrong, fresh[:, :-1], fresh[:, 1:]
    )
    return Corpus(*(t.contiguous().to(device) for t in found))


def window_loss(u: Tensor, y: Tensor) -> Tensor:
    """Mean loss of the symbols of each window, (b,)."""
    return F.cross_entropy(u.transpose(1, 2), y, reduction="none").mean(1)


class LanguageTraining(NamedTuple):
    """What is trained, by what, on which batches."""

    model: NextSymbols
    optimizer: torch.optim.Optimizer
    data: Corpus
    batches: list[Tensor]

    def steps(self, after: Callable[[Tensor], Any] = lambda batch: None) -> float:
        """Train; processor seconds, or those of a GPU's clock."""
        x, y, device = self.data.x, self.data.given, self.data.x.device
        began = _now(device)
        for batch in self.batches:
            self.optimizer.zero_grad()
            window_loss(self.model(x[batch]), y[batch]).mean().backward()
            self.optimizer.step()
            after(batch)
        return _now(device) - began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def made(size: ModelSize, seed: int, *, n: int, epochs: int, device: str) -> LanguageTraining:
    """A training before its first step: the same one each time."""
    data, order = corpus(seed, n, device), generator_of(seed, "order")
    batches = [torch.randperm(n, generator=order).split(BATCH) for _ in range(epochs)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_of(seed, "weights").initial_seed())
        model = NextSymbols(SYMBOLS, length=LENGTH, width=size.width, blocks=size.blocks)
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=size.lr, eps=1e-6)
    return LanguageTraining(model, optimizer, data, list(chain.from_iterable(batches)))


def trials(
    quick: bool,
    sizes: Sequence[str] = USUAL,
    seeds: Sequence[int] = SEEDS,
    device: str = "cpu",
) -> list[Trial]:
    """Every size on every seed, 10M on two; what the noise alone costs, on the first."""
    n, epochs, seeds = (N, EPOCHS, seeds) if not quick else (4 * BATCH, 2, seeds[:1])
    return [
        Trial(
            f"{size}-{part}-{seed}",
            {"size": size, "part": part, "seed": seed, "n": n, "epochs": epochs, "device": device},
        )
        for seed in seeds
        for size in (sizes if not quick else sizes[:1])
        for part in PARTS
        if part != "noise" or seed == seeds[0]
        if size != "10M" or seed in seeds[:2]
    ]


def run(settings: Settings, _: Workspace) -> Metrics:
    """Train once alone, and once with what is measured, in one process."""
    common = {"n": settings["n"], "epochs": settings["epochs"], "device": settings["device"]}
    make = partial(made, SIZES[settings["size"]], settings["seed"], **common)
    if settings["part"] == "right targets":
        return {"loss": short(_right(make()))}
    with peak_of(settings["device"]) as alone:
        plain = make()
        seconds = [plain.steps()]
    begun = make()
    with peak_of(settings["device"]) as beside:
        measure = _influence if settings["part"] == "influence" else _cells
        found, spent = measure(begun, settings["part"])
    seconds.append(make().steps())
    training = sum(seconds) / 2
    return {
        "weights": sum(p.numel() for p in plain.model.parameters()),
        "steps": len(plain.batches),
        "training seconds": [short(s) for s in seconds],
        "trainings": {name: short(s / training) for name, s in spent.items()},
        "MiB, training": short(alone[0]),
        "MiB, beside it": short(beside[0]),
        **found,
    }


def _right(training: LanguageTraining) -> float:
    """Loss on other texts after the same training on right targets."""
    data = training.data
    training._replace(data=data._replace(given=data.clean)).steps()
    with torch.no_grad():
        return _mean_loss(training.model(data.fresh), data.fresh_targets)


def _cells(training: LanguageTraining, part: str) -> tuple[Metrics, dict[str, float]]:
    """The training followed, and what became of its parts."""
    data, half = training.data, round(CORRUPTED * len(training.data.x))
    seen = torch.cat([torch.arange(SEEN), half + torch.arange(SEEN)])
    points = torch.cat([data.fresh, data.x[seen]])
    tracer = CellTracer(
        training.model, window_loss, training.optimizer, train=(data.x, data.given),
        clean_targets=data.clean, query=points, parts=part, points=MOMENTS, max_memory=MAX_MEMORY,
    )  # fmt: skip
    with tracer:
        spent = training.steps(tracer.step)
    trace = tracer.trace()
    rows = [_moment(trace, i, data, seen) for i in range(len(trace.parts))]
    left = dict(zip(("signal", "noise"), map(short, trace.energy_left), strict=True))
    closure = {name: short(c) for name, c in trace.closure._asdict().items()}
    return {"moments": rows, "energy left": left, "closure": closure}, {"followed": spent}


def _moment(trace: CellTrace, i: int, data: Corpus, seen: Tensor) -> dict[str, Any]:
    """Losses on other texts, and how far each part moved which outputs."""
    u, wrong, given = trace.outputs(i), data.wrong[seen], data.given[seen]
    signal, noise = (t.view_as(u) for t in trace.parts[i][1:3])
    drawn = torch.randint(1, SYMBOLS, data.fresh.shape, generator=generator_of(0, "other symbols"))
    other = (data.fresh_targets + drawn.to(u.device)) % SYMBOLS
    fitted = (u[FRESH:].argmax(2) == given)[wrong]
    return {
        "step": trace.parts[i].step,
        "loss": short(_mean_loss(u[:FRESH], data.fresh_targets)),
        "loss without noise": short(_mean_loss(trace.without_noise(i)[:FRESH], data.fresh_targets)),
        "wrong targets fitted": short(float(fitted.double().mean())),
        "push": {
            "signal, right targets": _push(signal[FRESH:][~wrong], given[~wrong]),
            "signal, other texts": _push(signal[:FRESH], data.fresh_targets),
            "noise, wrong targets": _push(noise[FRESH:][wrong], given[wrong]),
            "noise, other texts": _push(noise[:FRESH], other),
        },
        "moved": {
            "signal, training": _size(signal[FRESH:]),
            "signal, other texts": _size(signal[:FRESH]),
            "noise, training": _size(noise[FRESH:]),
            "noise, other texts": _size(noise[:FRESH]),
        },
    }


def _push(moved: Tensor, symbols: Tensor) -> float:
    """Mean movement of the logits (..., s) of some symbols (...) over that of all."""
    own = moved.gather(-1, symbols.unsqueeze(-1)).squeeze(-1)
    return short(float((own - moved.mean(-1)).mean()))


def _size(moved: Tensor) -> float:
    """Root mean square of the movement of logits (..., s) over that of all symbols."""
    return short(float((moved - moved.mean(-1, keepdim=True)).square().mean().sqrt()))


def _mean_loss(u: Tensor, y: Tensor) -> float:
    return float(window_loss(u, y).mean())


def _influence(training: LanguageTraining, _: str) -> tuple[Metrics, dict[str, float]]:
    """Which windows raised the mean loss on other texts."""
    from sklearn.metrics import roc_auc_score

    data, device = training.data, training.data.x.device
    began = _now(device)
    done = replay(
        training.model, window_loss, training.optimizer, training.batches,
        (data.fresh, data.fresh_targets), train=(data.x, data.given),
    )  # fmt: skip
    replayed = _now(device)
    found = attribute(done, max_memory=MAX_MEMORY)
    ended = _now(device)
    corrupted = data.wrong.any(1).cpu()
    order = found.influence.cpu().argsort(descending=True)
    quarter = corrupted[order[: len(order) // 4]]
    return {
        "loss": short(float(found.value)),
        "AUROC of windows with wrong targets": short(
            float(roc_auc_score(corrupted.numpy(), found.influence.cpu().numpy()))
        ),
        "wrong in the most harmful quarter": short(float(quarter.double().mean())),
        "valid": found.valid,
        "agreement": short(found.agreement),
    }, {"replay": replayed - began, "attribute, with its check": ended - replayed}


@contextmanager
def peak_of(device: str) -> Iterator[list[float]]:
    """Yields a list that holds, afterwards, the most memory that was held inside, MiB.

    Of the GPU, or of this process on Linux; NaN elsewhere.
    """
    found, status = list[float](), Path("/proc/self/status")
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    yield found
    if device.startswith("cuda"):
        found.append(torch.cuda.max_memory_allocated(device) / 2**20)
    elif status.exists():
        text = status.read_text(encoding="utf-8")
        found.append(int(re.findall(r"VmHWM:\s*(\d+)", text)[0]) / 1024)
    else:
        found.append(math.nan)


def report(done: Results) -> dict[str, Any]:
    """By size: every trial as it was found, and the means at the end over seeds."""
    sizes = dict.fromkeys(d.settings["size"] for d in done)
    return {
        "seeds": sorted({d.settings["seed"] for d in done}),
        "sizes": {size: _summary(done.where(size=size)) for size in sizes},
    }


def _summary(done: Results) -> dict[str, Any]:
    cells, influence, right = (
        [d.metrics for d in done.where(part=p)] for p in ("all", "influence", "right targets")
    )
    ends = [row["moments"][-1] for row in cells]
    read = {
        "loss": [end["loss"] for end in ends],
        "loss without noise": [end["loss without noise"] for end in ends],
        "loss, trained on right targets": [row["loss"] for row in right],
        "wrong targets fitted": [end["wrong targets fitted"] for end in ends],
        "noise left": [row["energy left"]["noise"] for row in cells],
        "signal left": [row["energy left"]["signal"] for row in cells],
        "closure of other texts": [row["closure"]["query"] for row in cells],
        "AUROC": [row["AUROC of windows with wrong targets"] for row in influence],
    }
    for name, own in (("signal", "right targets"), ("noise", "wrong targets")):
        read[f"push of the {name}, other texts over own"] = [
            end["push"][f"{name}, other texts"] / end["push"][f"{name}, {own}"] for end in ends
        ]
    return {
        "at the end": {name: short_interval(values) for name, values in read.items() if values},
        "trials": [_without_nan({**d.settings, **d.metrics}) for d in done],
    }


def _without_nan(found: Any) -> Any:
    """JSON knows no NaN: nothing instead."""
    if isinstance(found, dict):
        return {key: _without_nan(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_without_nan(value) for value in found]
    return None if isinstance(found, float) and math.isnan(found) else found


STUDY = Study("scale", trials, run, report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=USUAL)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    parser.add_argument("--device", default="cpu")
    options = vars(parser.parse_args())
    seeds = SEEDS[: options.pop("seeds")]
    chosen = {"sizes": options.pop("sizes"), "seeds": seeds, "device": options.pop("device")}
    usual = chosen == {"sizes": USUAL, "seeds": SEEDS, "device": "cpu"}
    name = "scale" if usual else "-".join(["scale", *chosen["sizes"], chosen["device"]])
    do_study(Study(name, partial(trials, **chosen), run, report), **options)
