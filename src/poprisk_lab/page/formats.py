"""How the page writes numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from statistics import median
from typing import Any, NamedTuple

MINUS = "\N{MINUS SIGN}"
MISSING = "n/a"
MARKS = {
    "reproduced": "good",
    "not reproduced": "bad",
    "as claimed": "good",
    "does not hold": "bad",
}
"""What outcomes mean, for colours: good or bad, else neither."""
QUICK = " (quick form)"
"""What follows the verdict of a quick form."""


class Format(NamedTuple):
    """How to write the values of one column.

    Attributes:
        percent: whether to write them times 100.
        decimals: digits after the point.
    """

    percent: bool
    decimals: int

    def number(self, value: float) -> str:
        """Write a value; NaN as n/a, infinity as its sign, huge ones in scientific notation."""
        if math.isnan(value):
            return MISSING
        if math.isinf(value):
            return "∞" if value > 0 else f"{MINUS}∞"
        shown = 100 * value if self.percent else value
        text = f"{shown:.{self.decimals}f}" if abs(shown) < 1e6 else f"{shown:.1e}"
        if float(text) == 0:
            text = text.removeprefix("-")
        return text.replace("-", MINUS, 1) if text.startswith("-") else text

    def signed(self, value: float) -> str:
        """Write a difference, with its sign."""
        text = self.number(value)
        positive = value > 0 and any(digit in text for digit in "123456789∞")
        return f"+{text}" if positive else text


def format_for(values: Iterable[float], *, percent: bool) -> Format:
    """Choose decimals: one for percent, else three significant digits of the smallest value.

    Values far below the median do not count for that.
    """
    if percent:
        return Format(percent=True, decimals=1)
    sizes = [abs(v) for v in values if math.isfinite(v) and v != 0]
    if not sizes:
        return Format(percent=False, decimals=3)
    smallest = max(min(sizes), median(sizes) / 100)
    decimals = 2 - math.floor(math.log10(smallest))
    return Format(percent=False, decimals=min(max(decimals, 0), 6))


def signs(cell: Any) -> str:
    """A cell whose negative numbers have a minus sign in place of a hyphen.

    Example:
        >>> signs("-1.5 [-2, 1e-3]") == "\N{MINUS SIGN}1.5 [\N{MINUS SIGN}2, 1e\N{MINUS SIGN}3]"
        True
    """
    return re.sub(r"(?<![^\s\[(±])-(?=[\d.])|(?<=\de)-(?=\d)", MINUS, str(cell))


def mark(cell: Any) -> str:
    """What the outcome in a cell means; empty for any other text."""
    return MARKS.get(str(cell).removesuffix(QUICK), "")


def plural(count: int, noun: str) -> str:
    """Write a count and its noun: ``1 seed``, ``1,000 seeds``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def listed(words: list[str], limit: int = 6) -> str:
    """Write a list in words, cut after ``limit`` with the number left out."""
    if len(words) > limit:
        words = [*words[:limit], f"{len(words) - limit} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def plain(value: Any) -> str:
    """Write a setting as it was given; None as an em dash, mappings as ``key value`` pairs."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(v)}" for key, v in value.items()) or "—"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(v) for v in value) or "—"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
