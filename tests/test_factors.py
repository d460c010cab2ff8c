"""Per-example gradients in factors equal the dense Jacobian, however the model is written."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from poprisk.per_sample import Factors, capture, graph, nodes
from reference import factors as reference

Params = Mapping[str, Tensor]
property_test = settings(deadline=None, max_examples=25)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Every test starts without remembered structures and said warnings."""
    graph._REMEMBERED.clear()
    graph._CONFIRMED.clear()
    nodes._SAID.clear()
    yield
    graph._REMEMBERED.clear()
    graph._CONFIRMED.clear()


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected entry."""
    expected = expected.reshape(actual.shape)
    scale = expected.abs().max().clamp(min=1e-30)
    return float((actual.double() - expected).abs().max() / scale)


def quietly(values: Tensor, params: Params) -> Factors:
    """Capture, whatever falls back."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no factored form")
        return capture(values, params)


def errors(
    values: Tensor, params: Params, others: Tensor | None = None, workspace: int = 1 << 20
) -> dict[str, float]:
    """Relative errors of all that factors give, by name."""
    one = quietly(values, params)
    two = one if others is None else quietly(others, params)
    rows = reference.jacobian(values, params)
    other_rows = rows if others is None else reference.jacobian(others, params)
    generator = torch.Generator().manual_seed(1)
    uniform = {
        name: torch.rand(p.shape, generator=generator, dtype=torch.float64)
        for name, p in params.items()
    }
    weight = {name: uniform[name].to(p.dtype.to_real()) for name, p in params.items()}
    vector = {name: uniform[name].to(p.dtype) for name, p in params.items()}
    weighted = reference.gram(rows, rows, weight)
    sums, squares = one.moments()
    b = len(values.reshape(one.examples, -1))
    found = {
        "gram": (one.gram(workspace=workspace), reference.gram(rows, rows)),
        "cross gram": (one.gram(two, workspace=workspace), reference.gram(rows, other_rows)),
        "weighted gram": (one.gram(precondition=weight, workspace=workspace), weighted),
        "weighted cross gram": (
            one.gram(two, precondition=weight, workspace=workspace),
            reference.gram(rows, other_rows, weight),
        ),
        "norms": (one.squared_norms(workspace=workspace), reference.gram(rows, rows).diag()),
        "weighted norms": (
            one.squared_norms(precondition=weight, workspace=workspace),
            weighted.diag(),
        ),
        "products": (one.products(vector), reference.products(rows, vector)),
        "sums": (flat(sums), torch.cat(list(reference.sums(rows).values()))),
        "squares": (flat(squares), torch.cat(list(reference.squares(rows).values()))),
    }
    if one.values == 1 and not any(p.is_complex() for p in params.values()):
        second = {n: squares[n] / b / (b - 1) for n in params}
        variance = flat({n: second[n] - (sums[n] / b) ** 2 / (b - 1) for n in params})
        expected = torch.cat(list(reference.variance_of_mean(rows).values()))
        # Where all gradients are equal, only the moments have a scale to compare with.
        scale = flat(second)
        found["variance of the mean"] = (variance + scale, expected + scale)
    return {name: relative(a, e) for name, (a, e) in found.items()}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All real components in one vector."""
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in tensors.values()]
    return torch.cat([t.flatten() for t in parts])


def assert_exact(values: Tensor, params: Params, others: Tensor | None = None, **kw: Any) -> None:
    """All that factors give equals the reference to 1e-10."""
    found = errors(values, params, others, **kw)
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("name", zoo.ZOO)
def test_equals_the_dense_jacobian(name: str) -> None:
    model, case = zoo.make(name), zoo.ZOO[name]
    params = zoo.trainable(model)
    for b, c in ((4, 4), (2, 5)):
        assert_exact(model(*case.inputs(b)), params, model(*case.inputs(c)))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_known_structures_stay_exact_on_other_data(name: str) -> None:
    model, case = zoo.make(name), zoo.ZOO[name]
    params = zoo.trainable(model)
    for _ in range(graph.TRUSTED + 1):
        values = model(*case.inputs(4))
        rows = reference.jacobian(values, params)
        found = quietly(values, params).gram()
        assert relative(found, reference.gram(rows, rows)) < 1e-10
        assert not found.requires_grad


@pytest.mark.parametrize("name", ["MLP on positions", "causal transformer, tied", "Conv2d"])
def test_small_workspaces_change_nothing(name: str) -> None:
    model, case = zoo.make(name), zoo.ZOO[name]
    values, others = model(*case.inputs(3)), model(*case.inputs(4))
    for workspace in (1, 100, 3000):
        assert_exact(values, zoo.trainable(model), others, workspace=workspace)


@pytest.mark.parametrize("name", ["parameter used twice", "Embedding with padding", "LSTM"])
@pytest.mark.parametrize("workspace", [1, 50])
def test_terms_of_several_kinds_are_cut_alike(name: str, workspace: int) -> None:
    model, case = zoo.make(name), zoo.ZOO[name]
    values, others = model(*case.inputs(3)), model(*case.inputs(4))
    assert_exact(values, zoo.trainable(model), others, workspace=workspace)


def test_one_parameter_in_matrices_of_two_shapes() -> None:
    w = zoo.param(2, 12)
    x, y, z = (torch.randn(n, c, dtype=torch.float64) for n, c in ((3, 12), (3, 4), (3, 6)))
    values = (
        torch.tanh(x @ w.T).sum(1)
        + torch.tanh(y @ w.view(4, 6)).sum(1)
        + torch.tanh(z @ w.view(4, 6).T).sum(1)
    )
    for workspace in (1, 20, 1000):
        assert_exact(values, {"w": w}, workspace=workspace)


def labels(z: Tensor) -> Tensor:
    return torch.arange(len(z)) % z.shape[1]


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "squared error": lambda z: F.mse_loss(z, z.detach().cos(), reduction="none").mean(1),
    "cross-entropy": lambda z: F.cross_entropy(z, labels(z), reduction="none"),
    "binary cross-entropy": lambda z: F.binary_cross_entropy(
        z.sigmoid(), (z > 0).to(z), reduction="none"
    ).mean(1),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["MLP", "residual CNN", "ViT, time first", "LSTM, time first"])
def test_losses_of_single_examples(name: str, loss: str) -> None:
    model, case = zoo.make(name), zoo.ZOO[name]
    first, second = (LOSSES[loss](model(*case.inputs(b))) for b in (4, 3))
    assert_exact(first, zoo.trainable(model), second)


def test_agrees_with_one_example_at_a_time() -> None:
    model = zoo.make("residual CNN")
    (x,) = zoo.ZOO["residual CNN"].inputs(3)
    params = zoo.trainable(model)
    alone = [reference.jacobian(model(x[i : i + 1]), params) for i in range(3)]
    rows = {name: torch.cat([a[name] for a in alone]) for name in params}
    assert relative(capture(model(x), params).gram(), reference.gram(rows, rows)) < 1e-10


# --- Where the examples lie -------------------------------------------------------------------


def layered(pick: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Params]]:
    """Values of a fixed two-layer model, read out by ``pick`` from (4, 4, 4)."""
    torch.manual_seed(5)
    params = {"w": zoo.param(4, 4), "v": zoo.param(4, 4), "b": zoo.param(4)}

    def run(x: Tensor) -> tuple[Tensor, Params]:
        h = torch.tanh(x @ params["w"] + params["b"])
        return pick(h) @ params["v"], params

    return run


ARANGE = torch.arange(4)
ENDS = ARANGE.flip(0)[None]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "select the last, batch first": lambda h: h[:, -1],
    "select the last, time first": lambda h: h[-1],
    "mean, batch first": lambda h: h.mean(1),
    "mean, time first": lambda h: h.mean(0),
    "mean, channel as time": lambda h: h.mean(2),
    "largest, batch first": lambda h: h.max(1).values,
    "largest, time first": lambda h: h.max(0).values,
    "index, batch first": lambda h: h[ARANGE, ARANGE.flip(0)],
    "index, time first": lambda h: h[ARANGE.flip(0), ARANGE],
    "diagonal": lambda h: h[ARANGE, ARANGE],
    "einsum, batch first": lambda h: torch.einsum("btc->bc", h),
    "einsum, time first": lambda h: torch.einsum("tbc->bc", h),
    "flat, batch first": lambda h: h.reshape(16, 4).reshape(4, 4, 4)[:, 1],
    "flat, time first": lambda h: h.reshape(16, 4).reshape(4, 4, 4)[1],
    "unbind, time first": lambda h: h.unbind(0)[2],
    "unbind, batch first": lambda h: h.unbind(1)[2],
    "cumulative, batch first": lambda h: h.cumsum(1)[:, 2],
    "cumulative, time first": lambda h: h.cumsum(0)[2],
    "gather, batch first": lambda h: h.gather(1, ENDS.mT[:, :, None].expand(4, 1, 4))[:, 0],
    "gather, time first": lambda h: h.gather(0, ENDS[:, :, None].expand(1, 4, 4))[0],
    "product of times": lambda h: h.mT @ torch.ones(4, dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("warm", [0, 3])
def test_equal_shapes_with_different_layouts_are_told_apart(warm: int) -> None:
    """Batch, time and channel have one size; structures known from others must not be taken."""
    for pick in LAYOUTS.values():
        run = layered(pick)
        for _ in range(warm + 1):
            values, params = run(torch.randn(4, 4, 4, dtype=torch.float64))
            rows = reference.jacobian(values, params)
            found = quietly(values, params).gram()
            assert relative(found, reference.gram(rows, rows)) < 1e-10


@pytest.mark.parametrize("examples", [2, 3, 4, 5])
def test_ends_of_sequences_that_look_like_examples(examples: int) -> None:
    """With as many steps as examples, the last steps may single out the wrong dimension."""
    torch.manual_seed(0)
    w = zoo.param(3, 3)
    for _ in range(30):
        ends = torch.randint(examples, (examples,))
        x = torch.randn(examples, examples, 3, dtype=torch.float64)
        values = torch.tanh(x @ w)[ends, torch.arange(examples)]
        rows = reference.jacobian(values, {"w": w})
        found = quietly(values, {"w": w}).gram()
        assert relative(found, reference.gram(rows, rows)) < 1e-10


def test_masks_that_look_like_examples_at_first() -> None:
    """Step t of example t for some batches, by which time and batch cannot be told apart."""
    torch.manual_seed(0)
    w = zoo.param(3, 3)
    for i in range(12):
        ends = ARANGE if i < 2 * graph.TRUSTED else torch.randperm(4)
        h = torch.tanh(torch.randn(4, 4, 3, dtype=torch.float64) @ w)
        values = (h * F.one_hot(ends, 4).T[:, :, None]).sum(0)
        rows = reference.jacobian(values, {"w": w})
        assert relative(quietly(values, {"w": w}).gram(), reference.gram(rows, rows)) < 1e-10


def test_units_at_rest_that_look_like_examples_at_first() -> None:
    """Where only step t of example t is active, time and batch cannot be told apart."""
    torch.manual_seed(0)
    w = zoo.param(3, 3)
    with torch.no_grad():
        w.abs_()
    active = torch.eye(4, dtype=torch.bool)[:, :, None]
    for i in range(12):
        x = torch.rand(4, 4, 3, dtype=torch.float64) + 0.1
        if i < 2 * graph.TRUSTED:
            x = torch.where(active, x, -x)
        values = torch.relu(x @ w).sum(0)
        rows = reference.jacobian(values, {"w": w})
        assert relative(quietly(values, {"w": w}).gram(), reference.gram(rows, rows)) < 1e-10
    assert not any(known.by_data for known in graph._REMEMBERED.values())


@pytest.mark.parametrize("fresh", [False, True])
def test_permuted_examples(fresh: bool) -> None:
    torch.manual_seed(0)
    w, v = zoo.param(3, 3), zoo.param(3, 3)
    for order in map(torch.tensor, itertools.permutations(range(4))):
        if fresh:
            graph._REMEMBERED.clear()
            graph._CONFIRMED.clear()
        h = torch.tanh(torch.randn(4, 3, dtype=torch.float64)[order] @ w) @ v
        values = torch.sin(h)[order.argsort()]
        rows = reference.jacobian(values, {"w": w, "v": v})
        found = quietly(values, {"w": w, "v": v}).gram()
        assert relative(found, reference.gram(rows, rows)) < 1e-10


@pytest.mark.parametrize("examples", [2, 3, 4, 6, 7, 20, 21, 64])
def test_groups_separate_any_two_examples(examples: int) -> None:
    groups = graph._groups(examples)
    for i in range(examples):
        for j in range(examples):
            assert i == j or bool((groups[:, i] & ~groups[:, j]).any())


def test_a_known_structure_takes_no_pass_for_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make("causal transformer, tied")
    case = zoo.ZOO["causal transformer, tied"]
    params = zoo.trainable(model)
    for _ in range(graph.TRUSTED):
        capture(model(*case.inputs(4)), params)
    monkeypatch.setattr(graph, "_find_layouts", None)
    assert_exact(model(*case.inputs(4)), params)


def test_values_that_are_views_or_leaves() -> None:
    own = zoo.param(4, 3)
    assert_exact(own, {"own": own})
    assert_exact(own[:, 0], {"own": own})
    model = nn.Linear(3, 4).double()
    both = model(torch.randn(5, 3, dtype=torch.float64)).split(2, dim=1)
    for values in both:
        assert_exact(values, dict(model.named_parameters()))


def test_outputs_of_one_function_are_told_apart() -> None:
    w = zoo.param(4)
    for output in (0, 1, 0, 1):
        x = torch.randn(4, 4, dtype=torch.float64)
        assert_exact(zoo.Scale.apply(x, 2, w)[output], {"w": w})


TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda a, b: a @ b,
    "scaled": lambda a, b: (a @ b) * 0.5,
    "normalized": lambda a, b: F.layer_norm(a @ b, (3,)),
    "activated": lambda a, b: F.gelu(a @ b),
    "of fixed inputs": lambda a, b: torch.eye(4).double()[:, :2] @ b + a.sum(),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_computed_from_parameters(table: str) -> None:
    """Rows that single examples look up look like rows that belong to these."""
    a, b = zoo.param(4, 2), zoo.param(2, 3)
    for order in (*[ARANGE] * graph.TRUSTED, ARANGE.roll(1), ARANGE.flip(0)):
        x = torch.randn(4, 3, dtype=torch.float64)
        values = (F.embedding(order, TABLES[table](a, b)) * x).sum(1)
        assert_exact(values, {"a": a, "b": b})


def test_a_product_of_parameters_met_by_one_hot_inputs() -> None:
    """Nothing but the data tells that a row of the product belongs to no example."""
    a, b = zoo.param(4, 2), zoo.param(2, 3)
    for order in (*[ARANGE] * graph.TRUSTED, ARANGE.roll(1), ARANGE.flip(0)):
        values = torch.sin(F.one_hot(order, 4).double() @ (a @ b)).sum(1)
        assert_exact(values, {"a": a, "b": b})
        assert not any(known.by_data for known in graph._REMEMBERED.values())


BACK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda h, p: h[p.argsort()],
    "index_select": lambda h, p: h.index_select(0, p.argsort()),
    "index_put": lambda h, p: torch.zeros_like(h).index_put((p,), h),
    "index_copy": lambda h, p: torch.zeros_like(h).index_copy(0, p, h),
    "index_add": lambda h, p: torch.zeros_like(h).index_add(0, p, h),
    "scatter": lambda h, p: torch.zeros_like(h).scatter(0, p[:, None].expand(4, 4), h),
    "gather": lambda h, p: h.gather(0, p.argsort()[:, None].expand(4, 4)),
    "take": lambda h, p: h.take(p.argsort()[:, None] * 4 + ARANGE),
    "embedding": lambda h, p: F.embedding(p.argsort(), h),
}


@pytest.mark.parametrize("back", BACK)
def test_examples_put_back_in_order(back: str) -> None:
    """Identities first, until the structure is known, then other permutations."""
    w = zoo.param(4, 4)
    for order in (*[ARANGE] * graph.TRUSTED, ARANGE.roll(1), ARANGE.flip(0), ARANGE):
        h = torch.randn(4, 4, dtype=torch.float64)[order] @ w
        assert_exact(torch.sin(BACK[back](torch.tanh(h), order)), {"w": w})


def test_factors_meet_formed_gradients() -> None:
    """One set of examples in factors, another with a term more, and one that is formed."""
    w = zoo.param(6, 6)
    short, long = (torch.randn(3, n, 6, dtype=torch.float64) for n in (1, 50))
    values = [torch.tanh(x @ w).sum((1, 2)) for x in (short, long)]
    values.append(values[0] + torch.atan2(short[:, 0], w[0]).sum(1))
    for first in values:
        for second in values:
            assert_exact(first, {"w": w}, second)


def test_fallback_is_through_one_operation_alone() -> None:
    """Both operations use the parameter itself, the second one after the first."""
    w = zoo.param(4)
    x = torch.randn(3, 4, dtype=torch.float64)
    first = torch.addcmul(x, x, w)
    assert_exact(torch.addcmul(first, first, w), {"w": w})


# --- Contexts and dtypes ----------------------------------------------------------------------


def test_under_no_grad_of_the_caller() -> None:
    model = zoo.make("Conv2d")
    values = model(*zoo.ZOO["Conv2d"].inputs(3))
    expected = capture(values, zoo.trainable(model)).gram()
    with torch.no_grad():
        assert torch.equal(capture(values, zoo.trainable(model)).gram(), expected)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["MLP", "residual CNN", "causal transformer, tied", "LSTM", "PReLU", "weight_norm"]
)
def test_single_precision(name: str) -> None:
    model, case = zoo.make(name).float(), zoo.ZOO[name]
    inputs = [x.float() if x.is_floating_point() else x for x in case.inputs(4)]
    assert max(errors(model(*inputs), zoo.trainable(model)).values()) < 2e-5


@pytest.mark.parametrize("name", ["MLP", "residual CNN", "causal transformer, tied"])
def test_autocast(name: str) -> None:
    model, case = zoo.make(name).float(), zoo.ZOO[name]
    inputs = [x.float() if x.is_floating_point() else x for x in case.inputs(4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = model(*inputs)
    assert max(errors(values, zoo.trainable(model)).values()) < 0.05


def test_parameters_of_no_effect_have_gradient_zero() -> None:
    model = zoo.make("unused parameters")
    params = zoo.trainable(model)
    sums, squares = capture(model(*zoo.ZOO["unused parameters"].inputs(3)), params).moments()
    assert not sums["unused.weight"].any()
    assert not squares["unused.weight"].any()
    constant = torch.ones(3, 2, dtype=torch.float64)
    assert not capture(constant, params).gram().any()


# --- Fallback ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in zoo.ZOO.items() if case.fallback])
def test_fallback_is_said_once_and_names_operation_and_parameters(name: str) -> None:
    model, case = zoo.make(name), zoo.ZOO[name]
    params = zoo.trainable(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        capture(model(*case.inputs(4)), params)
        capture(model(*case.inputs(4)), params)
    texts = [str(w.message) for w in said]
    assert sorted(t.split()[4].rstrip(",") for t in texts) == sorted(case.fallback)
    assert all(any(p in text for p in params) for text in texts)


@pytest.mark.parametrize("name", [name for name, case in zoo.ZOO.items() if not case.fallback])
def test_no_fallback_where_none_is_needed(name: str) -> None:
    model, case = zoo.make(name), zoo.ZOO[name]
    capture(model(*case.inputs(4)), zoo.trainable(model))


# --- Properties over shapes -------------------------------------------------------------------

sizes = st.integers(1, 4)
BATCH_NORMS: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(layer: nn.Module, seed: int) -> nn.Module:
    for i, p in enumerate(layer.double().parameters()):
        p.data = normal(seed + i, *p.shape)
    return layer


@property_test
@given(st.data())
def test_linear_of_any_shape(data: st.DataObject) -> None:
    b, rows, out = data.draw(st.integers(2, 5)), data.draw(sizes), data.draw(sizes)
    leading = data.draw(st.lists(sizes, max_size=2))
    layer = double(nn.Linear(rows, out, bias=data.draw(st.booleans())), 1)
    values = torch.tanh(layer(normal(2, b, *leading, rows))).flatten(1)
    if data.draw(st.booleans()):
        values = values.sum(1)
    assert_exact(values, dict(layer.named_parameters()), workspace=data.draw(st.integers(1, 300)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")  # once a process, of torch
@property_test
@given(st.data())
def test_convolution_of_any_shape(data: st.DataObject) -> None:
    d = data.draw(st.integers(1, 3))
    groups, per_group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    kernel = data.draw(st.lists(st.integers(1, 3), min_size=d, max_size=d))
    dilation = data.draw(st.lists(st.integers(1, 2), min_size=d, max_size=d))
    mode = data.draw(st.sampled_from(["zeros", "replicate", "circular"]))
    padding: Any = data.draw(
        st.one_of(st.just("same"), st.lists(st.integers(0, 1), min_size=d, max_size=d))
    )
    stride = (
        [1] * d
        if padding == "same"
        else data.draw(st.lists(st.integers(1, 2), min_size=d, max_size=d))
    )
    make: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
    layer = double(
        make(
            groups * per_group, groups * data.draw(st.integers(1, 2)), kernel, stride=stride,
            padding=padding, dilation=dilation, groups=groups, padding_mode=mode,
            bias=data.draw(st.booleans()),
        ),
        1,
    )  # fmt: skip
    space = [
        g * (n - 1) + 1 + data.draw(st.integers(0, 2))
        for n, g in zip(kernel, dilation, strict=True)
    ]
    b = data.draw(st.integers(2, 4))
    values = torch.tanh(layer(normal(2, b, groups * per_group, *space))).flatten(1)
    values = values.sum(1) if data.draw(st.booleans()) else values[:, :5]
    assert_exact(values, dict(layer.named_parameters()), workspace=data.draw(st.integers(1, 300)))


@property_test
@given(st.data())
def test_embedding_of_any_shape(data: st.DataObject) -> None:
    size, width, b = data.draw(st.integers(1, 5)), data.draw(sizes), data.draw(st.integers(2, 5))
    padding = data.draw(st.one_of(st.none(), st.integers(-size, size - 1)))
    layer = double(nn.Embedding(size, width, padding_idx=padding), 1)
    shape = (b, *data.draw(st.lists(sizes, max_size=2)))
    count = torch.Size(shape).numel()
    indices = torch.tensor(
        data.draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count))
    )
    values = torch.tanh(layer(indices.reshape(shape)) * normal(3, *shape, width)).flatten(1)
    values = values.sum(1) if data.draw(st.booleans()) else values[:, :4]
    assert_exact(values, dict(layer.named_parameters()), workspace=data.draw(st.integers(1, 300)))


@property_test
@given(st.data())
def test_norms_of_any_shape(data: st.DataObject) -> None:
    b, groups, c = (
        data.draw(st.integers(2, 5)),
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 2)),
    )
    channels, space = groups * c, data.draw(st.lists(st.integers(1, 3), max_size=2))
    x = normal(2, b, channels, *space, 2)
    kind = data.draw(st.sampled_from(["layer", "rms", "group", "batch"]))
    last = data.draw(st.integers(1, x.ndim - 1))
    layer = double(
        {
            "layer": lambda: nn.LayerNorm(x.shape[-last:], bias=data.draw(st.booleans())),
            "rms": lambda: nn.RMSNorm(x.shape[-last:]),
            "group": lambda: nn.GroupNorm(groups, channels),
            "batch": lambda: BATCH_NORMS[x.ndim - 3](channels).eval(),
        }[kind](),
        1,
    )  # fmt: skip
    values = torch.tanh(layer(x)).flatten(1)
    values = values.sum(1) if data.draw(st.booleans()) else values[:, :5]
    assert_exact(values, dict(layer.named_parameters()))


def test_a_batch_that_is_not_a_number_spoils_nothing_for_those_after_it() -> None:
    """Layouts are remembered for graphs of equal structure; NaN tells nothing of them."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 2)).double()
    params = dict(model.named_parameters())

    def losses(x: Tensor) -> Tensor:
        return model(x).square().mean(1)

    x = torch.randn(7, 3, dtype=torch.float64)
    for bad in (float("nan"), 1e200):  # the loss itself, and what comes back from a finite one
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            capture(losses(x * bad), params).moments()
        nodes._SAID.clear()
        found = capture(losses(x), params).moments()  # a warning would be an error
        rows = [
            torch.autograd.grad(losses(x[i : i + 1]).sum(), list(params.values())) for i in range(7)
        ]
        for j, name in enumerate(params):
            torch.testing.assert_close(found.squares[name], sum(r[j] ** 2 for r in rows))
