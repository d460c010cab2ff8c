"""Frozen data: how it is written, read and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


def read(name: str) -> Any:
    """The frozen data of that name."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def write(name: str, content: Any) -> None:
    """Freeze ``content``: JSON values, floats in full precision, NaN and Infinity included."""
    path = DATA / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(content, "") + "\n", encoding="utf-8")


def _text(value: Any, indent: str) -> str:
    """JSON with a line for each entry, but a list of plain values on one line."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        rows = [f"{inner}{json.dumps(k)}: {_text(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(v, (list, dict)) for v in value):
        return "[\n" + ",\n".join(inner + _text(v, inner) for v in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def differences(
    found: Any, frozen: Any, *, rtol: float, atol: float = 0.0, at: str = ""
) -> Iterator[str]:
    """Where two JSON values differ: numbers by more than the tolerances, all else at all."""
    if isinstance(frozen, dict) and isinstance(found, dict):
        for key in {**frozen, **found}:
            if (key in frozen) != (key in found):
                yield f"{at}/{key}: {'is missing' if key in frozen else 'is new'}"
            else:
                yield from differences(
                    found[key], frozen[key], rtol=rtol, atol=atol, at=f"{at}/{key}"
                )
    elif isinstance(frozen, list) and isinstance(found, list):
        if len(frozen) != len(found):
            yield f"{at}: {len(found)} entries, frozen {len(frozen)}"
        for i, (a, b) in enumerate(zip(found, frozen, strict=False)):
            yield from differences(a, b, rtol=rtol, atol=atol, at=f"{at}[{i}]")
    elif not _same(found, frozen, rtol, atol):
        yield f"{at}: {found!r}, frozen {frozen!r}"


def _same(a: Any, b: Any, rtol: float, atol: float) -> bool:
    if not (_is_number(a) and _is_number(b)):
        return type(a) is type(b) and a == b
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b or math.isclose(a, b, rel_tol=rtol, abs_tol=atol)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
