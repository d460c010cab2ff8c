"""Whatever a forward pass can keep state in, and how to lend it copies of that state."""

from __future__ import annotations

import functools
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

LARGEST = 2_000
"""Objects that the state of one layer may consist of."""

_COPIED = (list, dict, set, bytearray, deque, OrderedDict, defaultdict, Counter)
"""Containers of exactly these classes are copied; those of subclasses are lent their contents."""

_CONTAINERS = (list, tuple, dict, set, frozenset, deque)

_UNCHANGING = frozenset((type(None), bool, int, float, complex, str, bytes))
"""What most attributes are; nothing of it can be written to in place."""

_PLAIN = (*_UNCHANGING, Tensor, np.ndarray, torch.Generator)
"""What holds nothing else."""

_TRAINING = (torch.optim.Optimizer, DataLoader, Dataset)
"""What a layer has no use for; whoever refers to it is no part of the model."""

_TYPES = (type, types.GenericAlias, types.UnionType)
"""Types as they stand in annotations, which a function that is wrapped as an object carries."""

_WALKED = (nn.Module, types.MethodType, functools.partial, *_CONTAINERS)
"""What may refer to state, besides objects that have some."""

_LIBRARIES = frozenset({"torch", "numpy", *sys.stdlib_module_names} - {"types", "argparse"})
"""Their objects are left alone: other threads may use them. Namespaces are state, however."""

_OWN = frozenset(name for name in nn.Module().__dict__ if name.startswith("_"))
"""Attributes in which ``nn.Module`` keeps buffers, parameters, children and hooks."""


class Holder(Protocol):
    """Something whose state can be replaced by copies and put back."""

    owner: Any

    def lend_copies(self, memo: dict[int, Any]) -> None:
        """Let the owner work on copies; ``memo`` holds them by identity of the original."""
        ...

    def restore(self) -> None:
        """Put the very objects back."""
        ...


def holders_in(parts: Iterable[Any]) -> list[Holder]:
    """All modules and objects with state of their own that ``parts`` use.

    Args:
        parts: modules, and functions or objects that are called beside them.
    """
    parts = list(parts)
    modules = {id(m) for part in parts if isinstance(part, nn.Module) for m in part.modules()}
    cells = [_Cells(part) for part in parts if isinstance(part, types.FunctionType)]
    found: list[Holder] = list(cells)
    queue = deque([*parts, *(value for each in cells for _, value in each.kept)])
    seen: dict[int, Any] = {}
    while queue:
        item = queue.popleft()
        if isinstance(item, _PLAIN) or id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, _WALKED) or (_has_state(item) and not _refers_to(item, modules)):
            found.extend(_holders_of(item))
            queue.extend(_inside(item))
    return found


def _has_state(item: Any) -> bool:
    """Whether an object is of a class that somebody wrote for a model."""
    if isinstance(item, (*_PLAIN, *_WALKED, *_TRAINING, *_TYPES, Enum, types.FunctionType)):
        return False
    return type(item).__module__.partition(".")[0] not in _LIBRARIES


def _refers_to(item: Any, modules: set[int]) -> bool:
    """Whether an object is no part of a layer: it knows the model, trains it, or is too large."""
    queue, seen = deque([item]), {id(item): item}
    while queue:
        for value in _inside(queue.popleft()):
            if id(value) in modules or isinstance(value, _TRAINING) or len(seen) > LARGEST:
                return True
            if id(value) not in seen and (isinstance(value, _CONTAINERS) or _has_state(value)):
                seen[id(value)] = value
                queue.append(value)
    return False


def _inside(item: Any) -> Iterator[Any]:
    """What an object refers to."""
    if isinstance(item, dict):
        yield from dict.values(item)
    elif isinstance(item, _CONTAINERS):
        yield from item
    elif isinstance(item, types.MethodType):
        yield item.__self__
    elif isinstance(item, functools.partial):
        yield from (item.func, *item.args, *item.keywords.values())
    for name, value in _dict_of(item).items():
        if not (isinstance(item, nn.Module) and name in _OWN - {"_modules"}):
            yield value
    for _, place in _places(item):
        yield place.__get__(item)


def _holders_of(item: Any) -> Iterator[Holder]:
    if isinstance(item, nn.Module):
        if not isinstance(item, LazyModuleMixin):
            yield _Module(item)
        return
    if _dict_of(item) and not isinstance(item, (types.MethodType, functools.partial)):
        yield _Attributes(item)
    if any(True for _ in _places(item)):
        yield _Places(item)
    if isinstance(item, (list, dict, deque)) and type(item) not in _COPIED:
        yield _Contents(item)


def _dict_of(item: Any) -> dict[str, Any]:
    found = getattr(item, "__dict__", None)
    return found if type(found) is dict else {}


def _places(item: Any) -> Iterator[tuple[str, Any]]:
    """The ``__slots__`` of an object that hold something."""
    if not _has_state(item):
        return
    for cls in type(item).__mro__:
        for name, place in cls.__dict__.items():
            here = isinstance(place, types.MemberDescriptorType) and name != "__dict__"
            if here and hasattr(item, name):
                yield name, place


@final
class _Module:
    """A module: its attributes and buffers, and which parameters, children and hooks it has."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.kept = dict(owner.__dict__)
        own = ((k, v) for k, v in self.kept.items() if k in _OWN)
        self.contents: dict[str, Any] = {k: v.copy() for k, v in own if isinstance(v, (dict, set))}

    def lend_copies(self, memo: dict[int, Any]) -> None:
        own = self.owner.__dict__
        for name, value in self.kept.items():
            if name not in _OWN and type(value) not in _UNCHANGING:
                own[name] = copied(value, memo)
        for name, buffer in self.contents["_buffers"].items():
            own["_buffers"][name] = copied(buffer, memo)

    def restore(self) -> None:
        own = self.owner.__dict__
        own.clear()
        own.update(self.kept)
        for name, before in self.contents.items():
            if not _same_contents(own[name], before):
                own[name].clear()
                own[name].update(before)


def _same_contents(now: Any, before: Any) -> bool:
    if isinstance(before, set) or not before:
        return now == before
    return list(now) == list(before) and all(now[k] is v for k, v in before.items())


@final
class _Attributes:
    """An object with a ``__dict__``."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.kept = owner, dict(_dict_of(owner))

    def lend_copies(self, memo: dict[int, Any]) -> None:
        for name, value in self.kept.items():
            self.owner.__dict__[name] = copied(value, memo)

    def restore(self) -> None:
        self.owner.__dict__.clear()
        self.owner.__dict__.update(self.kept)


@final
class _Places:
    """An object with ``__slots__``."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.kept = [(place, place.__get__(owner)) for _, place in _places(owner)]

    def lend_copies(self, memo: dict[int, Any]) -> None:
        for place, value in self.kept:
            place.__set__(self.owner, copied(value, memo))

    def restore(self) -> None:
        for _, place in _places(self.owner):
            place.__delete__(self.owner)
        for place, value in self.kept:
            place.__set__(self.owner, value)


@final
class _Contents:
    """A container of a class of its own."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.base: Any = next(
            base for base in (OrderedDict, dict, list, deque) if isinstance(owner, base)
        )
        self.kept = list(owner.items() if isinstance(owner, dict) else owner)

    def lend_copies(self, memo: dict[int, Any]) -> None:
        if isinstance(self.owner, dict):
            self._fill([(key, copied(value, memo)) for key, value in self.kept])
        else:
            self._fill([copied(value, memo) for value in self.kept])

    def restore(self) -> None:
        self._fill(self.kept)

    def _fill(self, items: list[Any]) -> None:
        self.base.clear(self.owner)
        if not isinstance(self.owner, dict):
            self.base.extend(self.owner, items)
            return
        for key, value in items:
            self.base.__setitem__(self.owner, key, value)


@final
class _Cells:
    """A function with the variables of the functions around it that it uses."""

    def __init__(self, owner: types.FunctionType) -> None:
        self.owner = owner
        self.kept: list[tuple[Any, Any]] = []
        for cell in owner.__closure__ or ():
            try:
                self.kept.append((cell, cell.cell_contents))
            except ValueError:  # assigned later
                continue

    def lend_copies(self, memo: dict[int, Any]) -> None:
        for cell, value in self.kept:
            cell.cell_contents = copied(value, memo)

    def restore(self) -> None:
        for cell, value in self.kept:
            cell.cell_contents = value


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what can be written to in place; objects of other kinds are shared.

    Args:
        value: of an attribute.
        memo: copies by the identity of the original, so that two names of a thing stay one.
    """
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Parameter) or is_lazy(value):
        return value
    if isinstance(value, Tensor):
        found: Any = value.detach().clone().requires_grad_(value.requires_grad)
    elif isinstance(value, np.ndarray):
        found = value.copy()
    elif isinstance(value, torch.Generator):
        found = value.clone_state()
    elif isinstance(value, tuple):
        return _copied_tuple(value, memo)
    elif type(value) in _COPIED:
        return _copied_container(value, memo)
    else:
        return value
    memo[id(value)] = found
    return found


def _copied_tuple(value: Any, memo: dict[int, Any]) -> Any:
    items = [copied(v, memo) for v in value]
    if all(a is b for a, b in zip(items, value, strict=True)):
        return value
    make: Callable[[Any], Any] | None = getattr(value, "_make", None)
    if make is not None:
        return make(items)
    return tuple(items) if type(value) is tuple else value


def _copied_container(value: Any, memo: dict[int, Any]) -> Any:
    # A shallow copy keeps a deque's maxlen and a defaultdict's factory; then the contents.
    found = value.copy()
    memo[id(value)] = found
    if isinstance(found, dict):
        for k, v in found.items():
            found[k] = copied(v, memo)
    elif isinstance(found, (list, deque)):
        for i, v in enumerate(found):
            found[i] = copied(v, memo)
    return found
