"""What came of a call, and what it left behind."""

from __future__ import annotations

import ast
import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import poprisk
from asserts import bits
from poprisk.randomness import RandomState
from surface.situations import Situation, inner

SOURCE = Path(poprisk.__file__).parent
KINDS = ("right", "flagged", "refused", "the user's own error")
"""Outcomes that are no failure."""


class Wrong(AssertionError):
    """A number that is not the reference's and says nothing about it."""


class Moved(AssertionError):
    """Something changed that must not."""


class Outcome(NamedTuple):
    """What came of a call.

    Attributes:
        kind: one of :data:`KINDS`, or "wrong", "moved" or "from inside".
        what: message, or what was compared.
    """

    kind: str
    what: str

    @property
    def fine(self) -> bool:
        return self.kind in KINDS


def judge(situation: Situation, call: Callable[[Situation], str]) -> Outcome:
    """Do it, and say what came of it."""
    with warnings.catch_warnings(record=True) as said, situation.processes():
        warnings.simplefilter("always")
        before = RandomState.now()
        try:
            found = call(situation)
        except (Wrong, Moved) as error:
            loud = [w for w in said if is_flag(w)]
            if isinstance(error, Wrong) and loud:
                return Outcome("flagged", str(loud[0].message))
            return Outcome("wrong" if isinstance(error, Wrong) else "moved", str(error))
        except Exception as error:  # any kind of error may come out: that is what is looked at
            return judge_error(situation, error)
        finally:
            before.restore()
            torch._dynamo.reset() if situation.wrapper == "compiled" else None
    return Outcome("flagged" if found.startswith("flag") else "right", found)


def is_flag(warning: warnings.WarningMessage) -> bool:
    """Whether a warning of ours says that a number is not to be believed."""
    ours = Path(warning.filename).is_relative_to(SOURCE) or "poprisk" in str(warning.message)
    return ours and "Exact, but slower" not in str(warning.message)


def judge_error(situation: Situation, error: Exception) -> Outcome:
    """A refusal of ours, an error that the user's model or loss gives without us, or a failure."""
    message = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    if isinstance(error, (TypeError, ValueError, RuntimeError)) and raised_by_us(error):
        return Outcome("refused", message)
    if first_line(error) in own_errors(situation):
        return Outcome("the user's own error", message)
    where = traceback.extract_tb(error.__traceback__)
    ours = [f for f in where if Path(f.filename).is_relative_to(SOURCE)]
    place = f"{Path(ours[-1].filename).relative_to(SOURCE)}:{ours[-1].name}" if ours else "?"
    return Outcome("from inside", f"{message} [{place}]")


def raised_by_us(error: BaseException) -> bool:
    """Whether the last frame is a ``raise`` statement in the library."""
    last = error.__traceback__
    while isinstance(last, TracebackType) and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    file = Path(last.tb_frame.f_code.co_filename)
    return file.is_relative_to(SOURCE) and last.tb_lineno in raising_lines(file)


@cache
def raising_lines(file: Path) -> frozenset[int]:
    """Lines of ``raise`` statements that make an error of their own."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc is not None]
    return frozenset(i for n in found for i in range(n.lineno, (n.end_lineno or n.lineno) + 1))


def first_line(error: BaseException) -> str:
    """Of the message, without numbers, which depend on the size of the batch."""
    return re.sub(r"\d+", "#", str(error).split("\n")[0])


def own_errors(situation: Situation) -> set[str]:
    """What ordinary training steps of this model with this loss raise, without the library."""
    found = set()
    for size in (None, 1, 2):
        model, (x, y) = situation.model(), situation.data()
        try:
            with situation.under_to_train():
                situation.loss(model(x[:size]), y[:size]).mean().backward()
        except Exception as error:  # whatever it is, it is the user's
            found.add(first_line(error))
        try:
            torch.optim.SGD(p for p in model.parameters() if p.requires_grad)
        except ValueError as error:
            found.add(first_line(error))
    return found


def leaves(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters, gradients, buffers, modes and plain attributes, by name."""
    for name, module in inner(model).named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, (Tensor, int, float, bool)) and not key.startswith("_"):
                yield f"{name}.{key}", value
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            yield f"{name}.{key}", value
            if isinstance(value, nn.Parameter):
                yield f"{name}.{key}.grad", value.grad
                yield f"{name}.{key}.requires_grad", value.requires_grad
                yield f"{name}.{key}.hooks", len(value._backward_hooks or ())
        yield f"{name}.hooks", len(module._forward_pre_hooks) + len(module._forward_hooks)


@contextmanager
def untouched(model: nn.Module, *, draws: bool = False) -> Iterator[None]:
    """The model, its gradients and the random numbers are what they were, also after an error.

    Args:
        model: that is looked at.
        draws: whether random numbers may be used up.
    """
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in leaves(model)}
    random_before = state_of_random_numbers()
    try:
        yield
    finally:
        after = dict(leaves(model))
        for key in before.keys() | after.keys():
            if not same(before.get(key), after.get(key)):
                raise Moved(f"{key.strip('.')} has changed")
        if not draws and state_of_random_numbers() != random_before:
            raise Moved("the random numbers have moved on")


def state_of_random_numbers() -> tuple[bytes, ...]:
    numbers: Any = np.random.get_state()
    return (
        torch.get_rng_state().numpy().tobytes(),
        numbers[1].tobytes() + bytes([numbers[2] % 256]),
        repr(random.getstate()).encode(),
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = (t.to_dense() if t.is_sparse else t for t in (a, b))
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
    return type(a) is type(b) and a == b


def agree(what: str, found: Any, expected: Any, tolerance: float, scale: Any = None) -> None:
    """Raise Wrong unless two numbers or tensors agree, relative to their size.

    Args:
        what: is compared.
        found: by the library.
        expected: by the reference.
        tolerance: relative.
        scale: what the tolerance is relative to; the largest entry expected.
    """
    a, b = (torch.as_tensor(t, dtype=torch.float64).detach().cpu() for t in (found, expected))
    if a.shape != b.shape:
        raise Wrong(f"{what} has shape {tuple(a.shape)} for {tuple(b.shape)}")
    if not a.numel():
        return
    size = (
        b.abs().max() if scale is None else torch.as_tensor(scale, dtype=torch.float64).abs().max()
    )
    off = (a - b).abs().max()
    if not bool(off <= tolerance * size + 1e-12) and not torch.equal(a.isnan(), b.isnan()):
        raise Wrong(f"{what} is not finite: {a.flatten()[:3].tolist()}")
    off = (a - b).nan_to_num(0.0).abs().max()
    size = size.nan_to_num(1.0)
    if not bool(off <= tolerance * size + 1e-12):
        raise Wrong(f"{what} is {float(off / size):.1e} of its size off the reference")
