"""The public names as text: signatures, methods, properties and fields, a line each."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any, ForwardRef

import poprisk

SPOKEN = {f"__{name}__" for name in "call enter exit getitem iter len contains add".split()}
"""Methods with a name of Python's that are public all the same."""


NAME = re.compile(r"[A-Za-z_][\w.]*")


def public_api() -> str:
    """The names of ``poprisk``, then the results with fields that their signatures speak of."""
    public = {name: getattr(poprisk, name) for name in poprisk.__all__}
    lines = [line for name in sorted(public) for line in described(name, public[name])]
    results: dict[str, Any] = {}
    left = list(public.values())
    while left:
        for name, value in spoken_of(left.pop()).items():
            if value not in [*public.values(), *results.values()]:
                results[name] = value
                left.append(value)
    for name in sorted(results):
        lines += [f"class {name}", *fields(results[name]), ""]
    return "\n".join(lines) + "\n"


def spoken_of(value: Any) -> dict[str, type]:
    """Classes of poprisk with fields in the annotations of a class or function."""
    known = vars(sys.modules[value.__module__])
    results = ("field ", "property ", ") ->")
    lines = [line for line in described("", value) if line.strip().startswith(results)]
    words = NAME.findall("\n".join(lines))
    found = {word: known[word] for word in words if inspect.isclass(known.get(word))}
    return {
        name: cls
        for name, cls in found.items()
        if cls.__module__.partition(".")[0] == "poprisk" and field_names(cls)
    }


def described(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        yield f"class {name}({bases})"
        yield from fields(value)
        if not issubclass(value, Exception):  # those take what Python's take
            yield from callable_lines("__init__", value, "    ")
        yield from members(value)
    elif callable(value):
        yield from callable_lines(f"def {name}", value, "")
    else:
        yield f"{name}: {value!r}"
    yield ""


def field_names(cls: type) -> list[str]:
    """Of a named tuple or a data class."""
    return list(getattr(cls, "_fields", None) or getattr(cls, "__dataclass_fields__", ()))


def fields(cls: type) -> Iterator[str]:
    annotations = inspect.get_annotations(cls)
    for name in field_names(cls):
        yield f"    field {name}: {written(annotations.get(name, 'inherited'))}"


def members(cls: type) -> Iterator[str]:
    """Public methods and properties that are poprisk's own, those of bases included."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] == "poprisk":
            found |= vars(base)
    for name, value in sorted(found.items()):
        if name.startswith("_") and name not in SPOKEN:
            continue
        if isinstance(value, property) and value.fget is not None:
            returned = inspect.get_annotations(value.fget).get("return", "")
            yield f"    property {name}: {written(returned)}"
        elif isinstance(value, (staticmethod, classmethod)):
            kind = type(value).__name__
            yield from callable_lines(f"{kind} {name}", value.__func__, "    ")
        elif isinstance(value, FunctionType):
            yield from callable_lines(f"def {name}", value, "    ")


def callable_lines(head: str, function: Any, indent: str) -> Iterator[str]:
    """A line for each parameter, so that a difference shows which one changed."""
    signature = inspect.signature(function)
    yield f"{indent}{head}("
    kind = None
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and kind not in (p.KEYWORD_ONLY, p.VAR_POSITIONAL):
            yield f"{indent}    *,"
        if kind is p.POSITIONAL_ONLY and p.kind is not kind:
            yield f"{indent}    /,"
        kind = p.kind
        stars: dict[Any, str] = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}
        star = stars.get(p.kind, "")
        annotation = "" if p.annotation is p.empty else f": {written(p.annotation)}"
        default = "" if p.default is p.empty else f" = {shown(p.default)}"
        yield f"{indent}    {star}{p.name}{annotation}{default},"
    returned = signature.return_annotation
    yield f"{indent})" + ("" if returned is signature.empty else f" -> {written(returned)}")


def written(annotation: Any) -> str:
    if isinstance(annotation, ForwardRef):  # of a named tuple
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def shown(default: Any) -> str:
    """Functions and classes by name: their repr holds an address."""
    return getattr(default, "__qualname__", None) or repr(default)
