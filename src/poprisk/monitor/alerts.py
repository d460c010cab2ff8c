r"""What in a monitor's rows somebody should hear of at once, said when it begins and not again.

A condition looks at the rows so far and says of each place (a module, a number) whether it is in
that state: yes, no, or in between. An alert is raised at the first yes; a no ends it, after which
it can be raised again; what lies in between changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, final

from poprisk._validate import check_number, check_positive
from poprisk.monitor.signal import INTERVAL
from poprisk.optim.stats import STARVED_BELOW
from poprisk.printing import short_repr

Row = Mapping[str, float]
State = dict[str, "bool | None"]
SHOWN = 4
"""Places that a text names."""


class Alert(NamedTuple):
    """A condition that began.

    Attributes:
        step: of the row at which it was seen.
        name: of the condition.
        places: where: modules, or names of numbers.
        text: one line on what was seen and what helps.
    """

    step: int
    name: str
    places: tuple[str, ...]
    text: str

    __repr__ = short_repr


class Condition(Protocol):
    """Something to raise an alert for.

    Attributes:
        name: by which alerts are called.
    """

    name: str

    def state(self, rows: Sequence[Row]) -> State:
        """Whether it holds, by place, after these rows of one run; None changes nothing."""
        ...

    def text(self, places: Sequence[str], rows: Sequence[Row]) -> str:
        """What to say of the places where it begins."""
        ...


@final
class Starvation:
    """The gate holds whole modules back: they practically stand still.

    It holds of a module whose ``gate/update_ratio`` is less than ``below`` in each of the last
    ``rows``, and no longer once it is at least twice that in each. The limit is that of
    ``gate_stats().starved``. Of a run in which nothing is left to learn, it is no fault.

    Args:
        below: share of the ungated update.
        rows: in a row.

    Raises:
        TypeError, ValueError: if ``below`` is not in (0, 0.5], or ``rows`` no positive integer.
    """

    name = "starvation"

    def __init__(self, *, below: float = STARVED_BELOW, rows: int = 4) -> None:
        check_number("below", below, low=0, high=0.5, include_low=False)
        check_positive("rows", rows)
        self.below, self.rows = below, rows

    def state(self, rows: Sequence[Row]) -> State:
        prefix = "gate/update_ratio/"
        names = [key for key in rows[-1] if key.startswith(prefix)]
        found: State = {}
        for key in names:
            ratios = _last(rows, key, self.rows)
            found[key.removeprefix(prefix)] = _between(
                ratios and max(ratios) < self.below, ratios and min(ratios) >= 2 * self.below
            )
        return found

    def text(self, places: Sequence[str], rows: Sequence[Row]) -> str:
        return (
            f"{_named(places)}: the gate lets through less than {self.below:.0%} of the update, "
            f"{self.rows} rows in a row. If there is something left to learn: q_min=0.05, or "
            "gate=False for the group."
        )


@final
class LabelMemorization:
    r"""Labels are learned by heart.

    Two numbers of a row can tell, and it is silent without them: what the signal says of a batch is
    the same where it is small beside the noise (:doc:`/notebook/risk`).

    - canaries (:class:`poprisk.monitor.CanaryMemorization`), whose value is 0 on average for a
      model that never saw them: more than ``above``, and more than three standard errors, in each
      of the last ``rows``; no longer once it is at most half of ``above`` in each.
    - risk (:class:`poprisk.monitor.Risk`): in each of the last ``rows`` more than its least value
      so far, by two standard errors of the two together, while the training loss is less than it
      was there; no longer once it is within one in each.

    Args:
        above: of the canaries' value, which is 1 where all are memorized.
        rows: in a row.

    Raises:
        TypeError, ValueError: if ``above`` is not in (0, 1], or ``rows`` no positive integer.
    """

    name = "memorization"

    def __init__(self, *, above: float = 0.1, rows: int = 3) -> None:
        check_number("above", above, low=0, high=1, include_low=False)
        check_positive("rows", rows)
        self.above, self.rows = above, rows

    def state(self, rows: Sequence[Row]) -> State:
        found: State = {}
        if "canaries" in rows[-1]:
            found["canaries"] = self._canaries(rows)
        if "risk" in rows[-1]:
            found["risk"] = self._risk(rows)
        return found

    def _canaries(self, rows: Sequence[Row]) -> bool | None:
        values = _last(rows, "canaries", self.rows)
        errors = _last(rows, "canaries/error", self.rows)
        if not values or not errors:
            return None
        least = min(v - 3 * e for v, e in zip(values, errors, strict=True))
        return _between(min(values) > self.above and least > 0, max(values) <= self.above / 2)

    def _risk(self, rows: Sequence[Row]) -> bool | None:
        known = [row for row in rows if math.isfinite(row.get("risk", math.nan))]
        if len(known) <= self.rows or not _last(rows, "risk", self.rows):
            return None
        best = min(known[: -self.rows], key=lambda row: row["risk"])
        last = known[-self.rows :]
        rises = [
            (row["risk"] - best["risk"], math.hypot(row["risk/error"], best["risk/error"]))
            for row in last
        ]
        fitted = all(row["risk/train_loss"] < best["risk/train_loss"] for row in last)
        above = all(rise > INTERVAL * error for rise, error in rises)
        return _between(above and fitted, all(rise <= error for rise, error in rises))

    def text(self, places: Sequence[str], rows: Sequence[Row]) -> str:
        said = {
            "canaries": f"planted labels are memorized ({rows[-1].get('canaries', 0):.0%})",
            "risk": "the population risk rises while the training loss falls",
        }
        return (
            f"{' and '.join(said[place] for place in places)}, {self.rows} rows in a row. Stop at "
            "the best moment, or lower the learning rate to zero."
        )


@final
class Drift:
    r"""The loss rises above what it was for a while: other data, or weights that leave their place.

    It holds if the last ``rows`` values of ``loss`` (:class:`poprisk.monitor.Loss`) are all above
    all of the ``reference`` values before them. Of values in an order that is chance, this has
    probability :math:`1/\binom{16+4}{4}=1/4845` at a row, whatever their distribution; of falling
    ones less. It ends once no more than one of them is above.

    Args:
        rows: in a row.
        reference: rows before them.

    Raises:
        TypeError, ValueError: for what is no positive integer.
    """

    name = "drift"

    def __init__(self, *, rows: int = 4, reference: int = 16) -> None:
        check_positive("rows", rows)
        check_positive("reference", reference)
        self.rows, self.reference = rows, reference

    def state(self, rows: Sequence[Row]) -> State:
        values = _last(rows, "loss", self.rows + self.reference)
        if not values:
            return {}
        before = max(values[: self.reference])
        above = sum(value > before for value in values[self.reference :])
        return {"loss": _between(above == self.rows, above <= 1 and above < self.rows)}

    def text(self, places: Sequence[str], rows: Sequence[Row]) -> str:
        return (
            f"the loss is above all of the {self.reference} rows before, {self.rows} rows in a row "
            f"({rows[-1]['loss']:.3g} now). Look at the data that came in, and at the learning "
            "rate."
        )


@final
class Alerts:
    """Which conditions hold at present, and where.

    Args:
        conditions: to look for.

    Raises:
        TypeError: if one is none.
        ValueError: if two have one name.
    """

    def __init__(self, conditions: Iterable[Any]) -> None:
        self.conditions = check_conditions(conditions)
        self.holding: dict[str, set[str]] = {c.name: set() for c in self.conditions}
        self._rows: list[Row] = []
        self._step = 0

    def add(self, step: int, row: Row) -> None:
        """Take up a row, in place of one of the same step; an earlier step begins another run."""
        if self._rows and step < self._step:
            self._rows.clear()
        elif self._rows and step == self._step:
            self._rows.pop()
        self._rows.append(row)
        self._step = step

    def look(self, condition: Condition) -> Alert | None:
        """What a condition has to say after the last row, if anything."""
        now = self.holding[condition.name]
        begins: list[str] = []
        for place, holds in condition.state(self._rows).items():
            if holds and place not in now:
                begins.append(place)
            elif holds is False:
                now.discard(place)
        if not begins:
            return None
        now.update(begins)
        text = condition.text(begins, self._rows)
        return Alert(self._step, condition.name, tuple(begins), text)

    def state_dict(self) -> dict[str, list[str]]:
        """Where conditions hold, so that a resumed run does not say it again."""
        return {name: sorted(places) for name, places in self.holding.items()}

    def load_state_dict(self, state: Mapping[str, Iterable[str]]) -> None:
        """Take up what held elsewhere, of the conditions that are looked for here."""
        for name in self.holding:
            self.holding[name] = set(state.get(name, ()))


def check_conditions(conditions: Any) -> list[Condition]:
    """Return conditions as a list if each can be looked for, under a name of its own.

    Raises:
        TypeError: if one has no name, no ``state`` or no ``text``.
        ValueError: if two have one name.
    """
    found = list(conditions) if isinstance(conditions, Iterable) else [conditions]
    for c in found:
        methods = all(callable(getattr(c, method, None)) for method in ("state", "text"))
        named = isinstance(getattr(c, "name", None), str)
        if isinstance(c, type) or not named or not methods:
            raise TypeError(
                "conditions must hold objects of poprisk.monitor such as Starvation(), "
                f"LabelMemorization() or Drift(), but got {c!r}."
            )
    names = [c.name for c in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"conditions must have different names, but two are called {name!r}.")
    return found


def _last(rows: Sequence[Row], key: str, count: int) -> list[float]:
    """A number of the last so many rows; nothing if one of them does not have it, or has NaN."""
    found = [row.get(key, math.nan) for row in rows[-count:]]
    return found if len(found) == count and not any(map(math.isnan, found)) else []


def _between(yes: Any, no: Any) -> bool | None:
    return True if yes else False if no else None


def _named(places: Sequence[str]) -> str:
    more = len(places) - SHOWN
    return ", ".join(places[:SHOWN]) + (f" and {more} more" if more > 0 else "")
