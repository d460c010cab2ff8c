"""Gradients by another way than the graph's: right, or refused by name before anything moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zoo
from poprisk import PopRiskAdamW, entk, grad_mean_var
from poprisk.per_sample import capture
from samplers import randn

B = 6
close = torch.testing.assert_close
pytestmark = pytest.mark.filterwarnings("ignore:no factored form")


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


X, Y = randn(B, 4), randn(B, 3, seed=1)


def exact(model: nn.Module, **settings: Any) -> PopRiskAdamW:
    """An optimizer whose first step shows the variance of its batch as the state."""
    options: dict[str, Any] = {"variance": "exact", "lr": 0.1, "betas": (0.0, 0.9), **settings}
    return PopRiskAdamW([p for p in model.parameters() if p.requires_grad], **options)


def one_by_one(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> dict[str, Tensor]:
    """What autograd accumulates, hooks and all, for each example alone, (b, ...)."""
    rows: dict[str, list[Tensor]] = {n: [] for n, p in model.named_parameters() if p.requires_grad}
    for i in range(B):
        model.zero_grad()
        squares(model(x[i : i + 1]), y[i : i + 1]).sum().backward()
        for name, p in model.named_parameters():
            if name in rows:
                rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    model.zero_grad()
    return {name: torch.stack(row) for name, row in rows.items()}


def variance(rows: Tensor) -> Tensor:
    return rows.var(0) / B


def assert_exact(model: nn.Module) -> None:
    """Gradient and variance of optimizer.backward are those of the examples one by one."""
    rows = one_by_one(model)
    opt = exact(model)
    opt.backward(squares(model(X), Y))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, p in named.items():
        close(p.grad, rows[name].mean(0), rtol=1e-10, atol=1e-12)
    opt.step()
    for name, p in named.items():
        close(opt.state[p]["grad_mean_var"], variance(rows[name]), rtol=1e-9, atol=1e-12)


def state(model: nn.Module, opt: PopRiskAdamW) -> list[Tensor | None]:
    tensors: list[Tensor | None] = []
    for p in model.parameters():
        grad = None if p.grad is None else p.grad.clone()
        tensors += [p.detach().clone(), grad, *(t.clone() for t in opt.state[p].values())]
    return tensors


def assert_backward_refused(
    model: nn.Module, losses: Callable[[], Tensor], kind: type[Exception], message: str
) -> None:
    """Nothing moves: not the weights, not what is in ``.grad``, not the optimizer's state."""
    opt = exact(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = state(model, opt)
    with pytest.raises(kind, match=message):
        opt.backward(losses())
    for a, b in zip(state(model, opt), before, strict=True):
        assert (a is None and b is None) or torch.equal(cast(Tensor, a), cast(Tensor, b))


MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)[:, None]

HOOKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "mask": lambda g: g * MASK,
    "scale": lambda g: -0.25 * g,
    "mask and scale": lambda g: g * MASK * 3,
    "all zero": torch.zeros_like,
    "looks only": lambda g: None,
    "the same": torch.clone,
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_mask_or_scale_are_taken_along(name: str) -> None:
    model = net()
    cast(Tensor, model[0].weight).register_hook(HOOKS[name])
    assert_exact(model)


OTHER_HOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "clipped by value": lambda g: g.clamp(-0.05, 0.05),
    "another factor for each row": lambda g: g * torch.arange(1.0, 6.0, dtype=g.dtype)[:, None],
    "weight decay": lambda g: g + 0.3,
    "sign": torch.sign,
    "square": lambda g: g * g.abs(),
}


@pytest.mark.parametrize("name", OTHER_HOOKS)
def test_other_hooks_are_refused(name: str) -> None:
    model = net()
    cast(Tensor, model[0].weight).register_hook(OTHER_HOOKS[name])
    message = r"a hook on parameter 0 of group 0, of shape \(5, 4\)"
    assert_backward_refused(model, lambda: squares(model(X), Y), RuntimeError, message)


def doubled(_: nn.Module, __: Any, outputs: Tensor) -> None:
    outputs.register_hook(lambda grad: 2 * grad)  # pyrefly: ignore


ON_ACTIVATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "full backward hook": lambda layer: layer.register_full_backward_hook(
        lambda m, given, got: (given[0] * 2,)
    ),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(
        lambda m, got: (got[0] * 2,)
    ),
    "tensor hook": lambda layer: layer.register_forward_hook(doubled),
}


@pytest.mark.parametrize("kind", ON_ACTIVATIONS)
def test_hooks_on_activations_act_as_in_any_backward_pass(kind: str) -> None:
    model = net()
    plain = one_by_one(model)["0.weight"]
    ON_ACTIVATIONS[kind](model[2])
    rows = one_by_one(model)
    close(rows["0.weight"], 2 * plain)
    found = grad_mean_var(model, squares, (X, Y))
    for name, row in rows.items():
        close(found[name], variance(row), rtol=1e-9, atol=1e-12)
    assert_exact(model)


@pytest.mark.parametrize("steps", [1, 5])
def test_hooks_on_parameters_fire_as_often_as_in_a_backward_pass(steps: int) -> None:
    """Once a step; and never where nothing claims to be autograd's gradient."""
    model, calls = net(), list[Tensor]()
    cast(Tensor, model[0].weight).register_hook(calls.append)
    opt = exact(model)
    for _ in range(steps):
        opt.zero_grad()
        opt.backward(squares(model(X), Y))
        opt.step()
    assert len(calls) == steps
    capture(squares(model(X), Y), dict(model.named_parameters())).moments()
    assert len(calls) == steps
    assert len(cast(Any, model[0].weight)._backward_hooks) == 1


def measures(model: nn.Module) -> list[Callable[[], Any]]:
    return [lambda: grad_mean_var(model, squares, (X, Y)), lambda: entk(model, X)]


def test_measurements_refuse_hooks_on_the_parameters_they_count() -> None:
    model = net()
    cast(Tensor, model[0].weight).register_hook(torch.clone)
    for measure in measures(model):
        with pytest.raises(ValueError, match=r"a hook on 0\.weight.*params="):
            measure()


def test_a_hook_on_what_does_not_count_is_no_matter() -> None:
    model = net()
    expected = entk(model, X, params=["2.weight"]).dense()
    cast(Tensor, model[0].weight).register_hook(torch.clone)
    close(entk(model, X, params=["2.weight"]).dense(), expected)


def test_hooks_after_accumulation_are_refused_before_they_run() -> None:
    model, calls = net(), list[Tensor]()
    cast(Any, model[0].weight).register_post_accumulate_grad_hook(calls.append)
    message = "register_post_accumulate_grad_hook"
    assert_backward_refused(model, lambda: squares(model(X), Y), RuntimeError, message)
    assert calls == []


def test_a_hook_where_autograd_accumulates_is_noticed() -> None:
    """What data parallel wrappers do, seen by no attribute of the parameter."""
    model = net()
    weight: Any = model[0].weight
    node = weight.view_as(weight).grad_fn.next_functions[0][0]

    def halve(*_: Any) -> None:
        weight.grad.mul_(0.5)

    node.register_hook(halve)
    message = r"parameter 0 of group 0.*AccumulateGrad"
    assert_backward_refused(model, lambda: squares(model(X), Y), RuntimeError, message)


def test_a_change_where_autograd_accumulates_is_noticed_beside_larger_gradients() -> None:
    """In single precision rounding is far below a hundredth of the largest gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    scales = torch.tensor([1e-3, 1e-3, 1e-3, 1.0, 1.0])
    bias: Any = model[0].bias
    node = bias.view_as(bias).grad_fn.next_functions[0][0]

    def larger(grads: tuple[Tensor]) -> tuple[Tensor]:
        return (5 * grads[0],)

    node.register_prehook(larger)

    def losses() -> Tensor:
        hidden = 1e-3 * model[0](X.float()) * scales
        return squares(1e3 * model[2](torch.tanh(hidden)), Y.float())

    message = r"parameter 1 of group 0.*AccumulateGrad"
    assert_backward_refused(model, losses, RuntimeError, message)


class Inside(torch.autograd.Function):
    """Runs a module again in its backward pass, as reversible and pipelined layers do."""

    @staticmethod
    def forward(*args: Any, **_: Any) -> Tensor:
        ctx, x, block, keep = args
        ctx.save_for_backward(x)
        if keep:
            ctx.block = block
        else:
            HIDDEN[:] = [block]
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        block = getattr(ctx, "block", None) or HIDDEN[0]
        with torch.enable_grad():
            torch.autograd.backward(block(x), grads)
        return x.grad, None, None


HIDDEN: list[Any] = []

BLOCKS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "reentrant checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "function that keeps a module": lambda block, x: cast(Any, Inside).apply(x, block, True),
    "function that keeps nothing": lambda block, x: cast(Any, Inside).apply(x, block, False),
}


def hiding(kind: str, inputs: str) -> nn.Module:
    """A block behind a custom function, after an input or layer that requires gradients."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x) if inputs == "trainable" else m.first(x).detach().requires_grad_()
        x = BLOCKS[kind](m.block, x)
        return m.head(m.block(x)) if inputs == "met elsewhere" else m.head(x)

    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = zoo.Function(forward, first=nn.Linear(4, 4), block=block, head=nn.Linear(4, 3))
    return model.double()


@pytest.mark.parametrize("inputs", ["frozen", "trainable", "met elsewhere"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_backward_pass_inside_a_function_is_refused(kind: str, inputs: str) -> None:
    model = hiding(kind, inputs)
    if inputs == "frozen":
        model.first.requires_grad_(False)  # pyrefly: ignore
    refused = "CheckpointFunctionBackward|InsideBackward|does not show"
    assert_backward_refused(
        model, lambda: squares(model(X), Y), cast(Any, (RuntimeError, ValueError)), refused
    )
    if (kind, inputs) == ("function that keeps nothing", "met elsewhere"):
        return  # No attribute, graph or unmet parameter tells; only the gradient above does.
    for measure in measures(model):
        with pytest.raises(ValueError, match=r"CheckpointFunctionBackward|InsideBackward"):
            measure()


def test_a_custom_function_beside_unused_parameters_can_be_measured_by_name() -> None:
    model = zoo.Function(
        lambda m, x: cast(Any, zoo.Scale).apply(m.used(x), 2, m.w)[0],
        used=nn.Linear(4, 3), w=zoo.param(3), unused=nn.Linear(2, 2),
    ).double()  # fmt: skip
    with pytest.raises(ValueError, match=r"unused\.weight, unused\.bias, but ScaleBackward"):
        grad_mean_var(model, squares, (X, Y))
    names = ["used.weight", "used.bias", "w"]
    found = grad_mean_var(model, squares, (X, Y), params=names)
    rows = one_by_one(model)
    for name in names:
        close(found[name], variance(rows[name]), rtol=1e-10, atol=1e-12)
    # The optimizer compares with autograd's gradient, and needs no such caution.
    exact(model).backward(squares(model(X), Y))
    for name, p in model.named_parameters():
        assert p.grad is None if name not in names else torch.allclose(p.grad, rows[name].mean(0))  # pyrefly: ignore


@pytest.mark.parametrize("inner", [False, True])
def test_compiled_models(inner: bool) -> None:
    """Measurements run what was compiled as it was written; losses from outside are refused."""
    plain = net()
    compiled: Any = torch.compile(plain, backend="aot_eager")
    model = nn.Sequential(compiled, nn.Linear(3, 3).double()) if inner else compiled
    twin = nn.Sequential(plain, model[1]) if inner else plain
    for _ in range(2):
        found = grad_mean_var(model, squares, (X, Y)).values()
        for a, b in zip(found, grad_mean_var(twin, squares, (X, Y)).values(), strict=True):
            close(a, b, rtol=1e-9, atol=1e-12)
        kernel = entk(model, X)
        close(kernel.dense(), entk(twin, X).dense(), rtol=1e-9, atol=1e-12)
        vector = randn(3 * B)
        close(entk(model, X) @ vector, kernel.dense() @ vector, rtol=1e-9, atol=1e-12)
        model(X)
    assert set(grad_mean_var(model, squares, (X, Y))) == {n for n, _ in model.named_parameters()}
    losses = squares(model(X), Y)
    assert_backward_refused(model, lambda: losses, ValueError, "torch.compile")
    losses.mean().backward()


@pytest.mark.parametrize("attribute", ["placements", "_fsdp_flattened", "ds_id"])
def test_split_parameters_are_refused_by_name(attribute: str) -> None:
    model = net()
    setattr(model[0].weight, attribute, 1)
    backward = lambda: exact(model).backward(squares(model(X), Y))  # noqa: E731
    for measure in (*measures(model), backward):
        with pytest.raises(ValueError, match=r"FSDP|DeepSpeed"):
            measure()


def test_offloaded_activations() -> None:
    model = net()
    rows = one_by_one(model)
    opt = exact(model)
    with torch.autograd.graph.save_on_cpu():
        losses = squares(model(X), Y)
    opt.backward(losses)
    opt.step()
    for name, p in model.named_parameters():
        close(opt.state[p]["grad_mean_var"], variance(rows[name]), rtol=1e-9, atol=1e-12)


def test_wrapped_values_of_a_transform_are_refused() -> None:
    model = net()
    names = dict(model.named_parameters())

    def value(weights: Mapping[str, Tensor]) -> Tensor:
        losses = squares(torch.func.functional_call(model, dict(weights), (X,)), Y)
        capture(losses, weights)
        return losses.sum()

    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.grad(value)({n: p.detach() for n, p in names.items()})


NORMALIZED: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
    "no running statistics": lambda: nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)
    ).eval(),
    "function": lambda: zoo.Function(
        lambda m, x: F.batch_norm(m.layer(x), None, None, training=True), layer=nn.Linear(4, 3)
    ),
    "BatchNorm2d": lambda: zoo.Function(
        lambda m, x: m.norm(m.layer(x)[:, :, None, None])[:, :, 0, 0],
        layer=nn.Linear(4, 3), norm=nn.BatchNorm2d(3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMALIZED)
def test_statistics_of_the_batch_are_refused(name: str) -> None:
    model = NORMALIZED[name]().double()
    assert_backward_refused(model, lambda: squares(model(X), Y), ValueError, "batch normalization")
    with pytest.raises(ValueError, match=r"statistics of the batch|others of its batch"):
        grad_mean_var(model, squares, (X, Y))


BY_FREQUENCY: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: nn.Sequential(
        nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(8, 3)
    ),
    "EmbeddingBag": lambda: nn.Sequential(
        nn.EmbeddingBag(5, 4, mode="mean", scale_grad_by_freq=True), nn.Linear(4, 3)
    ),
}


@pytest.mark.parametrize("name", BY_FREQUENCY)
def test_gradients_divided_by_a_count_over_the_batch_are_refused(name: str) -> None:
    model, x = BY_FREQUENCY[name]().double(), torch.arange(2 * B).reshape(B, 2) % 5
    assert_backward_refused(
        model, lambda: squares(model(x), Y), ValueError, "scale_grad_by_freq=True"
    )
    with pytest.raises(ValueError, match="scale_grad_by_freq=True"):
        grad_mean_var(model, squares, (x, Y))


def test_sparse_gradients_are_refused_before_any_is_left() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3)).double()
    x = torch.arange(2 * B).reshape(B, 2) % 5
    assert_backward_refused(model, lambda: squares(model(x), Y), RuntimeError, "sparse=False")


def test_statistics_of_single_examples_are_not() -> None:
    model = zoo.Function(
        lambda m, x: m.norm(m.layer(x).view(-1, 2, 3)).flatten(1)[:, :3],
        layer=nn.Linear(4, 6), norm=nn.InstanceNorm1d(2, affine=True),
    ).double()  # fmt: skip
    assert_exact(model)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "contrast": lambda h: h @ h.T,
    "centred": lambda h: h - h.mean(0),
    "standardized": lambda h: (h - h.mean(0)) / h.std(0),
    "attention between examples": lambda h: (h @ h.T).softmax(1) @ h,
}


@pytest.mark.parametrize("name", MIXING)
def test_a_loss_that_looks_across_the_batch_is_flagged(name: str) -> None:
    """Losses alone do not tell where they come from, but their graph does."""
    model = net()
    with pytest.warns(UserWarning, match=f"several of {B} examples.*across the batch"):
        exact(model).backward(MIXING[name](model(X)).square().sum(1))


class Towers(nn.Module):
    """Two views of each example, by one net or by two."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.left = net()
        self.right = self.left if shared else net()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        scores = self.left(x) @ self.right(z).T
        return F.cross_entropy(scores, torch.arange(len(x)), reduction="none")


@pytest.mark.parametrize("shared", [True, False])
def test_contrast_between_two_towers_is_flagged_once_their_data_change(shared: bool) -> None:
    """The other tower's rows look like weights, but no weights change with the data."""
    model = Towers(shared=shared)
    opt = exact(model)

    def step(i: int) -> None:
        opt.zero_grad()
        opt.backward(model(randn(B, 4, seed=i), randn(B, 4, seed=i + 9)))
        opt.step()

    step(0)
    with pytest.warns(UserWarning, match=f"several of {B} examples.*across the batch"):
        step(1)
    for i in range(2, 5):
        step(i)


def test_a_gradient_that_is_not_a_number_tells_nothing() -> None:
    model = net()
    exact(model).backward(squares((model(X) * 0).sqrt(), Y))


def test_rows_of_data_that_belong_to_no_example_or_to_one_are_not() -> None:
    """Sorted data, and positions that are not as many as examples, with warnings as errors."""
    basis, order = randn(B + 1, 4), torch.tensor([3, 1, 0, 5, 4, 2])

    def back_in_order(m: Any, x: Tensor) -> Tensor:
        return m.net(x[order])[order.argsort()]

    def scaled(m: Any, x: Tensor) -> Tensor:
        return m.net(basis).sum(0) * m.net(x)

    def hyper(m: Any, x: Tensor) -> Tensor:
        return m.net(x) @ m.net(basis[:B]).T @ m.net(basis[:B])

    for forward in (back_in_order, scaled, hyper):
        model = zoo.Function(forward, net=net())
        opt = exact(model)
        for i in range(4):
            opt.zero_grad()
            opt.backward(squares(model(randn(B, 4, seed=i)), Y))
            opt.step()


def test_gradients_of_other_leaves_stay_as_they_were() -> None:
    """Inputs, and parameters of another optimizer."""
    model, x, scale = net(), X.clone().requires_grad_(), torch.ones(3, requires_grad=True)
    x.grad = kept = torch.full_like(x, 7.0)
    exact(model).backward(squares(model(x) * scale, Y))
    assert x.grad is kept
    assert bool((kept == 7).all())
    assert scale.grad is None
    assert all(p.grad is not None for p in model.parameters())


def test_gradients_zero_but_for_rounding_are_no_contradiction() -> None:
    """Softmax forgets the bias of the keys; its gradient is what rounding leaves."""
    torch.manual_seed(0)
    model = zoo.Function(
        lambda m, x: m.out(m.attention(x, x, x, need_weights=False)[0].mean(1)),
        attention=nn.MultiheadAttention(8, 2, batch_first=True), out=nn.Linear(8, 3),
    )  # fmt: skip
    for i in range(5):
        torch.manual_seed(i)
        losses = squares(model(torch.randn(16, 20, 8)), torch.randn(16, 3))
        exact(model).backward(losses)
        model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_no_contradiction(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.LayerNorm(128), nn.Linear(128, 10))
    for i in range(3):
        torch.manual_seed(i)
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(torch.randn(128, 64))
        losses = F.cross_entropy(outputs.float(), torch.randint(10, (128,)), reduction="none")
        exact(model).backward(losses)
        model.zero_grad()


BATCH_SIZES: dict[str, Callable[[PopRiskAdamW, nn.Module], Any]] = {
    "more losses": lambda o, m: o.backward(squares(m(X), Y)),
    "weight of a larger batch": lambda o, m: o.backward(squares(m(X[:3]), Y[:3]), weight=0.5),
    "parts": lambda o, m: [o.backward(squares(m(X[:3]), Y[:3]), weight=0.75) for _ in range(2)],
}


@pytest.mark.parametrize("name", BATCH_SIZES)
def test_more_examples_than_batch_size_are_refused(name: str) -> None:
    model = net()
    opt = exact(model, batch_size=4)
    with pytest.raises(ValueError, match="batch_size=4, but this step has 6 examples"):
        BATCH_SIZES[name](opt, model)


def test_more_microbatches_than_batch_size_are_refused() -> None:
    model = net()
    opt = exact(model, variance="microbatch", batch_size=5)
    squares(model(X[:3]), Y[:3]).mean().backward()
    opt.microbatch(3)
    squares(model(X[3:]), Y[3:]).mean().backward()
    with pytest.raises(ValueError, match="batch_size=5, but this step has 6 examples"):
        opt.microbatch(3)


@pytest.mark.parametrize("parts", [[6], [3, 3], [4]])
def test_as_many_examples_or_fewer_are_not(parts: list[int]) -> None:
    """A last batch is smaller; of several processes each has a part; weights may be rounded."""
    model = net()
    opt = exact(model, batch_size=6)
    for size in parts:
        opt.backward(squares(model(X[:size]), Y[:size]), weight=round(size / sum(parts), 2))
    opt.step()


@pytest.mark.parametrize(
    ("weight", "kind", "message"),
    [
        (0.0, ValueError, "positive and finite, but got 0.0"),
        (float("nan"), ValueError, "but got nan"),
        ("all", TypeError, "a number, but got str"),
        (True, TypeError, "but got bool"),
    ],
)
def test_weights(weight: Any, kind: type[Exception], message: str) -> None:
    model = net()
    with pytest.raises(kind, match=message):
        exact(model).backward(squares(model(X), Y), weight=weight)
