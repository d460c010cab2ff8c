"""The headline of a verdict and its warnings, each by a rule from the numbers."""

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
            tenths = round(gain, 1) + 0.0  # no minus before a zero
            return f"{tenths:+.1f}{'' if self.percent else '%'}"
        return f"{gain:+.3g}"

    def written(self, difference: Interval, base: float) -> str:
        """A difference as gain with its interval, or with those of the seeds."""
        gains = self.gains(difference, base)
        if gains.known:
            ends = f" [{self.signed(gains.low, base)}, {self.signed(gains.high, base)}]"
        else:
            ends = f" ({' and '.join(self.signed(v, base) for v in gains.values)})"
        return self.signed(gains.mean, base) + ends * (len(gains.values) != 1)


def scale_of(config: dict[str, Any]) -> Scale:
    """The scale of a run's metric."""
    metric = config["task"]["metric"]
    return Scale(metric["name"], metric["higher_is_better"], metric["percent"])


def compared(difference: Interval, scale: Scale) -> str:
    """Say better, worse or level: whether the interval of a difference clearly excludes zero."""
    side = scale.gain(difference.sign)
    return "level" if side == 0 else "better" if side > 0 else "worse"


class Rivals(NamedTuple):
    """Who stands beside ours; None for a row that is missing.

    Attributes:
        grid: all AdamW rows.
        best: the one with the best final metric.
        leads: our final metric minus that of others, paired over seeds, by family.
        edge: a warning if the best AdamW lies at the edge of the grid, else empty.
        lr: our learning rate.
        epochs: of every run.
        missing: the arms that a verdict takes and the comparison was begun without.
    """

    grid: list[Row]
    best: Row | None
    leads: dict[str, Interval]
    edge: str
    lr: float = 1e-3
    epochs: int = 0
    missing: tuple[str, ...] = ()


SMALLER_STEP = "A smaller step explains the result as well as the gate does: see RMS-matched AdamW."
WRONG_WEIGHTS = "The mask helps by its size here, not by which weights it picks: see the shuffled."
STEP_ALONE = "A smaller step does no worse than the gate: see RMS-matched AdamW."
MASK_ALONE = "A mask on other weights does no worse than the gate's: see the shuffled."
BEATEN = "The gate does worse than its controls."
UNDECIDED = "The gate is ahead of its controls, but by no more than chance on these seeds."
TOO_FEW = f"Fewer than {MIN_SEEDS} seeds do not say what explains the result."
NO_VERDICT = "Not enough runs have finished for a verdict."
NO_REFERENCE = "No verdict: none of the AdamW runs that have finished ends at a finite value."


def headline(ours: Row | None, field: Rivals, scale: Scale) -> str:
    """Ours against the best AdamW run to the end."""
    best = field.best
    if field.missing:
        arms = " or ".join(f'"{name}"' for name in field.missing)
        return f"No verdict: it sets PopRiskAdamW against AdamW, but there is no arm {arms} here."
    if ours is not None and best is None and field.grid:
        return NO_REFERENCE
    if ours is None or best is None or ours.difference is None:
        return NO_VERDICT
    d, base = ours.difference, best.final.mean
    against = f"the best of {len(field.grid)} AdamW settings ({scale.value(base)})"
    if not math.isfinite(ours.final.mean):
        return f"The gate loses here: PopRiskAdamW diverged, unlike {against}."
    if math.isnan(d.mean):  # no seed in common
        return NO_VERDICT
    end = f"PopRiskAdamW ends at {scale.value(ours.final.mean)} {scale.name}"
    size, side = scale.gap(d.mean, base), compared(d, scale)
    gain = f"{size} {'better' if scale.gain(d.mean) > 0 else 'worse'}"
    told = _interval(d, base, scale)
    if not d.known:
        level = "level with" if scale.is_zero(size) else f"{gain} than"
        return f"{end}, {level} {against}; {told}."
    if side == "level":
        gain = "no difference" if scale.is_zero(size) else gain
        return f"{end}, not told apart from {against}: {gain}, which may be chance{told}."
    start = "The gate loses here: " if side == "worse" else ""
    if ours.improving and side == "worse":
        return f"Not settled: {end}, {gain} than {against}{told}, but still improves at its end."
    return f"{start}{end}, {gain} than {against}{told}."


def _interval(d: Interval, base: float, scale: Scale) -> str:
    """The interval of a gain, or why there is none and what the seeds gave in its place."""
    gains = scale.gains(d, base)
    if d.known and d.alike:
        return f"; the same on all {len(d.values)} seeds, which says nothing about their spread"
    if d.known:
        return f" [{scale.signed(gains.low, base)}, {scale.signed(gains.high, base)}]"
    needed = f"so no interval and no verdict, which take at least {MIN_SEEDS} (--seeds {MIN_SEEDS})"
    if len(d.values) == 1:
        return f"one seed, {needed}"
    each = " and ".join(scale.signed(v, base) for v in gains.values)
    return f"{len(d.values)} seeds ({each}), {needed}"


def warnings(ours: Row | None, field: Rivals, scale: Scale) -> list[str]:
    """What a reader must know before believing the headline."""
    if ours is None or not math.isfinite(ours.final.mean):
        return []
    found = [_unfinished(ours, field, scale), _controls(ours, field, scale), field.edge]
    return [warning for warning in [*found, _seeds(ours)] if warning]


def _unfinished(ours: Row, field: Rivals, scale: Scale) -> str:
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


def _controls(ours: Row, field: Rivals, scale: Scale) -> str:
    """What the controls explain; empty if the gate is clearly ahead of both, or there are none.

    Only a gain on the best AdamW is there to be explained; else it is said who does no worse.
    """
    gained = ours.difference is not None and compared(ours.difference, scale) == "better"
    leads = [lead for family, lead in field.leads.items() if family in ("rms-matched", "shuffled")]
    matched = field.leads.get("rms-matched")
    if any(lead.few for lead in leads):
        return TOO_FEW
    if all(compared(lead, scale) == "better" for lead in leads):
        return ""
    if all(compared(lead, scale) == "worse" for lead in leads):
        found = BEATEN
    elif matched is not None and scale.gain(matched.mean) <= 0:
        found = SMALLER_STEP if gained else STEP_ALONE
    elif any(scale.gain(lead.mean) <= 0 for lead in leads):
        found = WRONG_WEIGHTS if gained else MASK_ALONE
    else:
        return UNDECIDED
    return f"So far: {found[0].lower()}{found[1:]}" if ours.improving else found


def _seeds(ours: Row) -> str:
    if ours.seeds >= 5:
        return ""
    if ours.seeds == 1:
        return "One seed says nothing about chance: --seeds 10 gives intervals."
    if ours.seeds < MIN_SEEDS:
        return f"Only {ours.seeds} seeds, too few for intervals: --seeds 10 gives them."
    return f"Only {ours.seeds} seeds: the intervals are wide; --seeds 10 narrows them."
