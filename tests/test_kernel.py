"""The empirical tangent kernel equals the dense Jacobian's; what it cannot do it refuses."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import zoo
from asserts import assert_bitwise
from poprisk.linalg import top_eigenpairs
from poprisk.ntk import Kernel, entk
from poprisk.per_sample import graph, nodes
from poprisk.per_sample.plan import Plan
from reference import factors as reference
from samplers import randn

N, M = 9, 4
TIME_FIRST = ("ViT, time first", "RNN, time first", "LSTM, time first", "last valid step")
MODELS = (
    "MLP", "deep residual MLP", "LeNet", "residual CNN", "Conv1d", "BatchNorm in eval mode", "ViT",
    "causal transformer, tied", "self-attention", "RNN", "GRU", "packed sequences", "SIREN",
    "parameter used twice", "frozen parameters", "shared modules", "weight_norm", "EmbeddingBag",
    "custom autograd.Function", "complex parameters", "shuffled examples", "unused parameters",
    "checkpoint", "0-d parameters", "RNN, time first", "last valid step",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Every test starts without remembered structures; falling back is not news here."""
    graph._REMEMBERED.clear()
    graph._CONFIRMED.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no factored form")
        yield
    nodes._SAID.clear()


class ExamplesFirst(nn.Module):
    """A model of (steps, b, features), given (b, steps, features)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.transpose(0, 1))


def case(name: str, n: int = N, m: int = M) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of the zoo with training and query inputs, examples first."""
    model = zoo.make(name)
    (x,), (q,) = zoo.ZOO[name].inputs(n), zoo.ZOO[name].inputs(m)
    if "time first" in name or name in TIME_FIRST:
        return ExamplesFirst(model), x.transpose(0, 1), q.transpose(0, 1)
    return model, x, q


def mlp(*sizes: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Linear layers with tanh in between."""
    torch.manual_seed(sum(sizes))
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def dense(
    model: nn.Module, x: Any, y: Any = None, weight: Any = None, params: Any = None
) -> Tensor:
    """K from the dense Jacobian; inputs as arguments of one call."""
    chosen = params or zoo.trainable(model)

    def rows(inputs: Any) -> dict[str, Tensor]:
        return reference.jacobian(
            model(*inputs if isinstance(inputs, tuple) else (inputs,)), chosen
        )

    left = rows(x)
    return reference.gram(left, left if y is None else rows(y), weight)


def square_and_cross(model: nn.Module, x: Any, q: Any) -> tuple[Tensor, Tensor]:
    """K of the inputs x, and of the inputs q with them."""
    params = zoo.trainable(model)
    left, right = (reference.jacobian(model(z), params) for z in (x, q))
    return reference.gram(left, left), reference.gram(right, left)


def assert_equal(actual: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    """Entries agree to ``tol`` of the largest one."""
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).abs().max()) <= tol * float(expected.abs().max())


def blocks_of(kernel: Kernel) -> int:
    kernel.dense()
    return len(kernel._blocks)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_jacobian(name: str) -> None:
    """K_SS and K_QS, formed and as products, of all outputs, their sum and their trace."""
    model, x, q = case(name)
    before = {key: (id(p), p.detach().clone()) for key, p in model.named_parameters()}
    square, cross = square_and_cross(model, x, q)
    c = len(square) // N
    vectors = randn(N * c, 2, seed=3)
    kss, kqs = entk(model, x), entk(model, q, x)
    assert kss.shape == square.shape
    assert kss.symmetric
    assert kqs.shape == cross.shape
    assert not kqs.symmetric
    assert_equal(kss.diagonal(), square.diagonal())
    for kernel, expected in ((kss, square), (kqs, cross)):
        assert_equal(kernel @ vectors, expected @ vectors)
        assert_equal(kernel.dense(), expected)
        assert_equal(kernel.matmul(vectors[:, 0]), expected @ vectors[:, 0])
    table = cross.view(M, c, N, c)
    for outputs, expected in (
        ("sum", table.sum((1, 3))),
        ("trace", table.diagonal(0, 1, 3).sum(-1)),
    ):
        kernel = entk(model, q, x, outputs=outputs)
        assert_equal(kernel @ vectors[:N], expected @ vectors[:N])
        assert_equal(kernel.dense(), expected)
    for key, p in model.named_parameters():
        assert id(p) == before[key][0]
        assert torch.equal(p, before[key][1])
        assert p.grad is None


@pytest.mark.parametrize("name", ["MLP", "residual CNN", "causal transformer, tied"])
def test_preconditions_and_parameters(name: str) -> None:
    model, x, q = case(name)
    params = zoo.trainable(model)
    weight = {key: randn(*p.shape, seed=i) for i, (key, p) in enumerate(params.items())}
    expected = dense(model, q, x, weight)
    vectors = randn(expected.shape[1], 2)
    for m in (weight, list(weight.values()), {**weight, "of no parameter": randn(2)}):
        kernel = entk(model, q, x, precondition=m)
        assert_equal(kernel @ vectors, expected @ vectors)
        assert_equal(kernel.dense(), expected)
    symmetric = entk(model, x, precondition=weight)
    assert_equal(symmetric.diagonal(), dense(model, x, weight=weight).diagonal())
    names = list(params)[::-2]
    some = {key: params[key] for key in names}
    ordered = [weight[key] for key in names]
    expected = dense(model, x, weight=weight, params=some)

    def is_chosen(name: str, p: Tensor) -> bool:
        return name in some

    for chosen in (names, is_chosen):
        assert_equal(entk(model, x, params=chosen).dense(), dense(model, x, params=some))
    assert_equal(entk(model, x, params=names, precondition=ordered).dense(), expected)


def test_positions_of_outputs_come_in_the_order_asked_for() -> None:
    model, x, _ = case("MLP")
    rows = dense(model, x).view(N, 3, N, 3)
    kernel = entk(model, x, outputs=[2, 0])
    assert_equal(kernel.dense(), rows[:, [2, 0]][..., [2, 0]].reshape(2 * N, 2 * N))
    assert_equal(kernel.diagonal(), kernel.dense().diagonal())


class Two(nn.Module):
    """Two inputs, by position or name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(5, 4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.body(torch.cat([a, b.sin()], dim=1))


def test_inputs_of_every_form() -> None:
    model, a, b = Two(), randn(N, 3), randn(N, 2, seed=1)
    expected = dense(model, (a, b))
    for x in ((a, b), {"b": b, "a": a}, [{"a": a[:4], "b": b[:4]}, {"a": a[4:], "b": b[4:]}]):
        assert_equal(entk(model, x).dense(), expected)
    plain = mlp(3, 4, 2)
    data: Any = [(row, 0) for row in a]
    for x in (a, [a[:5], a[5:]], [(a[:5], b[:5]), (a[5:], b[5:])], DataLoader(data, batch_size=4)):
        assert_equal(entk(plain, x).dense(), dense(plain, a))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", ["MLP", "causal transformer, tied", "RNN"])
def test_few_examples(name: str, n: int) -> None:
    model, x, q = case(name, n, 1)
    assert_equal(entk(model, x).dense(), dense(model, x))
    kernel, expected = entk(model, q, x), dense(model, q, x)
    assert_equal(kernel @ torch.ones(expected.shape[1], dtype=torch.float64), expected.sum(1))
    assert_equal(kernel.dense(), expected)
    assert_equal(entk(model, x).diagonal(), dense(model, x).diagonal())


def test_one_value_without_a_dimension() -> None:
    model = zoo.Function(lambda m, x: (x @ m.w).sin(), w=zoo.param(3))
    assert_equal(entk(model, randn(5, 3)).dense(), dense(model, randn(5, 3)))


@pytest.mark.parametrize("outputs", ["all", "trace", [1]])
@pytest.mark.parametrize("name", ["MLP", "residual CNN", "causal transformer, tied"])
def test_many_blocks_are_one_block(name: str, outputs: Any) -> None:
    model, x, q = case(name, 23, 11)
    if name.startswith("causal") and outputs == [1]:
        outputs = [0]
    budget = 500_000
    if name == "MLP":
        budget = 85_000 if outputs == "all" else 30_000
    for args in ((x,), (q, x)):
        whole = entk(model, *args, outputs=outputs)
        small = entk(model, *args, outputs=outputs, max_memory=budget)
        vector = randn(whole.shape[1])
        product = small @ vector
        assert blocks_of(whole) == 1
        assert blocks_of(small) > 1
        assert_equal(small.dense(), whole.dense())
        assert_equal(product, whole.dense() @ vector)
        assert_equal(small @ vector, product)
        if small.symmetric:
            assert_equal(small.diagonal(), whole.dense().diagonal())


def test_float32_is_as_accurate_as_its_rounding() -> None:
    for name in ("MLP", "residual CNN", "ViT"):
        model, x, q = case(name)
        exact = dense(model, q, x)
        kernel = entk(model.float(), q.float(), x.float())
        vector = randn(exact.shape[1])
        assert kernel.dense().dtype == torch.float32
        assert_equal(kernel.dense(), exact, 1e-5)
        assert_equal(entk(model, q.float(), x.float()) @ vector.float(), exact @ vector, 1e-5)


def test_products_stop_where_gradients_stop() -> None:
    """Forward mode passes ``torch.no_grad`` in a model, and would give another kernel."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        with torch.no_grad():
            size = h.abs().sum(1, keepdim=True)
        return m.expert(h / size + (h.round() - h).detach())

    model = zoo.two_layers(forward)().double()
    x = randn(6, 4)
    expected = dense(model, x)
    assert_equal(entk(model, x) @ expected, expected @ expected)


def test_works_without_gradients_enabled() -> None:
    model, x, _ = case("MLP")
    expected = dense(model, x)
    with torch.no_grad():
        assert_equal(entk(model, x).dense(), expected)
        assert_equal(entk(model, x) @ expected, expected @ expected)


def test_traces() -> None:
    """The estimate lies as far from the exact trace as its standard error says."""
    model, x, _ = case("MLP")
    kernel, exact = entk(model, x), float(dense(model, x).trace())
    assert kernel.trace()[:4] == (pytest.approx(exact, rel=1e-12), 0.0, True, "")
    kernel.dense()
    found = [kernel.trace(16, seed=seed) for seed in range(200)]
    assert kernel.trace(16, seed=0) == found[0]
    scores = torch.tensor([(e.value - exact) / e.standard_error for e in found])
    assert abs(float(scores.mean())) < 0.3
    assert 0.8 < float(scores.std()) < 1.4
    values = torch.tensor([e.value for e in found])
    errors = torch.tensor([e.standard_error for e in found])
    assert float(values.std()) == pytest.approx(float(errors.square().mean().sqrt()), rel=0.15)


@pytest.mark.parametrize("formed", [False, True])
def test_eigenpairs(formed: bool) -> None:
    model, x, _ = case("MLP", 12)
    matrix = dense(model, x)
    kernel = entk(model, x)
    if formed:
        kernel.dense()
    found = kernel.eigsh(5, tolerance=1e-9, seed=0)
    assert_equal(found.values, torch.linalg.eigvalsh(matrix).flip(0)[:5])
    assert_equal(found.vectors.T @ found.vectors, torch.eye(5, dtype=torch.float64))
    residuals = torch.linalg.vector_norm(
        matrix @ found.vectors - found.vectors * found.values, dim=0
    )
    torch.testing.assert_close(residuals, found.residuals, rtol=1e-3, atol=1e-11)
    assert float(residuals.max()) <= 1e-9 * float(found.values[0])


def test_multiple_eigenvalues_are_all_found() -> None:
    """A linear layer's kernel is X Xᵀ ⊗ I: every eigenvalue as often as there are outputs."""
    model, x = nn.Linear(3, 4, bias=False).double(), randn(10, 3)
    expected = torch.linalg.eigvalsh(x.T @ x).flip(0).repeat_interleave(4)
    found = entk(model, x).eigsh(14, tolerance=1e-10)
    assert_equal(found.values[:12], expected)
    assert float(found.values[12:].abs().max()) < 1e-10
    assert_equal(entk(model, x).eigsh(3).values, expected[:3])


@pytest.mark.parametrize("k", [1, 4, 30])
def test_eigenpairs_of_spread_and_negative_spectra(k: int) -> None:
    q = torch.linalg.qr(randn(30, 30)).Q
    values = torch.cat([torch.logspace(3, -9, 20), -torch.ones(5), torch.zeros(5)]).double()
    matrix = (q * values) @ q.T
    columns = []

    def product(vectors: Tensor) -> Tensor:
        columns.append(vectors.shape[1])
        return matrix @ vectors

    start = randn(30, min(k + 2, 30), seed=5)
    found = top_eigenpairs(product, start, k, tolerance=1e-8, max_products=200)
    assert_equal(found.values, values.sort(descending=True).values[:k], 1e-10)
    assert sum(columns) <= 30


class Uses:
    """Counts how often a plan was taken and refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[tuple[int, bool]] = []
        original = Plan.uses_in

        def uses_in(plan: Plan, graph: Any, values: Tensor) -> Any:
            found = original(plan, graph, values)
            self.taken.append((len(values), found is not None))
            return found

        monkeypatch.setattr(Plan, "uses_in", uses_in)


@pytest.mark.parametrize("name", ["MLP", "residual CNN", "causal transformer, tied", "LSTM"])
@pytest.mark.parametrize("n", [8, 24])
def test_what_four_examples_taught_holds_for_more(
    name: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, _ = case(name, n)
    uses = Uses(monkeypatch)
    assert_equal(entk(model, x).dense(), dense(model, x))
    assert (n, True) in uses.taken


@pytest.mark.parametrize("n", [8, 16])
@pytest.mark.parametrize("steps", [4, 8, 16])
def test_as_many_steps_as_examples(steps: int, n: int) -> None:
    """(b, t) may be read as (t, b) in a square batch."""
    for model in (
        zoo.two_layers(zoo.positions_as_examples)().double(),
        zoo.two_layers(lambda m, x: m.expert(m.first(x.transpose(0, 1)).tanh()).cumsum(0)[-1])(),
    ):
        x = randn(n, steps, 4)
        assert_equal(entk(model.double(), x).dense(), dense(model, x))


def rolled(h: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    shift = 0 if len(h) <= 4 else 1
    return h.roll(shift, 0), lambda y: y.roll(-shift, 0)


def interleaved(h: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    order = torch.arange(len(h)).view(max(1, len(h) // 4), -1).T.flatten()
    return h.index_select(0, order), lambda y: y.index_select(0, order.argsort())


def grouped(h: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    n, kept = max(1, len(h) // 4), torch.contiguous_format

    def swap(y: Tensor, a: int) -> Tensor:
        turned = y.unflatten(0, (a, len(y) // a)).transpose(0, 1)
        return turned.clone(memory_format=kept).flatten(0, 1)

    return swap(h, n), lambda y: swap(y, len(y) // n)


@pytest.mark.parametrize("rearrange", [rolled, interleaved, grouped])
@pytest.mark.parametrize("n", [8, 16])
def test_a_structure_that_changes_with_the_batch_is_searched_again(
    rearrange: Any, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order for four examples, rearranged for more, by the same operations."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h, back = rearrange(torch.tanh(m.first(x)))
        return back(torch.tanh(m.expert(h)))

    model, x = zoo.two_layers(forward)().double(), randn(n, 4)
    uses = Uses(monkeypatch)
    assert_equal(entk(model, x).dense(), dense(model, x))
    assert (n, True) not in uses.taken


MEMORY = """
import re, torch
from pathlib import Path
from torch import nn
from poprisk.ntk import entk
torch.set_num_threads(1)
def peak():  # KiB of this program; ru_maxrss begins with what its parent had
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
layers = nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
model = nn.Sequential(*layers)
x = torch.randn(400, 256)
entk(model, x[:20]).dense()
before = peak()
for budget in (128, 256):
    entk(model, x, max_memory=budget << 20).dense()
    print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_stays_within_the_budget() -> None:
    """A 4000 × 4000 kernel in float32 is 61 MiB; a tenth is for what the allocator keeps.

    In an interpreter of its own: a forked one counts what it shares once it touches it. The peak
    of the smaller budget comes first, since a peak never falls.
    """
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = (int(line) / 1024 for line in done.stdout.split())
    assert 61 < small < 1.1 * 128
    assert large < 1.1 * 256


LINEAR = nn.Linear(3, 2).double()
X = randn(9, 3)


class Mixing(nn.Module):
    """Outputs that depend on other examples."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.mix(x))


def frozen() -> nn.Module:
    return nn.Linear(3, 2).double().requires_grad_(False)


def half_meta() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2).double(), nn.Linear(2, 2, device="meta"))


def returning(function: Callable[[Tensor], Any]) -> nn.Module:
    return zoo.Function(lambda m, x: function(m.layer(x)), layer=nn.Linear(3, 2).double())


def no_grad_model() -> nn.Module:
    return zoo.Function(torch.no_grad()(lambda m, x: m.layer(x)), layer=nn.Linear(3, 2).double())


def with_nan(position: int) -> Tensor:
    x = X.clone()
    x[position, 1] = float("nan")
    return x


def shuffling() -> DataLoader[Any]:
    data: Any = [(row, 0) for row in randn(50, 3)]
    return DataLoader(data, batch_size=5, shuffle=True)


def weights(*shapes: tuple[int, ...], **options: Any) -> list[Tensor]:
    kind: Any = {"dtype": torch.float64, **options}
    return [torch.ones(shape, **kind) for shape in shapes]


ERRORS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "empty batch": (
        ValueError,
        "x1 holds no example: .*shape \\(0, 3\\)",
        lambda: entk(LINEAR, X[:0]),
    ),
    "no batch": (ValueError, "x2 holds no example", lambda: entk(LINEAR, X, [])),
    "number": (ValueError, "shape \\(\\); its first", lambda: entk(LINEAR, X[0, 0])),
    "lengths": (
        ValueError,
        "different lengths, \\[3, 4\\]",
        lambda: entk(Two(), (X[:3], X[:4, :2])),
    ),
    "no tensor": (TypeError, "tensors only, but holds a float", lambda: entk(LINEAR, [1.0, 2.0])),
    "iterator": (
        TypeError,
        "read again, but got generator",
        lambda: entk(LINEAR, (x for x in [X])),
    ),
    "string": (TypeError, "tensors only, but holds a str", lambda: entk(LINEAR, "data")),
    "shuffled": (
        ValueError,
        "other data in a second pass.*shuffle=False",
        lambda: entk(LINEAR, shuffling()),
    ),
    "frozen": (ValueError, "no trainable parameter", lambda: entk(frozen(), X)),
    "none chosen": (ValueError, "no trainable parameter", lambda: entk(LINEAR, X, params=[])),
    "no gradient": (ValueError, "torch.no_grad", lambda: entk(no_grad_model(), X).dense()),
    "no gradient, product": (
        ValueError,
        "torch.no_grad",
        lambda: entk(no_grad_model(), X) @ torch.ones(18).double(),
    ),
    "unknown name": (
        ValueError,
        "params has no entry for.*'bais'",
        lambda: entk(LINEAR, X, params=["bais"]),
    ),
    "one name": (TypeError, "collection of names.*'bias'", lambda: entk(LINEAR, X, params="bias")),
    "meta inputs": (
        ValueError,
        "inputs are on meta but the parameters on cpu",
        lambda: entk(LINEAR, X.to("meta")),
    ),
    "meta layer": (ValueError, "several devices, cpu, meta", lambda: entk(half_meta(), X)),
    "meta M": (
        ValueError,
        "precondition\\['weight'\\] must be torch.float64 on cpu",
        lambda: entk(LINEAR, X, precondition=weights((2, 3), (2,), device="meta")),
    ),
    "float32 M": (
        ValueError,
        "but got torch.float32 on cpu",
        lambda: entk(LINEAR, X, precondition=weights((2, 3), (2,), dtype=torch.float32)),
    ),
    "shape of M": (
        ValueError,
        "precondition\\['weight'\\] must have shape \\(2, 3\\), but got \\(3, 2\\)",
        lambda: entk(LINEAR, X, precondition=weights((3, 2), (2,))),
    ),
    "M too long": (
        ValueError,
        "must hold 2 tensors, one per parameter, but has 3",
        lambda: entk(LINEAR, X, precondition=weights((2, 3), (2,), (2,))),
    ),
    "M too short": (
        ValueError,
        "must hold 2 tensors",
        lambda: entk(LINEAR, X, precondition=weights((2, 3))),
    ),
    "M lacks a name": (
        ValueError,
        "precondition has no entry for.*'bias'",
        lambda: entk(LINEAR, X, precondition={"weight": torch.ones(2, 3)}),
    ),
    "number as M": (
        TypeError,
        "must be a tensor, but got float",
        lambda: entk(LINEAR, X, precondition=dict[str, Any](weight=1.0, bias=1.0)),
    ),
    "outputs": (ValueError, "outputs", lambda: entk(LINEAR, X, outputs="mean")),
    "one output": (TypeError, "list of integers, but got 1", lambda: entk(LINEAR, X, outputs=1)),  # pyrefly: ignore
    "no outputs": (ValueError, "distinct integers", lambda: entk(LINEAR, X, outputs=[])),
    "output twice": (ValueError, "distinct integers", lambda: entk(LINEAR, X, outputs=[0, 0])),
    "output too high": (
        ValueError,
        "in \\[0, 2\\).*2 outputs per example",
        lambda: entk(LINEAR, X, outputs=[2]),
    ),
    "tuple": (
        TypeError,
        "must return a tensor, but returned tuple",
        lambda: entk(returning(lambda h: (h, h)), X),
    ),
    "integers": (
        TypeError,
        "real floating-point, but are torch.int64",
        lambda: entk(returning(lambda h: h.long()), X),
    ),
    "examples lost": (
        ValueError,
        "shape \\(2,\\) for 1 examples",
        lambda: entk(returning(lambda h: h.sum(0)), X),
    ),
    "scalar": (
        ValueError,
        "shape \\(\\) for 1 examples",
        lambda: entk(returning(lambda h: h.sum()), X),
    ),
    "dropout": (
        ValueError,
        "dropout is on in 1.*model.eval",
        lambda: entk(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5)).double(), X),
    ),
    "batch norm": (
        ValueError,
        "1 \\(BatchNorm1d\\) normalizes by the statistics",
        lambda: entk(nn.Sequential(LINEAR, nn.BatchNorm1d(2).double()), X),
    ),
    "mean over examples": (
        ValueError,
        "depend on the other examples",
        lambda: entk(Mixing(lambda x: x - x.mean(0)), X),
    ),
    "examples before": (
        ValueError,
        "depend on the other examples",
        lambda: entk(Mixing(lambda x: x.cumsum(0)), X),
    ),
    "examples after": (
        ValueError,
        "depend on the other examples",
        lambda: entk(Mixing(lambda x: x.flip(0).cumsum(0).flip(0)), X),
    ),
    "NaN": (
        ValueError,
        "outputs of 1 of 8 examples are NaN or Inf, the first at position 2",
        lambda: entk(LINEAR, with_nan(2)),
    ),
    "NaN later": (
        ValueError,
        "NaN or Inf, the first at position 8",
        lambda: entk(LINEAR, with_nan(8)).eigsh(1),
    ),
    "NaN later, dense": (
        ValueError,
        "NaN or Inf, the first at position 8",
        lambda: entk(LINEAR, with_nan(8)).dense(),
    ),
    "infinite derivative": (
        ValueError,
        "the kernel, or its product with a vector, holds NaN or Inf",
        lambda: entk(returning(lambda h: (h * 0).sqrt()), X).eigsh(1),
    ),
    "graph": (
        ValueError,
        "fails on 1 of 9 examples without the others \\(RuntimeError: .*nodes of one graph",
        lambda: entk(returning(lambda h: torch.ones(9, 9).double() @ h), X),
    ),
    "graph with a list of edges": (
        ValueError,
        "different lengths, \\[2, 9\\].*a graph's list of edges",
        lambda: entk(LINEAR, (X, torch.ones(2, 20).long())),
    ),
    "dictionary": (
        TypeError,
        "returned dict; wrap it in a module whose forward returns the one that counts",
        lambda: entk(returning(lambda h: {"logits": h}), X),
    ),
    "outputs differ": (
        ValueError,
        "x1 gives 2 outputs per example but x2 gives 3",
        lambda: entk(nn.Conv1d(1, 1, 1).double(), randn(2, 1, 2), randn(2, 1, 3)),
    ),
    "kernel too large": (
        ValueError,
        "kernel of shape \\(18, 18\\) takes",
        lambda: entk(LINEAR, X, max_memory=1000).dense(),
    ),
    "example too large": (
        ValueError,
        "too small for a block of one example",
        lambda: entk(LINEAR, X, max_memory=20).diagonal(),
    ),
    "no memory": (ValueError, "max_memory", lambda: entk(LINEAR, X, max_memory=0)),
    "rows": (
        ValueError,
        "multiplies \\(18,\\) or \\(18, s\\), but got \\(17,\\)",
        lambda: entk(LINEAR, X) @ torch.ones(17),
    ),
    "no columns": (ValueError, "but got \\(18, 0\\)", lambda: entk(LINEAR, X) @ torch.ones(18, 0)),
    "cube": (ValueError, "but got \\(18, 1, 1\\)", lambda: entk(LINEAR, X) @ torch.ones(18, 1, 1)),
    "list": (ValueError, "but got list", lambda: entk(LINEAR, X).matmul(cast(Any, [1.0]))),
    "float32 vector": (
        ValueError,
        "vectors must be torch.float64 on cpu",
        lambda: entk(LINEAR, X) @ torch.ones(18),
    ),
    "not symmetric, diagonal": (
        ValueError,
        "diagonal needs.*leave x2 out",
        lambda: entk(LINEAR, X, X).diagonal(),
    ),
    "not symmetric, trace": (ValueError, "trace needs", lambda: entk(LINEAR, X, X).trace()),
    "not symmetric, eigsh": (ValueError, "eigsh needs", lambda: entk(LINEAR, X, X).eigsh(1)),
    "one probe": (ValueError, "probes must be at least 2", lambda: entk(LINEAR, X).trace(1)),
    "no eigenvalue": (
        ValueError,
        "k must be in \\[1, 18\\], but got 0",
        lambda: entk(LINEAR, X).eigsh(0),
    ),
    "too many eigenvalues": (ValueError, "but got 19", lambda: entk(LINEAR, X).eigsh(19)),
    "half an eigenvalue": (TypeError, "k must be an integer", lambda: entk(LINEAR, X).eigsh(0.5)),  # pyrefly: ignore
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    kind, message, call = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


# --- no trace, whatever the mode ------------------------------------------------------------------


class Counting(nn.Module):
    """Keeps a running mean and a counter, in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        cast(Tensor, self.mean).lerp_(x.detach().mean(0).to(torch.float32), 0.1)
        return x


def bounded() -> nn.Module:
    """An embedding that renormalizes its weight when it is looked up."""
    return nn.Sequential(nn.Embedding(6, 4, max_norm=0.5), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize("made", ["counting", "bounded"])
@pytest.mark.parametrize("training", [True, False])
def test_a_kernel_leaves_no_trace(made: str, training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Counting(), nn.Linear(6, 2))
    x = torch.randn(9, 4)
    if made == "bounded":
        model, x = cast(nn.Sequential, bounded()), torch.randint(6, (9, 3))
    before = copy.deepcopy(model.train(training).state_dict())
    numbers = torch.get_rng_state()
    kernel = entk(model, x)
    kernel.dense()
    kernel.diagonal()
    kernel @ torch.ones(18)
    assert_bitwise(model.state_dict(), before)
    assert made == "bounded" or model[1].calls == 0
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(m.training == training for m in model.modules())


def test_a_refusal_has_drawn_no_random_numbers() -> None:
    model, numbers = (
        nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 2)),
        torch.get_rng_state(),
    )
    with pytest.raises(ValueError, match="dropout is on"):
        entk(model, torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), numbers)


def test_in_inference_mode_the_kernel_is_the_same() -> None:
    model, x, _ = case("MLP")
    expected = entk(model, x).dense()
    with torch.inference_mode():
        assert_bitwise(entk(model, x + 0).dense(), expected)
