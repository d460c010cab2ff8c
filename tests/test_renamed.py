"""What had another name in the last release works under it, warns, and says the new one."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import poprisk
import poprisk.monitor
from poprisk import _renamed, path
from poprisk._renamed import RENAMINGS, renamed_arguments, renamed_attributes, renamed_names
from poprisk.path import drift
from poprisk.path.integrals import integrate
from poprisk.randomness import generator_of
from samplers import randn

N = 6
X, Y = randn(N, 2), randn(N, 1, seed=1)
LIBRARY = [r for r in RENAMINGS if r.owner.startswith("poprisk.")]


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().sum(1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 1).double()


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


def recorded(**settings: Any) -> path.Run:
    model = net()
    batches = torch.arange(N).repeat(4).split(4)
    return poprisk.record(model, squared, sgd(model), batches, train=(X, Y), **settings)


def recorder(**settings: Any) -> float:
    model = net()
    found = poprisk.Recorder(model, squared, sgd(model), train=(X, Y), **settings)
    return found.weights.storage.max_memory


def kernel(*sets: Tensor, **given: Any) -> Tensor:
    return poprisk.entk(net(), *sets, **given).dense()


def trace(**given: Any) -> Any:
    return poprisk.entk(net(), X).trace(3, **given)[:2]


def eigenpairs(**given: Any) -> Any:
    return poprisk.entk(net(), X).eigsh(2, **given)


def recorded_within(**given: Any) -> float:
    return recorded(**given).weights.storage.max_memory


def propagator(**given: Any) -> Tensor:
    return integrate(recorded(), **given).P


def operators_within(**given: Any) -> float:
    return poprisk.path_operators(recorded(), **given).max_memory


def noise(**given: Any) -> Any:
    return drift.fitted_noise(recorded(), draws=3, **given)[:2]


def drawn(**given: Any) -> Tensor:
    return torch.stack(drift.draw_batches(9, 3, 3, replace=True, **given))


def left_out(**given: Any) -> Any:
    return poprisk.loo_risk(recorded(), **given)[:2]


def fresh(**given: Any) -> Any:
    model = net()
    return poprisk.fresh_batch_risk(model, squared, X, Y, sgd(model), fresh=True, **given)[:2]


PAIRS = torch.arange(N) // 2
GIVEN: dict[tuple[str, str], tuple[Callable[..., Any], Any, Any]] = {
    ("ntk.entk", "x"): (kernel, X, X),
    ("ntk.entk", "y"): (functools.partial(kernel, X), X[:2], X[:2]),
    ("ntk.Kernel.trace", "generator"): (trace, generator_of(3, "probes"), 3),
    ("ntk.Kernel.eigsh", "generator"): (eigenpairs, generator_of(3, "start"), 3),
    ("path.recorder.Recorder.__init__", "budget"): (recorder, 10_000, 10_000),
    ("path.recorder.record", "budget"): (recorded_within, 20_000, 20_000),
    ("path.integrals.integrate", "budget"): (propagator, 1e9, 1e9),
    ("path.operators.path_operators", "budget"): (operators_within, 1e9, 1e9),
    ("path.drift.fitted_noise", "generator"): (noise, generator_of(5, "noise"), 5),
    ("path.drift.draw_batches", "generator"): (drawn, generator_of(5, "batches"), 5),
    ("risk.loo.loo_risk", "group_ids"): (left_out, PAIRS, PAIRS),
    ("risk.fresh.fresh_batch_risk", "groups"): (fresh, 3, 3),
}
"""What is done with an argument, its value as it was given and as it is."""


def of_kind(kind: str) -> list[Any]:
    cases = [r for r in LIBRARY if r.kind == kind]
    return [pytest.param(r, id=f"{r.owner}.{r.old}") for r in cases]


def owner_of(renaming: _renamed.Renaming) -> Any:
    """The module, class or function that a dotted name stands for."""
    parts = renaming.owner.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(renaming)


def test_every_argument_that_was_renamed_is_tried_here() -> None:
    arguments = {(r.owner, r.old) for r in LIBRARY if r.kind == "argument"}
    assert arguments == {(f"poprisk.{owner}", old) for owner, old in GIVEN}


@pytest.mark.parametrize("renaming", of_kind("argument"))
def test_an_argument_works_by_its_old_name(renaming: _renamed.Renaming) -> None:
    use, then, now = GIVEN[renaming.owner.removeprefix("poprisk."), renaming.old]
    expected = use(**{renaming.new: now})
    with pytest.warns(DeprecationWarning, match=rf"\({renaming.new}=...\) now") as told:
        found = use(**{renaming.old: then})
    assert [w.filename for w in told] == [__file__]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("renaming", of_kind("argument"))
def test_an_argument_by_both_of_its_names_is_refused(renaming: _renamed.Renaming) -> None:
    message = f"got {renaming.new} twice, also by its old name {renaming.old}"
    with pytest.raises(TypeError, match=message):
        owner_of(renaming)(**{renaming.old: 1, renaming.new: 1})


@pytest.mark.parametrize("renaming", of_kind("attribute"))
def test_an_attribute_can_be_read_by_its_old_name(renaming: _renamed.Renaming) -> None:
    kind = owner_of(renaming)
    if dataclasses.is_dataclass(kind):
        made: Any = object.__new__(kind)
        made.__dict__.update({f.name: object() for f in dataclasses.fields(kind)})
    else:
        made = kind(*(object() for _ in kind._fields))
    told = f"{kind.__name__}.{renaming.old} is {kind.__name__}.{renaming.new} now"
    with pytest.warns(DeprecationWarning, match=told) as warned:
        found = getattr(made, renaming.old)
    assert [w.filename for w in warned] == [__file__]
    assert found is getattr(made, renaming.new)


@pytest.mark.parametrize("renaming", of_kind("name"))
def test_a_name_of_a_module_is_found_by_its_old_one(renaming: _renamed.Renaming) -> None:
    module = owner_of(renaming)
    with pytest.warns(DeprecationWarning, match=f"{renaming.old} is .*{renaming.new} now") as told:
        found = getattr(module, renaming.old)
    assert [w.filename for w in told] == [__file__]
    place, _, new = renaming.new.rpartition(".")
    assert found is getattr(importlib.import_module(place) if place else module, new)
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchName'"):
        _ = module.NoSuchName


def test_there_are_renamings_of_each_kind() -> None:
    assert {r.kind for r in LIBRARY} == {"argument", "attribute", "name"}


def test_a_function_that_is_called_by_its_present_names_says_nothing() -> None:
    """Warnings are errors here."""

    @renamed_arguments(n="x")
    def double(x: int) -> int:
        return 2 * x

    assert double(2) == double(x=2) == 4
    RENAMINGS.pop()


def test_names_may_have_moved_to_another_module() -> None:
    find = renamed_names("poprisk.here", Old="poprisk.path.Run")
    RENAMINGS.pop()
    with pytest.warns(DeprecationWarning, match=r"poprisk.here.Old is poprisk.path.Run now"):
        assert find("Old") is path.Run


def test_a_renamed_attribute_is_not_one_of_the_fields() -> None:
    cls = renamed_attributes(old="new")(type("Result", (SimpleNamespace,), {}))
    RENAMINGS.pop()
    assert vars(cls(new=1)) == {"new": 1}


def test_documentation_leaves_old_attributes_out() -> None:
    """It lists what has a docstring."""
    for renaming in LIBRARY:
        if renaming.kind == "attribute":
            assert vars(owner_of(renaming))[renaming.old].__doc__ is None
