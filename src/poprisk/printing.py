"""How results show themselves: a few lines, however large they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 500
"""Characters at most."""
TEXT = 100
"""Characters of a text in it."""
SHOWN = 4
"""Entries up to which a list of plain values is written out."""


def short_repr(self: Any) -> str:
    """The ``__repr__`` of a result, a NamedTuple or a dataclass: names, numbers, shapes."""
    return described(type(self).__name__, **dict(_fields(self)))


def short_html(self: Any) -> str:
    """The ``_repr_html_`` of a result: its fields, one a row."""
    rows = [[name, brief(value, depth=1)] for name, value in _fields(self)]
    return html_table([type(self).__name__, ""], rows)


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts as HTML, all of them escaped.

    Example:
        >>> html_table(["a"], [["<1"]])
        '<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;1</td></tr></tbody></table>'
    """

    def line(cell: str, texts: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{cell}>{escape(text)}</{cell}>' for text in texts)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"


def described(name: str, /, *words: str, **fields: Any) -> str:
    """A constructor-like text: words as they are, then fields in brief.

    Example:
        >>> described("Run", "AdamW", "5 steps", weights=torch.zeros(2, 3), loss=0.123456)
        'Run(AdamW, 5 steps, weights=Tensor(2, 3), loss=0.1235)'
    """
    parts = [*words, *(f"{key}={brief(value, depth=1)}" for key, value in fields.items())]
    text = f"{name}({', '.join(parts)})"
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 2]}…)"


def brief(value: Any, *, depth: int = 0) -> str:
    """Any value on one short line.

    Args:
        value: to be shown.
        depth: how deep inside of another it stands; from 2 on a result is its name only.
    """
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, float):
        return repr(value) if len(repr(value)) <= 8 else f"{value:.4g}"
    if isinstance(value, str):
        return repr(value if len(value) <= TEXT else f"{value[:TEXT]}…")
    if value is None or isinstance(value, (bool, int, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, nn.Module):
        return type(value).__name__
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
        return _nested(value, depth)
    if isinstance(value, Mapping):
        return _entries(value, [*value.values()], "{}", depth)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _entries(value, [*value], "()" if isinstance(value, tuple) else "[]", depth)
    name = getattr(value, "__name__", "")
    return str(name) if isinstance(name, str) and name else f"<{type(value).__name__}>"


def _tensor(value: Tensor) -> str:
    if value.numel() == 1 and value.device.type != "meta":
        return brief(value.detach().item())
    return f"Tensor({', '.join(map(str, value.shape))})"


def _nested(value: Any, depth: int) -> str:
    name = type(value).__name__
    if depth > 1:
        return f"{name}(…)"
    inside = ", ".join(f"{k}={brief(v, depth=depth + 1)}" for k, v in _fields(value))
    return f"{name}({inside})"


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        shown = [f.name for f in dataclasses.fields(value) if f.repr]
    else:
        shown = list(value._fields)
    return ((name, getattr(value, name)) for name in shown)


def _entries(value: Any, found: Sequence[Any], brackets: str, depth: int) -> str:
    """A few plain entries, or how many there are of what."""
    plain = all(v is None or isinstance(v, (bool, int, float, str)) for v in found)
    if not found or (plain and len(found) <= SHOWN):
        entries = [brief(v, depth=depth + 1) for v in found]
        if isinstance(value, Mapping):
            entries = [f"{brief(k)}: {v}" for k, v in zip(value, entries, strict=True)]
        comma = "," if len(entries) == 1 and brackets == "()" else ""
        return f"{brackets[0]}{', '.join(entries)}{comma}{brackets[1]}"
    kinds = {type(v).__name__ for v in found}
    kind = kinds.pop() if len(kinds) == 1 else "entries"
    return f"{brackets[0]}{len(found)} × {kind}{brackets[1]}"
