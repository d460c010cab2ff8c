"""Whoever looks at a model leaves it as if nobody had."""

from __future__ import annotations

import copy
from collections import Counter, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk.evaluation import evaluating, outputs_of
from poprisk.randomness import RandomState


class Stateful(nn.Module):
    """Writes to whatever a forward pass can write to, in evaluation mode too."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.embedding = nn.Embedding(5, 3, max_norm=0.1)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scale", torch.ones(()))
        self.calls = 0
        self.cache: dict[str, Any] = {"seen": [], "by_kind": Counter()}
        self.recent: deque[Tensor] = deque(maxlen=2)
        self.table = np.zeros(3)
        self.noise = torch.Generator().manual_seed(0)
        self.alias = self.cache["seen"]

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + self.embedding.weight[0] + self.embedding(torch.tensor([1])))
        self.scale.mul_(0.9).add_(0.1 * h.detach().abs().mean())
        self.calls += 1
        self.alias.append(h.detach())
        self.cache["by_kind"]["train" if self.training else "eval"] += 1
        self.recent.append(h.detach())
        self.table += 1
        self.made_on_the_way = h
        h = h + 0.1 * torch.randn((), generator=self.noise) + 0.1 * torch.rand(())
        return self.linear(h / self.scale)


def complete(model: nn.Module) -> list[Any]:
    """All that can be seen of a model, as plain values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        if isinstance(value, torch.Generator):
            return value.get_state().tolist()
        if isinstance(value, np.ndarray):
            return value.tolist()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, deque)):
            return [plain(v) for v in value]
        return repr(value)

    return [(name, plain(dict(module.__dict__))) for name, module in model.named_modules()]


def test_nothing_is_left_of_a_look() -> None:
    model = Stateful()
    x = torch.randn(4, 3)
    model(x).sum().backward()
    model.norm.eval()
    before, random = complete(model), RandomState.now()
    objects = (model.scale, model.cache, model.alias, model.linear.weight.grad)
    version = model.scale._version
    with evaluating(model):
        assert not model.training
        assert model.alias is model.cache["seen"]
        model(torch.randn(4, 3)).sum().backward()
        assert len(model.recent) == 2
    assert complete(model) == before
    assert random.same(RandomState.now())
    now = (model.scale, model.cache, model.alias, model.linear.weight.grad)
    assert all(a is b for a, b in zip(objects, now, strict=True))
    assert model.scale._version == version


def test_a_graph_that_saved_a_buffer_survives_a_look() -> None:
    model = Stateful()
    loss = model(torch.randn(4, 3)).sum()
    with evaluating(model):
        model(torch.randn(4, 3))
    loss.backward()
    assert model.linear.weight.grad is not None


def test_weights_written_by_a_forward_pass_are_restored_at_every_look() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Linear(3, 2))
    start = copy.deepcopy(model.state_dict())
    for _ in range(3):
        with evaluating(model):
            model(torch.arange(5))
        torch.testing.assert_close(model.state_dict(), start, rtol=0, atol=0)


def test_an_error_inside_leaves_nothing_either() -> None:
    model = Stateful()
    before = complete(model)
    with pytest.raises(RuntimeError), evaluating(model):
        model(torch.randn(4, 7))
    assert complete(model) == before


def test_submodules_shared_by_models_are_restored_once() -> None:
    shared = Stateful()
    first, second = nn.Sequential(shared), nn.Sequential(shared, nn.ReLU())
    before = complete(shared)
    with evaluating(first, second):
        first(torch.randn(4, 3))
        second(torch.randn(4, 3))
    assert complete(shared) == before


class Forces(nn.Module):
    """The derivative of an energy by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class Adapted(nn.Module):
    """One step of gradient descent on its own weights, then a prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad((x @ self.weight).square().mean(), self.weight)
        return x @ (self.weight - 0.1 * g)


@pytest.mark.parametrize("make", [Forces, Adapted, lambda: nn.Linear(3, 2)])
def test_outputs_have_no_graph_whatever_the_model_differentiates(make: Any) -> None:
    model, x = make(), torch.randn(5, 3)
    expected = model(x).detach()
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            found = outputs_of(model, x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert not found.requires_grad
    assert all(p.requires_grad for p in model.parameters())


def test_an_ordinary_model_records_no_graph_on_the_way() -> None:
    class Probe(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            assert not out.requires_grad
            return out

    frozen = nn.Linear(2, 2).requires_grad_(False)
    model = nn.Sequential(Probe(3, 2), frozen)
    outputs_of(model, torch.randn(4, 3))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_other_errors_of_a_model_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        outputs_of(nn.Linear(3, 2), torch.randn(4, 7))


def test_outputs_of_any_form_are_detached() -> None:
    class Two(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return {"logits": super().forward(input), "hidden": (input, F.relu(input))}

    found = outputs_of(Two(3, 2), torch.randn(4, 3, requires_grad=True))
    assert not found["logits"].requires_grad
    assert not found["hidden"][1].requires_grad
