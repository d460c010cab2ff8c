"""What the lines of a plot are: arms of the comparison, or modules of one arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from poprisk_lab.arms import FAMILIES
from poprisk_lab.page.formats import plural
from poprisk_lab.results import RunData
from poprisk_lab.verdict import Verdict, early_stopping_choices

DASHES = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "12 4"}
SHADES = 8  # --c-module-1 to --c-module-8 in the style sheet
MODULES_SHOWN = 12

EpochRow = Mapping[str, Any]
Stop = tuple[int, float]


class Series(NamedTuple):
    """A line in every panel of a group, and its button in the legend.

    Attributes:
        label: as the user wrote it; escaped where it is shown.
        colour: name of a colour in the style sheet.
        dash: a key of :data:`DASHES`.
        shown: whether it is drawn before anyone clicks.
        rows: its epoch rows.
        stops: epoch and metric where early stopping stopped, one a seed.
    """

    label: str
    colour: str
    dash: str
    shown: bool
    rows: list[EpochRow]
    stops: list[Stop]

    @property
    def dashes(self) -> str:
        """Of the button, as SVG has them."""
        return DASHES[self.dash]


def arm_series(data: RunData, verdict: Verdict) -> list[Series]:
    """One series for each row of the verdict, then one for each arm in no row."""
    wanted = [(r.label, r.family, r.arms, True) for r in verdict.rows]
    wanted += [(r.label, r.family, r.arms, False) for r in verdict.other]
    named = {arm for _, _, arms, _ in wanted for arm in arms}
    nothing_judged = not wanted
    for arm in data.config["arms"]:
        if arm["name"] not in named:
            wanted.append((arm["label"], arm["family"], (arm["name"],), nothing_judged))
    count: Counter[str] = Counter()
    series = []
    for label, family, arms, shown in wanted:
        colour = colour_of(family)
        rows, stops = _rows(data, family, arms)
        if rows:
            dash = list(DASHES)[count[colour] % len(DASHES)]
            count[colour] += 1
            series.append(Series(label, colour, dash, shown, rows, stops))
    return series


def colour_of(family: str) -> str:
    """Name of a family's colour in the style sheet."""
    return family if family in FAMILIES else "other"


def _rows(data: RunData, family: str, arms: Sequence[str]) -> tuple[list[EpochRow], list[Stop]]:
    rows: list[EpochRow] = [row for row in data.epochs if row["arm"] in arms]
    if family != "early-stopping":
        return rows, []
    chosen = early_stopping_choices(data)
    if not chosen:
        return rows, []
    horizon = sorted({row["epoch"] for row in data.epochs})
    kept: list[EpochRow] = []
    for seed, end in chosen.items():
        mine = [r for r in rows if r["seed"] == seed and r["arm"] == end["arm"]]
        kept += _held(mine, end["stopped_epoch"], horizon)
    return kept, [(end["stopped_epoch"], end["stopped_metric"]) for end in chosen.values()]


def _held(rows: Sequence[EpochRow], stop: int, horizon: Sequence[int]) -> list[EpochRow]:
    """The rows up to the stop, whose weights are kept, and its row again at all later epochs."""
    before = [row for row in rows if row["epoch"] <= stop]
    if not before:
        return []
    last = max(before, key=lambda row: row["epoch"])
    return [*before, *({**last, "epoch": e} for e in horizon if e > stop)]


def module_sizes(rows: Sequence[EpochRow]) -> dict[str, int]:
    """Weights of each module that the gate counted, which are those that ever had a gradient."""
    sizes: dict[str, int] = {}
    for row in rows:
        for name, gate in (row["gate"] or {}).items():
            sizes[name] = max(sizes.get(name, 0), gate["coordinates"])
    return sizes


def module_series(rows: Sequence[EpochRow], kinds: Mapping[str, str] | None = None) -> list[Series]:
    """One series for each module with a gate, in the order of the model.

    Args:
        rows: the epoch rows of one arm.
        kinds: what each module is, such as ``Linear(64, 256)``, by name.
    """
    sizes, kinds = module_sizes(rows), kinds or {}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:MODULES_SHOWN]
    return [
        Series(
            label=f"{name} {kinds.get(name, '')}".strip() + f" · {plural(size, 'weight')}",
            colour=f"module-{_shade(i, len(sizes))}",
            dash=list(DASHES)[i % len(DASHES)],
            shown=name in largest,
            rows=_module_rows(rows, name),
            stops=[],
        )
        for i, (name, size) in enumerate(sizes.items())
    ]


def _shade(index: int, count: int) -> int:
    """Spread ``count`` modules over the shades, first to last."""
    return 1 + round(index * (SHADES - 1) / max(count - 1, 1))


def _module_rows(rows: Sequence[EpochRow], name: str) -> list[EpochRow]:
    return [
        {"epoch": row["epoch"], "seed": row["seed"], **row["gate"][name]}
        for row in rows
        if row["gate"] and name in row["gate"]
    ]
