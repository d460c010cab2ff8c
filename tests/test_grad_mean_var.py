"""What grad_mean_var takes: one loss per example that depends on it alone, or one clear line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from poprisk import grad_mean_var
from samplers import randn

B = 12
X, Y = randn(B, 5), torch.arange(B) % 3
close = torch.testing.assert_close


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def per_example(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none", ignore_index=-1)


def divided_by_valid(outputs: Tensor, targets: Tensor) -> Tensor:
    """The usual mean over labels that count, spread over the examples."""
    return per_example(outputs, targets) * len(targets) / (targets >= 0).sum()


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")


def standardized(outputs: Tensor, targets: Tensor) -> Tensor:
    found = per_example(outputs, targets)
    return (found - found.mean()) / found.std(unbiased=False)


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """By the share of the label in the batch."""
    return per_example(outputs, targets) / torch.bincount(targets, minlength=3)[targets]


def spread_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return per_example(outputs, targets).mean().expand(len(targets))


def pairs(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of an even number of examples, each compared with one of the other half."""
    left, right = outputs.view(2, -1, 3)
    return torch.cat([(left - right).square().sum(1)] * 2)


def by_chance(outputs: Tensor, targets: Tensor) -> Tensor:
    return per_example(outputs, targets).roll(1)


ACROSS = [divided_by_valid, contrastive, standardized, weighted, spread_mean, pairs, by_chance]


@pytest.mark.parametrize("chunk", [None, 4, 6])
@pytest.mark.parametrize("loss", ACROSS)
def test_losses_that_look_across_the_batch_are_refused(loss: Any, chunk: int | None) -> None:
    targets = Y.clone()
    if loss is divided_by_valid:
        targets[-2:] = -1
    with pytest.raises(ValueError, match=r"others of its batch|without the others"):
        grad_mean_var(net(), loss, (X, targets), chunk=chunk)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda h: h - h.mean(0),
    "attention between examples": lambda h: (h @ h.T).softmax(1) @ h,
    "running sum": lambda h: h.cumsum(0),
    "sorted": lambda h: h.sort(0).values,
    "pairs of examples": lambda h: h.view(2, -1, 3).flip(0).flatten(0, 1),
}


@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_examples_are_refused(name: str) -> None:
    model = zoo.Function(lambda m, x: MIXING[name](m.net(x)), net=net())
    with pytest.raises(ValueError, match=r"others of its batch|without the others"):
        grad_mean_var(model, per_example, (X, Y))


SEPARATE: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda h: h,
    "noise in eval mode, too": lambda h: h + torch.randn_like(h),
    "dropout": lambda h: F.dropout(h, 0.5),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_models_that_do_not_are_not(name: str) -> None:
    model = zoo.Function(lambda m, x: SEPARATE[name](m.net(x)), net=net())
    assert all(v.isfinite().all() for v in grad_mean_var(model, per_example, (X, Y)).values())


@pytest.mark.parametrize("b", [2, 3, 4])
def test_few_examples_and_a_loss_that_takes_no_single_one(b: int) -> None:
    """A squeezed dimension goes with the examples where there is one."""
    linear = nn.Linear(5, 1).double()
    found = grad_mean_var(linear, lambda out, y: (out.squeeze() - y) ** 2, (X[:b], Y[:b]))
    rows = [torch.autograd.grad((linear(X[i]) - Y[i]) ** 2, linear.bias)[0] for i in range(b)]
    close(found["bias"], torch.stack(rows).var(0) / b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("b", "chunk"), [(2, None), (3, None), (4, 2), (7, 3), (9, 4)])
def test_a_loss_that_fails_on_one_example_is_never_given_one(b: int, chunk: int | None) -> None:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out.squeeze(), y, reduction="none")

    linear, y = nn.Linear(5, 1).double(), (Y[:b] > 0).double()
    found = grad_mean_var(linear, loss, (X[:b], y), chunk=chunk)
    residual = (linear(X[:b]).squeeze(1).sigmoid() - y).detach()
    close(found["bias"], (residual.var() / b).reshape(1), rtol=1e-10, atol=1e-14)


def test_a_mistake_of_the_users_own_is_not_explained_away() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        grad_mean_var(net(), per_example, (randn(4, 6), Y[:4]))


@pytest.mark.parametrize("chunk", [2, 4, 5, 6])
def test_ignored_labels_have_gradient_zero_in_any_chunk(chunk: int) -> None:
    targets = Y.clone()
    targets[::4] = -1
    whole = grad_mean_var(net(), per_example, (X, targets))
    found = grad_mean_var(net(), per_example, (X, targets), chunk=chunk)
    for name, value in whole.items():
        close(found[name], value, rtol=1e-10, atol=1e-14)


class Both(NamedTuple):
    """Outputs as many libraries return them."""

    logits: Tensor
    hidden: Tensor


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Tensor]]] = {
    "tuple": (lambda h: (h, 2 * h), lambda out, y: per_example(out[0], y)),
    "dictionary": (lambda h: {"logits": h}, lambda out, y: per_example(out["logits"], y)),
    "named": (lambda h: Both(h, h), lambda out, y: per_example(out.logits, y)),
    "list": (lambda h: [h], lambda out, y: per_example(out[0], y)),
    "examples last": (lambda h: h.T, lambda out, y: per_example(out.T, y)),
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_any_form_are_the_losses_matter(form: str) -> None:
    wrap, loss = FORMS[form]
    model = zoo.Function(lambda m, x: wrap(m.net(x)), net=net())
    expected = grad_mean_var(net(), per_example, (X, Y))
    for (_, found), (_, value) in zip(
        grad_mean_var(model, loss, (X, Y)).items(), expected.items(), strict=True
    ):
        close(found, value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("form", ["tuple", "dictionary", "named", "list"])
def test_a_loss_that_does_not_take_the_outputs_is_told_what_to_do(form: str) -> None:
    model = zoo.Function(lambda m, x: FORMS[form][0](m.net(x)), net=net())
    with pytest.raises(TypeError, match=r"the model returned \w+, on which loss failed.*out\[0\]"):
        grad_mean_var(model, per_example, (X, Y))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers(bad: float) -> None:
    x = X.clone()
    x[3, 0] = bad
    linear = nn.Linear(5, 3).double()
    with pytest.raises(ValueError, match="losses of 1 of 12 examples are NaN or Inf.*position 3"):  # noqa: RUF043
        grad_mean_var(linear, per_example, (x, Y))
    with pytest.raises(ValueError, match="losses of 1 of 4 examples.*position 3"):  # noqa: RUF043
        grad_mean_var(linear, per_example, (x, Y), chunk=4)


GRAPH = (torch.rand(B, B, generator=torch.Generator().manual_seed(0)) < 0.3).double()


def test_nodes_of_a_graph_are_no_examples() -> None:
    model = zoo.Function(lambda m, x: GRAPH @ m.net(x), net=net())
    with pytest.raises(ValueError, match=r"fails on 8 of 12 examples.*nodes of one graph"):
        grad_mean_var(model, per_example, (X, Y))
    with pytest.raises(ValueError, match=r"different lengths, \[2, 12\].*a graph's list of edges"):
        grad_mean_var(model, per_example, ((X, torch.ones(2, 30).long()), Y))


def test_variances_come_in_the_order_of_the_parameters() -> None:
    """Also where a parameter has no effect, so that they can be taken side by side."""
    model = zoo.Function(
        lambda m, x: m.last(m.first(x)), first=nn.Linear(5, 4), unused=nn.Linear(2, 2),
        last=nn.Linear(4, 3),
    ).double()  # fmt: skip
    names = [name for name, _ in model.named_parameters()]
    assert list(grad_mean_var(model, per_example, (X, Y))) == names
    chosen = ["last.bias", "unused.bias", "first.weight"]
    assert list(grad_mean_var(model, per_example, (X, Y), params=chosen)) == chosen


def test_nothing_is_left_behind() -> None:
    """Buffers, modes, gradients and random numbers are as they were."""
    model = nn.Sequential(net(), nn.Dropout(0.5))
    before = torch.get_rng_state()
    grad_mean_var(model, per_example, (X, Y))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("chunk", [-4, 0, 1])
def test_a_chunk_has_two_examples_at_least(chunk: int) -> None:
    with pytest.raises(ValueError, match=rf"^chunk must be at least 2, but got {chunk}"):
        grad_mean_var(net(), per_example, (X, Y), chunk=chunk)


@pytest.mark.parametrize("targets", [torch.tensor(1), Y[:5]])
def test_targets_are_one_an_example(targets: Tensor) -> None:
    shape = str(tuple(targets.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"^there are 12 examples but targets of shape {shape}"):
        grad_mean_var(net(), per_example, (X, targets))


@pytest.mark.parametrize("batch", [X, (X,), (X, Y, Y)])
def test_a_batch_is_a_pair(batch: Any) -> None:
    with pytest.raises(TypeError, match=r"^batch must be a pair"):
        grad_mean_var(net(), per_example, batch)
    with pytest.raises(TypeError, match=r"^the targets must be a tensor"):
        grad_mean_var(net(), per_example, (X, Y.tolist()))
