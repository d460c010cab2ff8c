"""Every place in which a forward pass can keep state is put back."""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from poprisk.evaluation import evaluating, outputs_of

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@dataclass
class Running:
    mean: Tensor = field(default_factory=lambda: torch.zeros(3))
    count: int = 0

    def update(self, x: Tensor) -> None:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.count += 1


class Slotted:
    __slots__ = ("later", "mean")

    def __init__(self) -> None:
        self.mean = torch.zeros(3)


class State(NamedTuple):
    h: Tensor
    c: Tensor


class Cache(dict[str, Any]):
    pass


class Ordered(OrderedDict[str, Any]):
    pass


class History(list[Any]):
    pass


class Layer(nn.Linear):
    """A linear layer with a state, and a way to write to it."""

    def __init__(self, state: Any, write: Any) -> None:
        super().__init__(3, 2)
        self.state, self.write = state, write

    def forward(self, input: Tensor) -> Tensor:
        self.write(self, input)
        return super().forward(input)


def update(layer: Any, x: Tensor) -> None:
    layer.state.update(x)


def slot(layer: Any, x: Tensor) -> None:
    layer.state.mean.add_(1)
    layer.state.later = x


def into_tuple(layer: Any, x: Tensor) -> None:
    layer.state.h.add_(1)
    layer.state = State(x, x)


def into_dict(layer: Any, x: Tensor) -> None:
    layer.state["a"].add_(1)
    layer.state["new"] = x


def into_list(layer: Any, x: Tensor) -> None:
    layer.state[0].add_(1)
    layer.state.append(x)


def namespace(layer: Any, x: Tensor) -> None:
    layer.state.inner.update(x)
    layer.state.n += 1


def hidden(layer: Any, x: Tensor) -> None:
    layer.state[0](x)
    with torch.no_grad():
        layer.state[0].weight.grad.add_(1)


def hidden_norm() -> list[nn.Module]:
    norm = nn.BatchNorm1d(3)
    norm(X).sum().backward()
    return [norm]


def nested(layer: Any, x: Tensor) -> None:
    layer.state["deep"][0].update(x)
    layer.state["counts"]["x"] += 1
    layer.state["recent"].append(x)


STATES: dict[str, tuple[Any, Any]] = {
    "an object": (Running, update),
    "slots": (Slotted, slot),
    "a named tuple": (lambda: State(torch.zeros(3), torch.zeros(3)), into_tuple),
    "a dict of a class": (lambda: Cache(a=torch.zeros(3)), into_dict),
    "an ordered dict": (lambda: OrderedDict(a=torch.zeros(3)), into_dict),
    "an ordered dict of a class": (lambda: Ordered(a=torch.zeros(3)), into_dict),
    "a list of a class": (lambda: History([torch.zeros(3)]), into_list),
    "a namespace": (lambda: SimpleNamespace(inner=Running(), n=0), namespace),
    "a module in a list": (hidden_norm, hidden),
    "objects in containers": (
        lambda: {"deep": (Running(),), "counts": defaultdict(int), "recent": deque(maxlen=1)},
        nested,
    ),
}


def seen(value: Any) -> Any:
    """All that there is of a state, as plain values with the identity of every tensor."""
    if isinstance(value, Tensor):
        return id(value), value.tolist(), None if value.grad is None else value.grad.tolist()
    if isinstance(value, nn.Module):
        return [seen(v) for v in value.state_dict(keep_vars=True).values()]
    if isinstance(value, dict):
        return [(k, seen(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [seen(v) for v in value]
    if isinstance(value, Slotted):
        return seen(value.mean), hasattr(value, "later")
    return seen(vars(value)) if hasattr(value, "__dict__") else value


@pytest.mark.parametrize("kind", STATES)
def test_state_of_every_kind_is_put_back(kind: str) -> None:
    make, write = STATES[kind]
    layer = Layer(make(), write)
    state, before = layer.state, seen(layer.state)
    for _ in range(2):
        with evaluating(nn.Sequential(layer)):
            layer(X)
            layer(X)
            assert seen(layer.state) != before
        assert layer.state is state
        assert seen(layer.state) == before
    layer(X)
    assert seen(layer.state) != before


def test_an_object_that_knows_the_model_is_left_alone() -> None:
    class Trainer:
        def __init__(self, model: nn.Module) -> None:
            self.model = model
            self.log: list[int] = []

    model: Any = nn.Linear(3, 2)
    trainer = Trainer(model)
    model.trainer = trainer
    with evaluating(model):
        trainer.log.append(1)
    assert trainer.log == [1]


class Grows(nn.Module):
    """Makes buffers, parameters and modules when it is first called."""

    cache: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = x.detach().clone()
            self.register_buffer("late", torch.zeros(1), persistent=False)
            self.head = nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.ones(()))
            self.register_forward_hook(lambda *_: None)
        return self.head(x) * self.scale


def test_what_a_first_call_makes_is_not_there_afterwards() -> None:
    model = Grows()
    with evaluating(model):
        model(X)
    assert model.cache is None
    assert not list(model.parameters())
    assert not hasattr(model, "late")
    assert not model._non_persistent_buffers_set
    assert not model._forward_hooks
    model(X)
    assert len(list(model.parameters())) == 3


BUFFERS: dict[str, Any] = {
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "bytes": lambda: torch.ones(2, dtype=torch.uint8),
    "meta": lambda: torch.ones(2, device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "expanded": lambda: torch.arange(3).expand(2, -1),
    "empty": lambda: torch.ones(0),
    "without gradient tracking": lambda: _inference(),
}


def _inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(2)


@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_of_every_kind_are_lent_and_put_back(kind: str) -> None:
    model: Any = nn.Linear(3, 2)
    model.register_buffer("one", BUFFERS[kind]())
    model.register_buffer("two", model.one)
    before = model.one
    with evaluating(model):
        assert model.one is model.two
        assert model.one is not before
        assert model.one.layout == before.layout
        if kind not in ("meta", "expanded"):
            model.one.zero_()
    assert model.one is model.two is before
    if kind in ("complex", "bytes", "sparse", "without gradient tracking"):
        assert bool((before.to_dense() if before.is_sparse else before).any())


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_parametrized_weights_stay(wrap: Any) -> None:
    model = wrap(nn.Linear(3, 2))
    model(X).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with evaluating(model):
        model.train()
        model(X)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_lazy_and_meta_modules_can_be_looked_at() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with evaluating(model):
        model(X)
    assert model(X).shape == (4, 2)
    with evaluating(nn.Linear(3, 2, device="meta")):
        pass


def test_a_backward_pass_inside_leaves_gradients_and_tells_no_hook() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    calls: list[int] = []

    def note(*_: Any) -> None:
        calls.append(1)

    model(X).sum().backward()
    weight: Any = model[0].weight
    weight.register_hook(note)
    weight.register_post_accumulate_grad_hook(note)
    model[1].register_full_backward_hook(note)
    model[1].register_full_backward_pre_hook(note)
    grad, before = weight.grad, weight.grad.clone()
    with evaluating(model):
        model(X).sum().backward()
        weight.requires_grad_(False)
    assert calls == []
    assert weight.grad is grad
    assert torch.equal(grad, before)
    assert weight.requires_grad
    model(X).sum().backward()
    assert len(calls) == 4


def test_weights_that_are_first_written_to_later_are_said_then_restored() -> None:
    class Late(nn.Linear):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            Late.calls += 1
            if Late.calls > 1:
                with torch.no_grad():
                    self.weight.mul_(0.5)
            return super().forward(input)

    model = Late(3, 2)
    with evaluating(model):
        model(X)
    with pytest.warns(RuntimeWarning, match="Late wrote to its weights"), evaluating(model):
        model(X)
    before = model.weight.detach().clone()
    with evaluating(model):
        model(X)
    assert torch.equal(model.weight, before)


def test_weights_that_every_pass_writes_are_restored_every_time() -> None:
    class Binary(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            self.weight.data.sign_()
            return super().forward(input)

    model = Binary(3, 2)
    before = model.weight.detach().clone()
    for _ in range(3):
        with evaluating(model):
            model(X)
        assert torch.equal(model.weight, before)


def test_renormalized_weights_are_restored_also_if_they_were_small_at_first() -> None:
    model = nn.Embedding(5, 3, max_norm=1.0)
    with torch.no_grad():
        model.weight.mul_(1e-3)
    with evaluating(model):
        model(torch.arange(5))
    with torch.no_grad():
        model.weight.mul_(1e6)
    before = model.weight.detach().clone()
    with evaluating(model):
        model(torch.arange(5))
    assert torch.equal(model.weight, before)


def losses() -> dict[str, Any]:
    class Normalized(nn.Module):
        size: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("size", torch.ones(()))

        def forward(self, u: Tensor) -> Tensor:
            self.size.mul_(0.9).add_(u.detach().abs().mean())
            return u / self.size

    class Callable_:
        def __init__(self) -> None:
            self.running = Running()

        def __call__(self, u: Tensor) -> Tensor:
            self.running.update(u)
            return u

    running = Running()

    def closure(u: Tensor) -> Tensor:
        running.update(u)
        return u

    made = Callable_()
    return {
        "a module": Normalized(),
        "an object": Callable_(),
        "a method": Callable_().__call__,
        "a partial": functools.partial(Running.update, Running()),
        "a closure": closure,
        "a bound object": made,
    }


@pytest.mark.parametrize("kind", losses())
def test_losses_keep_their_state_too(kind: str) -> None:
    loss = losses()[kind]

    def state() -> Any:
        if isinstance(loss, functools.partial):
            return seen(loss.args[0])
        if kind == "a closure":
            return [seen(c.cell_contents) for c in loss.__closure__]
        return seen(getattr(loss, "__self__", loss))

    before = state()
    with evaluating(nn.Linear(3, 2), loss):
        loss(X)
        assert state() != before
    assert state() == before


def test_a_compiled_model_is_evaluated_without_compiling() -> None:
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    inner = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    model: Any = torch.compile(inner, backend=backend)
    model(X)
    count = len(compiled)
    with evaluating(model):
        found = outputs_of(model, X)
    assert torch.equal(found, inner(X))
    assert len(compiled) == count
    model(X)
    assert len(compiled) == count
