"""The sentences of a verdict, each by a rule from the numbers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from poprisk.intervals import MIN_SEEDS, Interval
from poprisk_lab.convergence import Improvement


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        label: what was trained.
        family: one of :data:`poprisk_lab.arms.FAMILIES`.
        arms: names of the arms pooled in it.
        seeds: how many finished.
        final: metric at the end of training (early stopping: at the chosen epoch).
        best: metric at the best epoch in hindsight, which nobody knows while training.
        memorized: share of the label noise reproduced at the end; None if unknown.
        difference: ``final`` minus that of the best AdamW, paired over seeds; None for itself.
        improving: how it still improves at its end; None if it does not, or that is unknown.
    """

    label: str
    family: str
    arms: tuple[str, ...]
    seeds: int
    final: Interval
    best: Interval
    memorized: Interval | None
    difference: Interval | None
    improving: Improvement | None = None


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

    def gains(self, difference: Interval, base: float) -> Interval:
        """A difference as gain: in points, in percent of ``base``, or as it is where that is 0."""
        unit = 100.0 if self.percent else 100.0 / abs(base) if base else 1.0
        ends = [self.gain(v) * unit for v in difference[1:3]]
        values = tuple(self.gain(v) * unit for v in difference.values)
        found = Interval(self.gain(difference.mean) * unit, min(ends), max(ends), values)
        return found.clipped(-100.0, 100.0) if self.percent else found

    def signed(self, gain: float, base: float) -> str:
        """One of :meth:`gains`, with its sign and unit; points without."""
        if self.percent or base:
            return f"{gain:+.1f}{'' if self.percent else '%'}"
        return f"{gain:+.3g}"


def scale_of(config: dict[str, Any]) -> Scale:
    """The scale of a run's metric."""
    metric = config["task"]["metric"]
    return Scale(metric["name"], metric["higher_is_better"], metric["percent"])


def compared(difference: Interval, scale: Scale) -> str:
    """Say better, worse or level: whether the interval of a difference clearly excludes zero."""
    side = scale.gain(difference.sign)
    return "level" if side == 0 else "better" if side > 0 else "worse"


class Field(NamedTuple):
    """Who stands beside ours in the sentences; None for a row that is missing.

    Attributes:
        grid: all AdamW rows.
        best: the one with the best final metric.
        hindsight: the one with the best epoch.
        default: the one at our learning rate and decay.
        stopped: AdamW with early stopping.
        matched: AdamW at the gated run's update size.
        shuffled: the gate with its values shuffled.
        leads: our final metric minus that of each of the last three, paired over seeds, by family.
        edge: a warning if the best AdamW lies at the edge of the grid, else empty.
        lr: our learning rate.
        epochs: of every run.
    """

    grid: list[Row]
    best: Row | None
    hindsight: Row | None
    default: Row | None
    stopped: Row | None
    matched: Row | None
    shuffled: Row | None
    leads: dict[str, Interval]
    edge: str
    lr: float = 1e-3
    epochs: int = 0


SMALLER_STEP = "a smaller step explains the result as well as the gate does."
WRONG_WEIGHTS = "the mask helps by its size here, not by which weights it picks."
BEATEN = "the gate does worse than its controls."
UNDECIDED = "the gate is ahead of them, but by no more than chance on these seeds."
TOO_FEW = f"fewer than {MIN_SEEDS} seeds do not say what explains the result."
NO_VERDICT = "Not enough runs have finished for a verdict."


def headline(ours: Row | None, field: Field, scale: Scale) -> str:
    """Ours against the best AdamW run to the end."""
    best = field.best
    if ours is None or best is None or ours.difference is None:
        return NO_VERDICT
    d = ours.difference
    end = f"PopRiskAdamW, default settings, ends at {scale.value(ours.final.mean)} {scale.name}"
    against = (
        f"the best of {len(field.grid)} AdamW settings, picked by the test set "
        f"({scale.value(best.final.mean)})"
    )
    if not math.isfinite(ours.final.mean):
        return f"The gate loses here: PopRiskAdamW, default settings, diverged, unlike {against}."
    if math.isnan(d.mean):  # no seed in common
        return NO_VERDICT
    size = scale.gap(d.mean, best.final.mean)
    interval = _interval(d, best.final.mean, scale)
    if not d.known:
        side = f"{size} better than" if scale.gain(d.mean) > 0 else f"{size} worse than"
        side = "level with" if scale.is_zero(size) else side
        return f"{end}, {side} {against}; {_too_few(d, best.final.mean, scale)}."
    if ours.improving and compared(d, scale) == "worse":
        return (
            f"Not settled: {end}, {size} worse than {against}{interval}, but still improves at its "
            "end."
        )
    return {
        "better": f"{end}, {size} better than {against}{interval}.",
        "worse": f"The gate loses here: {end}, {size} worse than {against}{interval}.",
        "level": f"{end}, not told apart from {against}: {_signed(d, size, scale)}, which may be "
        f"chance{interval}.",
    }[compared(d, scale)]


def _too_few(d: Interval, base: float, scale: Scale) -> str:
    """Why there is no verdict, and what the seeds gave in its place."""
    needed = f"so no interval and no verdict, which take at least {MIN_SEEDS} (--seeds {MIN_SEEDS})"
    if len(d.values) == 1:
        return f"one seed, {needed}"
    each = " and ".join(scale.signed(v, base) for v in scale.gains(d, base).values)
    return f"{len(d.values)} seeds ({each}), {needed}"


def _signed(d: Interval, size: str, scale: Scale) -> str:
    """A difference with its direction in a word."""
    if scale.is_zero(size):
        return "no difference"
    return f"{size} {'better' if scale.gain(d.mean) > 0 else 'worse'}"


def _interval(d: Interval, base: float, scale: Scale) -> str:
    """The interval of a gain in words; empty where there is none."""
    if not d.known:
        return ""
    gains = scale.gains(d, base)
    if d.alike:
        return f"; the same on all {len(d.values)} seeds, which says nothing about their spread"
    low, high = scale.signed(gains.low, base), scale.signed(gains.high, base)
    if low.endswith("%"):
        low = low[:-1]
    return f"; 95% interval of the gain {low} to {high}"


def sentences(ours: Row | None, field: Field, scale: Scale) -> list[str]:
    """What else the table says, one fact each; rows that are missing are passed over."""
    if ours is None or not math.isfinite(ours.final.mean):
        return []
    said = [
        _unfinished(ours, field, scale),
        _against_default(ours, field, scale),
        _against_stopping(field, scale),
        _against_hindsight(ours, field.hindsight, scale),
        _memorization(ours, field.best),
        _controls(ours, field, scale),
        field.edge,
        _seeds(ours),
    ]
    return [sentence for sentence in said if sentence]


def _unfinished(ours: Row, field: Field, scale: Scale) -> str:
    """Who still improves at the end, and what to do about it."""
    if ours.improving:
        also = ", like the best AdamW" if field.best and field.best.improving else ""
        return (
            f"PopRiskAdamW still improves at its end ({_pace(ours.improving, scale)}){also}: "
            f"train longer (--epochs {4 * field.epochs}) or at three times the learning rate "
            f"(lr {3 * field.lr:g}) before it is judged."
        )
    if field.best and field.best.improving:
        return (
            f"The best AdamW still improves at its end ({_pace(field.best.improving, scale)}): "
            f"train longer (--epochs {4 * field.epochs}) before it is judged."
        )
    return ""


def _pace(found: Improvement, scale: Scale) -> str:
    epochs = f"over the last {found.epochs} epochs" if found.epochs > 1 else "over the last epoch"
    if found.by_loss:
        return f"its test loss falls by {found.gain:.1%} {epochs}"
    verb = "rises" if scale.higher_is_better else "falls"
    size = f"{100 * found.gain:.1f} points" if scale.percent else f"{found.gain:.2g}"
    return f"{scale.name} {verb} by {size} {epochs}"


def _against_default(ours: Row, field: Field, scale: Scale) -> str:
    """What choosing the learning rate and decay is worth to AdamW."""
    finals = sorted(row.final.mean for row in field.grid if math.isfinite(row.final.mean))
    if field.default is None or not field.default.seeds or len(finals) < 2:
        return ""
    end = field.default.final.mean
    gain = scale.gain(ours.final.mean - end)
    size = scale.gap(gain, end)
    side = "as good" if scale.is_zero(size) else f"{size} {'worse' if gain > 0 else 'better'}"
    return (
        f"AdamW at the same learning rate and decay ends at {scale.value(end)}, {side}; over the "
        f"grid it ends anywhere from {scale.value(finals[0])} to {scale.value(finals[-1])}."
    )


def _against_stopping(field: Field, scale: Scale) -> str:
    lead = field.leads.get("early-stopping")
    if field.stopped is None or not field.stopped.seeds or lead is None or math.isnan(lead.mean):
        return ""
    reached = field.stopped.final.mean
    side = _signed(lead, scale.gap(lead.mean, reached), scale).replace("no difference", "as good")
    return (
        f"AdamW stopped early, its settings and epoch chosen on a held-out fifth of the "
        f"training data, reaches {scale.value(reached)}: PopRiskAdamW, which holds nothing out, is "
        f"{side}{_interval(lead, reached, scale)}."
    )


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


def _controls(ours: Row, field: Field, scale: Scale) -> str:
    """How much of the gain the smaller step alone explains."""
    named = (
        (field.matched, "the same update size but no mask"),
        (field.shuffled, "the mask's values shuffled over the weights"),
    )
    controls = [(r.final.mean, kind) for r, kind in named if r is not None and r.seeds]
    if not controls:
        return ""
    reached = " and ".join(f"{scale.value(value)} with {kind}" for value, kind in controls)
    leads = [lead for family, lead in field.leads.items() if family != "early-stopping"]
    matched = field.leads.get("rms-matched")
    if any(lead.few for lead in leads):
        return f"Controls reach {reached}: {TOO_FEW}"
    if all(compared(lead, scale) == "worse" for lead in leads):
        tail = BEATEN
    elif matched is not None and scale.gain(matched.mean) <= 0:
        tail = SMALLER_STEP
    elif any(scale.gain(lead.mean) <= 0 for lead in leads):
        tail = WRONG_WEIGHTS
    elif not all(compared(lead, scale) == "better" for lead in leads):
        tail = UNDECIDED
    else:
        tail = _shares(ours, field, scale)
    if ours.improving and tail in (BEATEN, SMALLER_STEP, WRONG_WEIGHTS):
        tail = f"so far {tail}"
    return f"Controls reach {reached}: {tail}"


def _shares(ours: Row, field: Field, scale: Scale) -> str:
    """The gain over AdamW at the same learning rate, in two parts."""
    if field.default is None or field.matched is None or not field.matched.seeds:
        return "which weights pass matters."
    base = field.default.final.mean
    total = scale.gain(ours.final.mean - base)
    smaller = scale.gain(field.matched.final.mean - base)
    if total <= 0:
        return "the gate does more than a smaller step, though not enough to win here."
    if not 0 < smaller < total:
        return "which weights pass matters more than the size of the step."
    rest = scale.gap(total - smaller, base)
    return (
        f"of the {scale.gap(total, base)} gained over AdamW at the same learning rate, "
        f"{scale.gap(smaller, base)} come with smaller steps and {rest} with which weights pass."
    )


def _seeds(ours: Row) -> str:
    if ours.seeds >= 5:
        return ""
    if ours.seeds == 1:
        return "One seed says nothing about chance: --seeds 10 gives intervals."
    if ours.seeds < MIN_SEEDS:
        return f"Only {ours.seeds} seeds, too few for intervals: --seeds 10 gives them."
    return f"Only {ours.seeds} seeds: the intervals are wide; --seeds 10 narrows them."
