"""Tasks: the built-in ones by name, and a user's own from a file."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from poprisk.task import Task
from poprisk_lab.tasks import digits as _digits
from poprisk_lab.tasks import interpolation as _interpolation
from poprisk_lab.tasks import local_rules as _local_rules
from poprisk_lab.tasks import modular as _modular
from poprisk_lab.tasks import regression as _regression
from poprisk_lab.tasks.sources import place_of

__all__ = ["BUILT_IN", "Source", "TaskError", "load_task", "source_name"]

Source = str | Task | Callable[..., Task]
"""Where a task comes from: a name, a function that makes it, or the task itself."""

BUILT_IN: dict[str, Callable[..., Task]] = {
    "digits": _digits.digits,
    "digits-cnn": _digits.digits_cnn,
    "digits-clean": _digits.digits_clean,
    "digits-forward-forward": _local_rules.digits_forward_forward,
    "digits-mono-forward": _local_rules.digits_mono_forward,
    "sparse-regression": _regression.sparse_regression,
    "dense-regression": _regression.dense_regression,
    "long-tail-regression": _interpolation.long_tail_regression,
    "random-features": _interpolation.random_features,
    "diabetes": _regression.diabetes,
    "grokking": _modular.modular_division,
}


class TaskError(ValueError):
    """A task that cannot be found or made; the message says why and what to do.

    Attributes:
        trace: the traceback of the error behind it, if there was one.
    """

    trace = ""

    @classmethod
    def of(cls, what: str, error: BaseException) -> TaskError:
        """What failed, why, and where in the user's own files."""
        found = cls(f"{what}: {type(error).__name__}: {error}{place_of(error)}")
        found.trace = "".join(traceback.format_exception(error))  # no cause survives a process
        return found


def source_name(source: Source) -> str:
    """How messages and records call a task."""
    if isinstance(source, str):
        return source
    own = source.name if isinstance(source, Task) else getattr(source, "__qualname__", "")
    return str(own) or type(source).__name__


def load_task(source: Source, /, *, seed: int, **settings: Any) -> Task:
    """Make a task: a built-in one, one of ``path/to/file.py:function``, or that of a function.

    A function that takes ``seed`` gets it (for its split and its noise); ``settings`` are
    passed on to it. A task that is made already is copied, and is the same for every seed.

    Raises:
        TaskError: if there is no such task, file or function, or it does not return a Task.
    """
    name = source_name(source)
    function = _find(source) if isinstance(source, str) else source
    if isinstance(function, Task):
        if settings:
            raise TaskError(
                f"task {name} is made already and takes no settings, but got "
                f"{', '.join(map(repr, settings))}; give the function that makes it."
            )
        return copy.copy(function)
    parameters = inspect.signature(function).parameters
    unknown = set(settings) - set(parameters)
    if unknown:
        raise TaskError(
            f"task {name} has no setting {sorted(unknown)[0]!r}; it takes "
            f"{', '.join(p for p in parameters if p != 'seed') or 'none'}."
        )
    try:
        task = function(**({"seed": seed} if "seed" in parameters else {}), **settings)
    except (Exception, SystemExit) as error:
        raise TaskError.of(f"task {name} failed", error) from error
    if not isinstance(task, Task):
        raise TaskError(
            f"{name} must return a poprisk.Task, but it returned {type(task).__name__}."
        )
    return task


def _find(name: str) -> Callable[..., Any]:
    if name in BUILT_IN:
        return BUILT_IN[name]
    path, colon, function = name.rpartition(":")
    if not colon and name.endswith(".py"):
        found = _giving_tasks(_module(Path(name), name))
        which = ", ".join(f"{name}:{f}" for f in found) or "none of its functions gives a Task"
        raise TaskError(f"name the function of {name} that gives the task: {which}.")
    if not colon:
        raise TaskError(
            f"unknown task {name!r}; the built-in ones are {', '.join(BUILT_IN)}. Your own is "
            "written path/to/file.py:function."
        )
    return _from_file(Path(path), function)


def _from_file(path: Path, function: str) -> Callable[..., Any]:
    found = getattr(_module(path, f"{path}:{function}"), function, None)
    if not callable(found):
        raise TaskError(f"{path} has no function {function!r}.")
    return found


def _giving_tasks(module: ModuleType) -> list[str]:
    """Functions that a module itself defines and that give a Task, as far as they say so.

    Those are annotated to return one, or without an annotation and callable as a task is: all
    parameters but ``seed`` have defaults.
    """
    found = []
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("_") or function.__module__ != module.__name__:
            continue
        signature = inspect.signature(function)
        needed = {p.name for p in signature.parameters.values() if _is_needed(p)}
        gives = signature.return_annotation
        named = gives is Task or (isinstance(gives, str) and gives.rpartition(".")[2] == "Task")
        if needed <= {"seed"} and (named or gives is inspect.Signature.empty):
            found.append(name)
    return found


def _is_needed(parameter: inspect.Parameter) -> bool:
    many = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not many


def _module(path: Path, name: str) -> ModuleType:
    """The file of the task called ``name``, run."""
    if not path.is_file():
        raise TaskError(f"no file {path} (task {name}).")
    spec = importlib.util.spec_from_file_location(f"poprisk_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} is not a Python file; a task is written path/to/file.py:function.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    if str(path.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(path.parent.resolve()))  # as for a script: what lies beside it
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave no __pycache__ there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TaskError.of(f"{path} failed on import", error) from error
    finally:
        sys.dont_write_bytecode = kept
    return module
