"""Names of the last release: they work, with a warning that says the new one, until the next."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)


class Renaming(NamedTuple):
    """One name of the last release.

    Attributes:
        kind: ``"argument"``, ``"attribute"`` or ``"name"``.
        owner: dotted name of the function, class or module whose it is.
        old: the name as it was.
        new: as it is.
    """

    kind: str
    owner: str
    old: str
    new: str


RENAMINGS: list[Renaming] = []
"""All of the modules that have been imported."""


def warn_renamed(old: str, new: str) -> None:
    """Warn whoever called the caller of this function that ``old`` is called ``new``."""
    warnings.warn(f"{old} is {new} now", DeprecationWarning, stacklevel=3)


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let keyword arguments of a function be given by the names that they had: old=new.

    The function raises TypeError where an argument is given by both of its names.

    Example:
        >>> double = renamed_arguments(n="x")(lambda x: 2 * x)
        >>> double(x=2)
        4
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = getattr(function, "__qualname__", "").removesuffix(".__init__")

        @functools.wraps(function)
        def renamed(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(
                        f"{name}() got {new} twice, also by its old name {old}; pass {new} alone."
                    )
                warn_renamed(f"{name}({old}=...)", f"{name}({new}=...)")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        owner = f"{function.__module__}.{function.__qualname__}"
        RENAMINGS.extend(Renaming("argument", owner, *pair) for pair in names.items())
        return renamed

    return decorate


def renamed_attributes(**names: str) -> Callable[[C], C]:
    """Let attributes of a class be read by the names that they had: old=new."""

    def decorate(cls: C) -> C:
        for old, new in names.items():
            setattr(cls, old, _renamed(old, new))
            owner = f"{cls.__module__}.{cls.__qualname__}"
            RENAMINGS.append(Renaming("attribute", owner, old, new))
        return cls

    return decorate


def _renamed(old: str, new: str) -> Any:
    """The property ``old``; without a docstring, so that documentation leaves it out."""

    def read(self: Any) -> Any:
        name = type(self).__name__
        warn_renamed(f"{name}.{old}", f"{name}.{new}")
        return getattr(self, new)

    return property(read)


def renamed_names(module: str, **names: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module of which names are called otherwise now: old=new.

    Args:
        module: its ``__name__``.
        names: the new ones, those in another module with its name before them.
    """
    RENAMINGS.extend(Renaming("name", module, *pair) for pair in names.items())

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = names[name].rpartition(".")
        warn_renamed(f"{module}.{name}", f"{place or module}.{new}")
        return getattr(importlib.import_module(place or module), new)

    return find
