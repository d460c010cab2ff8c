"""The sentences of a verdict, each by a rule from the numbers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Interval(NamedTuple):
    """A mean over seeds with its 95% confidence interval (Student t); NaN ends for one seed."""

    mean: float
    low: float
    high: float


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        label: what was trained.
        family: one of :data:`poprisk.arms.FAMILIES`.
        arms: names of the arms pooled in it.
        seeds: how many finished.
        final: metric at the end of training (early stopping: at the chosen epoch).
        best: metric at the best epoch in hindsight, which nobody knows while training.
        memorized: share of the label noise reproduced at the end; None if unknown.
        difference: ``final`` minus that of the best AdamW, paired over seeds; None for itself.
    """

    label: str
    family: str
    arms: tuple[str, ...]
    seeds: int
    final: Interval
    best: Interval
    memorized: Interval | None
    difference: Interval | None


class Scale(NamedTuple):
    """How values of a metric are written."""

    name: str
    higher_is_better: bool
    percent: bool

    def value(self, x: float) -> str:
        """A value, with its unit."""
        if not math.isfinite(x):
            return "no finite value"
        return f"{100 * x:.1f}%" if self.percent else f"{x:.4g}"

    def gap(self, x: float, base: float) -> str:
        """The size of a difference: points, or percent of ``base``."""
        if self.percent:
            return f"{abs(100 * x):.1f} points"
        return f"{abs(100 * x / base):.1f}%" if base else f"{abs(x):.3g}"

    def is_zero(self, gap: str) -> bool:
        """Whether a gap, as written, rounds to nothing."""
        return not any(digit in gap for digit in "123456789")

    def gain(self, x: float) -> float:
        """A difference with its sign turned so that positive is better."""
        return x if self.higher_is_better else -x


def scale_of(config: dict[str, Any]) -> Scale:
    """The scale of a run's metric."""
    metric = config["task"]["metric"]
    return Scale(metric["name"], metric["higher_is_better"], metric["percent"])


def compared(difference: Interval, scale: Scale) -> str:
    """Say better, worse or level: whether the interval of a difference excludes zero."""
    low, high = sorted((scale.gain(difference.low), scale.gain(difference.high)))
    if math.isnan(low) or low <= 0 <= high:
        return "level"
    return "better" if low > 0 else "worse"


NO_VERDICT = "Not enough runs have finished for a verdict."


def headline(ours: Row | None, best: Row | None, scale: Scale) -> str:
    """Ours against the best AdamW run to the end."""
    if ours is None or best is None or ours.difference is None:
        return NO_VERDICT
    d = ours.difference
    end = f"PopRiskAdamW, default settings, ends at {scale.value(ours.final.mean)} {scale.name}"
    against = f"the best AdamW of the grid run to the end ({scale.value(best.final.mean)})"
    if not math.isfinite(ours.final.mean):
        return f"The gate loses here: PopRiskAdamW, default settings, diverged, unlike {against}."
    if math.isnan(d.mean):  # no seed in common
        return NO_VERDICT
    size = scale.gap(d.mean, best.final.mean)
    interval = _interval(d, best.final.mean, scale)
    if math.isnan(d.low):
        side = f"{size} better than" if scale.gain(d.mean) > 0 else f"{size} worse than"
        side = "level with" if scale.is_zero(size) else side
        return f"{end}, {side} {against}; one seed, so no interval."
    return {
        "better": f"{end}, {size} better than {against}{interval}.",
        "worse": f"The gate loses here: {end}, {size} worse than {against}{interval}.",
        "level": f"{end}, level with {against}: the difference of {size} is within the "
        f"noise{interval}.",
    }[compared(d, scale)]


def _interval(d: Interval, base: float, scale: Scale) -> str:
    """The interval of a gain in words; empty for one seed."""
    if math.isnan(d.low):
        return ""
    if not scale.percent and not base:
        low, high = sorted((scale.gain(d.low), scale.gain(d.high)))
        return f"; 95% interval of the gain {low:+.3g} to {high:+.3g}"
    unit = 100.0 if scale.percent else 100.0 / abs(base)
    low, high = sorted((scale.gain(d.low) * unit, scale.gain(d.high) * unit))
    return f"; 95% interval of the gain {low:+.1f} to {high:+.1f}{'' if scale.percent else '%'}"


def sentences(rows: list[Row], scale: Scale, hindsight: Row | None) -> list[str]:
    """What else the table says, one fact each; rows that are missing are passed over."""
    found = {row.family: row for row in reversed(rows) if row.family != "adamw"}
    ours = found.get("poprisk")
    if ours is None or not math.isfinite(ours.final.mean):
        return []
    best = next((r for r in rows if r.family == "adamw" and r.difference is None), None)
    said = [
        _against_stopping(ours, found.get("early-stopping"), scale),
        _against_hindsight(ours, hindsight, scale),
        _memorization(ours, best),
        _controls(ours, best, found.get("rms-matched"), found.get("shuffled"), scale),
        _seeds(ours),
    ]
    return [sentence for sentence in said if sentence]


def _against_stopping(ours: Row, stopped: Row | None, scale: Scale) -> str:
    if stopped is None or not stopped.seeds:
        return ""
    return (
        f"AdamW stopped early, its learning rate and epoch chosen on a held-out fifth of the noisy "
        f"training data, reaches {scale.value(stopped.final.mean)}: {_side(ours, stopped, scale)}."
    )


def _side(ours: Row, other: Row, scale: Scale) -> str:
    gain = scale.gain(ours.final.mean - other.final.mean)
    size = scale.gap(gain, other.final.mean)
    if scale.is_zero(size):
        return "PopRiskAdamW, which holds nothing out, does as well"
    return f"PopRiskAdamW, which holds nothing out, is {size} {'better' if gain > 0 else 'worse'}"


def _against_hindsight(ours: Row, hindsight: Row | None, scale: Scale) -> str:
    if hindsight is None or not hindsight.seeds:
        return ""
    gain = scale.gain(ours.final.mean - hindsight.best.mean)
    size = scale.gap(gain, hindsight.best.mean)
    side = f"{size} {'above' if scale.higher_is_better == (gain > 0) else 'below'} that"
    return (
        f"With the test set in hand one would have stopped AdamW at "
        f"{scale.value(hindsight.best.mean)} ({hindsight.label}, best epoch of each seed); "
        f"PopRiskAdamW ends {'there too' if scale.is_zero(size) else side}."
    )


def _memorization(ours: Row, best: Row | None) -> str:
    if ours.memorized is None or best is None or best.memorized is None:
        return ""
    return (
        f"Of the label noise, PopRiskAdamW reproduces {ours.memorized.mean:.1%} at the end, the "
        f"best AdamW {best.memorized.mean:.1%}."
    )


def _controls(
    ours: Row, best: Row | None, matched: Row | None, shuffled: Row | None, scale: Scale
) -> str:
    """How much of the gain the smaller step alone explains."""
    named = (
        (matched, "the same update size but no mask"),
        (shuffled, "the mask's values shuffled over the weights"),
    )
    controls = [(r.final.mean, kind) for r, kind in named if r is not None and r.seeds]
    if not controls:
        return ""
    reached = " and ".join(f"{scale.value(value)} with {kind}" for value, kind in controls)
    gains = [scale.gain(ours.final.mean - value) for value, _ in controls]
    if any(gain <= 0 for gain in gains):
        tail = "a smaller step explains the result as well as the gate does."
    elif best is not None and scale.gain(ours.final.mean - best.final.mean) <= 0:
        tail = "the gate does more than a smaller step, though not enough to win here."
    else:
        tail = "the rest of the gain comes from which coordinates the gate lets through."
    return f"Controls reach {reached}: {tail}"


def _seeds(ours: Row) -> str:
    if ours.seeds >= 5:
        return ""
    if ours.seeds == 1:
        return "One seed says nothing about chance: --seeds 10 gives intervals."
    return f"Only {ours.seeds} seeds: the intervals are wide; --seeds 10 narrows them."
