"""The spectrum through products equals the dense kernel's, within errors that hold."""

from __future__ import annotations

import copy
import doctest
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import zoo
from asserts import assert_bitwise
from poprisk import Kernel, entk, ntk, spectrum
from poprisk.linalg import Eigenpairs, Estimate, top_eigenpairs
from poprisk.per_sample import nodes
from poprisk.spectrum import KernelSpectrum, lanczos, quadrature, target_energy, traces
from reference import spectrum as reference
from samplers import randn

ESTIMATED = ("trace", "frobenius_norm", "participation_ratio", "effective_rank", "alignment")
FIGURES = (*ESTIMATED, "target_energy")
ROUNDING = 1e-9
SEEDS = 40


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    """Falling back from factors is not news here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no factored form")
        yield
    nodes._SAID.clear()


def weighted(model: nn.Module) -> dict[str, Tensor]:
    """A diagonal preconditioner, some of it zero."""
    params = zoo.trainable(model)
    return {
        name: randn(*p.shape, seed=i).clamp(min=0).square()
        for i, (name, p) in enumerate(params.items())
    }


class Case(NamedTuple):
    """A kernel of the zoo with targets, and what the dense one says."""

    model: nn.Module
    x: Tensor
    k: int
    kernel: Kernel
    matrix: Tensor
    targets: Tensor
    truth: dict[str, float]
    centered: bool

    def spectrum(self, **options: Any) -> KernelSpectrum:
        return self.kernel.spectrum(self.k, targets=self.targets, centered=self.centered, **options)


CASES = {
    "MLP": ("MLP", 40, 3, "plain"),
    "MLP, centred": ("MLP", 40, 3, "centred"),
    "MLP, preconditioned": ("MLP", 40, 3, "preconditioned"),
    "MLP, trace of the outputs": ("MLP", 60, 3, "trace"),
    "CNN": ("LeNet", 24, 5, "plain"),
    "residual CNN, centred": ("residual CNN", 24, 5, "centred"),
    "transformer": ("causal transformer, tied", 24, 5, "plain"),
    "transformer, sum of the outputs": ("causal transformer, tied", 24, 4, "sum"),
}


def made(name: str, n: int, k: int, kind: str = "plain") -> Case:
    model = zoo.make(name)
    (x,) = zoo.ZOO[name].inputs(n)
    weights = weighted(model) if kind == "preconditioned" else None
    outputs = kind if kind in ("trace", "sum") else "all"
    kernel, dense = (entk(model, x, outputs=outputs, precondition=weights) for _ in range(2))
    matrix, targets = dense.dense(), randn(dense.shape[0], seed=1) + 1
    y = targets
    if kind == "centred":
        matrix, y = reference.centred(matrix, y, n)
    truth = reference.figures(matrix, y, k)
    return Case(model, x, k, kernel, matrix, targets, truth, kind == "centred")


def case_of(name: str) -> Case:
    return made(*CASES[name])


def figure(found: KernelSpectrum, name: str) -> Estimate:
    value = getattr(found, name)
    assert isinstance(value, Estimate)
    return value


@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_figure_is_the_dense_one_within_its_error(name: str, formed: bool) -> None:
    case = case_of(name)
    if formed:
        case.kernel.dense()
    found = case.spectrum(probes=40)
    for key in FIGURES:
        estimate, truth = figure(found, key), case.truth[key]
        assert estimate.valid, (key, estimate)
        assert abs(estimate.value - truth) <= 4 * estimate.standard_error + ROUNDING * truth, key
        assert estimate.standard_error < 0.1 * truth, key
    values = torch.linalg.eigvalsh(case.matrix).flip(0)[: case.k]
    pairs = found.eigenpairs
    assert pairs.vectors.shape == (len(case.matrix), case.k)
    assert bool(((pairs.values - values).abs() <= pairs.residuals + ROUNDING * values[0]).all())
    real = torch.linalg.vector_norm(
        case.matrix @ pairs.vectors - pairs.vectors * pairs.values, dim=0
    )
    torch.testing.assert_close(real, pairs.residuals, rtol=1e-3, atol=1e-9 * float(values[0]))


@pytest.mark.parametrize("name", ["MLP", "MLP, centred", "CNN", "transformer"])
def test_two_errors_hold_about_95_of_100_estimates(name: str) -> None:
    """With 40 probes, over 40 seeds; and errors are as large as what they tell of.

    The entropy's add what quadrature may be off by, and so are larger.
    """
    case = case_of(name)
    case.kernel.dense()
    found = [case.spectrum(probes=40, seed=seed) for seed in range(SEEDS)]
    held = []
    for key in ESTIMATED:
        estimates = [figure(one, key) for one in found]
        off = torch.tensor([e.value - case.truth[key] for e in estimates])
        errors = torch.tensor([e.standard_error for e in estimates])
        within = (off.abs() <= 2 * errors).double().mean()
        assert float(within) >= 0.85, key
        held.append(float(within))
        ratio = float(off.square().mean().sqrt() / errors.square().mean().sqrt())
        assert 0.6 < ratio < 1.25, key
    assert 0.9 <= sum(held) / len(held) <= 0.995
    energies = [figure(one, "target_energy") for one in found]
    assert all(
        abs(e.value - case.truth["target_energy"]) <= e.standard_error + ROUNDING for e in energies
    )


def test_every_eigenpair_leaves_nothing_to_the_probes() -> None:
    case = made("MLP", 9, 27)
    found = case.spectrum(probes=2)
    for key in FIGURES:
        assert figure(found, key).value == pytest.approx(case.truth[key], rel=1e-9), key
    assert figure(found, "trace").standard_error == 0.0
    assert figure(found, "target_energy")[:2] == (pytest.approx(1.0), 0.0)


def test_leading_vectors_that_have_not_converged_cost_precision_only() -> None:
    case = case_of("MLP")
    case.kernel.dense()
    found = [case.spectrum(max_products=1, probes=20, seed=seed) for seed in range(SEEDS)]
    first = found[0].eigenpairs
    assert float(first.residuals.max()) > 1e-2 * float(first.values[0])
    for key in ("trace", "frobenius_norm", "effective_rank"):
        estimates = [figure(one, key) for one in found]
        off = torch.tensor([e.value - case.truth[key] for e in estimates])
        errors = torch.tensor([e.standard_error for e in estimates])
        assert float((off.abs() <= 2.2 * errors).double().mean()) >= 0.85, key
        # What the entropy's quadrature is off by is in its error, but the same for every seed.
        biased = key == "effective_rank"
        assert biased or float(off.mean().abs()) <= 3 * float(off.std()) / SEEDS**0.5, key


def test_more_probes_are_worth_what_they_promise() -> None:
    case = case_of("MLP")
    case.kernel.dense()
    few, many = (case.spectrum(probes=probes) for probes in (20, 320))
    for key in ESTIMATED[:3]:
        ratio = figure(few, key).standard_error / figure(many, key).standard_error
        assert ratio == pytest.approx(4, rel=0.6), key


def semidefinite(n: int, rank: int, seed: int = 0) -> Tensor:
    """A matrix whose eigenvalues fall by six orders of magnitude, the rest of them zero."""
    q = torch.linalg.qr(randn(n, n, seed=seed)).Q[:, :rank]
    return (q * torch.logspace(0.5, -6, rank, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("rank", [40, 15])
def test_quadrature_bounds_the_entropy_and_closes_in(rank: int) -> None:
    matrix, start = semidefinite(40, rank), randn(40, 5, seed=3)
    values, vectors = torch.linalg.eigh(matrix)
    shares = (vectors.T @ start / start.norm(dim=0)).square()
    means = [shares.T @ f for f in (values, values**2, torch.special.entr(values.clamp(min=0)))]
    gaps = []
    for alpha, beta in islice(lanczos(lambda v: matrix @ v, start.clone()), 30):
        low, high = quadrature(alpha, beta)
        torch.testing.assert_close(low[:, :2], torch.stack(means[:2], dim=1))
        torch.testing.assert_close(high[:, :2], low[:, :2])
        assert bool((low[:, 2] <= means[2] + 1e-12).all())
        assert bool((high[:, 2] >= means[2] - 1e-12).all())
        gaps.append(float((high - low)[:, 2].max()))
    assert gaps == sorted(gaps, reverse=True) or gaps[-1] < 1e-10
    assert gaps[0] > 0.1
    assert gaps[-1] < 1e-3


def test_quadrature_ends_with_the_space() -> None:
    """Two eigenvalues take two steps; what comes after has no weight, and no NaN."""
    matrix = torch.diag(torch.tensor([2.0, 2.0, 0.5, 0.5], dtype=torch.float64))
    start = torch.stack([torch.ones(4), torch.zeros(4)], dim=1).double()
    expected = (float(torch.special.entr(torch.tensor([2.0, 0.5]).double()).mean()), 0.0)
    for alpha, beta in islice(lanczos(lambda v: matrix @ v, start), 1, 6):
        for bound in quadrature(alpha, beta):
            assert bound[:, 2].tolist() == pytest.approx(expected, abs=1e-12)


def test_one_step_of_quadrature_is_told_by_its_error() -> None:
    """The entropy's error counts what few steps leave open, that of the moments does not."""
    case = case_of("MLP")
    one, many = (case.spectrum(probes=30, steps=steps) for steps in (1, 40))
    assert one.trace == many.trace
    assert one.frobenius_norm == many.frobenius_norm
    rough, fine = one.effective_rank, many.effective_rank
    assert rough.standard_error > 2 * fine.standard_error
    assert abs(rough.value - case.truth["effective_rank"]) <= 2 * rough.standard_error
    assert one.products < many.products


def test_targets_in_a_leading_space_that_is_not_told_apart() -> None:
    """A linear layer's eigenvalues come as often as it has outputs: three of four are no space."""
    model, x = nn.Linear(3, 4, bias=False).double(), randn(10, 3)
    y = randn(10, 4, seed=2)
    kernel = entk(model, x)
    assert figure(kernel.spectrum(4, targets=y), "target_energy").valid
    for k in (3, 13):  # 13 of 12 that are not zero
        found = figure(kernel.spectrum(k, targets=y), "target_energy")
        assert not found.valid
        assert f"eigenvalues {k} and {k + 1} are not told apart" in found.reason
        assert kernel.spectrum(k, targets=y).trace.valid


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_of_the_targets_energy_holds_for_rough_vectors(seed: int) -> None:
    matrix, y = semidefinite(60, 60, seed), randn(60, seed=seed + 50)
    truth = reference.figures(matrix, y, 4)["target_energy"]
    offs, bounds = list[float](), list[float]()
    for products in (14, 21, 28, 35):
        pairs = top_eigenpairs(
            lambda v: matrix @ v, randn(60, 7, seed=seed + 9), 5, tolerance=0, max_products=products
        )
        found = target_energy(y, pairs, 4)
        offs.append(abs(found.value - truth))
        bounds.append(found.standard_error)
    assert all(off <= bound for off, bound in zip(offs, bounds, strict=True))
    assert 1e-9 < bounds[-1] < 1e-2 < bounds[0]


def test_targets_of_every_form() -> None:
    case = case_of("MLP")
    flat = case.spectrum()
    shaped = case.kernel.spectrum(case.k, targets=case.targets.view(40, 3))
    assert shaped.alignment == flat.alignment
    assert shaped.target_energy == flat.target_energy
    none = case.kernel.spectrum(case.k)
    assert none.alignment is None
    assert none.target_energy is None
    assert none.trace == flat.trace
    assert figure(case.kernel.spectrum(3, targets=5 * case.targets), "alignment").value == (
        pytest.approx(figure(flat, "alignment").value)
    )


def test_a_seed_decides_and_nothing_else_changes() -> None:
    case, numbers = case_of("MLP"), torch.get_rng_state()
    first, again, other = (case.spectrum(seed=seed) for seed in (3, 3, 4))
    assert_bitwise(list(first.eigenpairs), list(again.eigenpairs))
    assert first[1:] == again[1:]
    assert first.trace != other.trace
    assert torch.equal(torch.get_rng_state(), numbers)


def test_the_examples_in_docstrings_are_exact() -> None:
    for module in (ntk, spectrum):
        failed, attempted = doctest.testmod(module, extraglobs={"torch": torch})
        assert failed == 0
        assert attempted > 0


def test_in_inference_mode_the_spectrum_is_the_same() -> None:
    case = case_of("MLP")
    expected = case.spectrum()
    with torch.inference_mode():
        found = case.spectrum()
    assert_bitwise(list(found.eigenpairs), list(expected.eigenpairs))
    assert found[1:] == expected[1:]


def test_progress_is_told_of_every_product() -> None:
    told: list[tuple[int, int | None]] = []

    def progress(done: int, total: int | None) -> None:
        told.append((done, total))

    found = case_of("MLP").spectrum(progress=progress)
    assert told[-1] == (found.products, None)
    assert told == sorted(set(told))


def test_float32_is_as_accurate_as_its_rounding() -> None:
    case = case_of("MLP")
    kernel = entk(case.model.float(), case.x.float())
    found = kernel.spectrum(case.k, targets=case.targets.float())
    assert found.eigenpairs.values.dtype == torch.float32
    for key in FIGURES:
        estimate, truth = figure(found, key), case.truth[key]
        assert abs(estimate.value - truth) <= 4 * estimate.standard_error + 1e-5 * truth, key


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("columns", [3, 4])
def test_a_restarted_basis_finds_the_same(k: int, columns: int) -> None:
    """In 3 or 4 blocks of memory in place of 30, at the price of some products."""
    n, width = 400, k + 2
    matrix = torch.diag(torch.linspace(0, 1, n, dtype=torch.float64) ** 8)
    sizes = list[int]()

    def product(vectors: Tensor) -> Tensor:
        sizes.append(vectors.shape[1])
        return matrix @ vectors

    found = top_eigenpairs(
        product, randn(n, width), k, tolerance=1e-9, max_products=4 * n, max_columns=columns * width
    )
    expected = matrix.diagonal().flip(0)[:k]
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-12)
    assert float(found.residuals.max()) <= 1e-9
    assert sum(sizes) > columns * width
    again = torch.linalg.vector_norm(matrix @ found.vectors - found.vectors * found.values, dim=0)
    assert float(again.max()) <= 2e-9
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(found.vectors.T @ found.vectors, eye)


MEMORY = """
import re, torch
from pathlib import Path
from torch import nn
from poprisk import entk
torch.set_num_threads(1)
def peak():  # KiB of this program; ru_maxrss begins with what its parent had
    return int(re.search(r"VmHWM:\\\\s*(\\\\d+)", Path("/proc/self/status").read_text())[1])
model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 10))
x = torch.randn(3000, 20)
entk(model, x[:20]).spectrum(1)
before = peak()
found = entk(model, x, max_memory=32 << 20).spectrum(4, targets=torch.randn(3000, 10), probes=8)
print(peak() - before, found.trace.valid)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_stays_within_the_budget() -> None:
    """The kernel of 30,000 rows would be 3.4 GiB."""
    code = MEMORY.replace("\\\\", "\\")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken, valid = done.stdout.split()
    assert 0 < int(taken) / 1024 < 1.1 * 32
    assert valid == "True"


LINEAR = nn.Linear(3, 2).double()
X = randn(9, 3)
TANH = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
DEAD = zoo.Function(lambda m, x: (m.layer(x) - 1e3).relu(), layer=nn.Linear(3, 2).double())
NEGATIVE = [torch.ones(2, 3).double(), torch.tensor([1.0, -0.5]).double()]


def spectrum_of(k: Any = 2, kernel: Kernel | None = None, **options: Any) -> KernelSpectrum:
    return (entk(LINEAR, X) if kernel is None else kernel).spectrum(k, **options)


ERRORS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "two sets": (
        ValueError,
        "spectrum needs the kernel of one set with itself: leave x2 out",
        lambda: spectrum_of(kernel=entk(LINEAR, X, X)),
    ),
    "k too large": (ValueError, "k must be in \\[1, 18\\], but got 19", lambda: spectrum_of(19)),
    "no k": (ValueError, "k must be in \\[1, 18\\], but got 0", lambda: spectrum_of(0)),
    "half a k": (TypeError, "k must be an integer, but got 0.5", lambda: spectrum_of(0.5)),
    "one probe": (ValueError, "probes must be at least 2", lambda: spectrum_of(probes=1)),
    "no step": (ValueError, "steps must be positive, but got 0", lambda: spectrum_of(steps=0)),
    "negative M": (
        ValueError,
        "without negative entries, but that of bias has -0.5; trace and eigsh take any",
        lambda: spectrum_of(kernel=entk(LINEAR, X, precondition=NEGATIVE)),
    ),
    "zero kernel": (
        ValueError,
        "the kernel is zero",
        lambda: spectrum_of(kernel=entk(LINEAR, X[:1]), centered=True),
    ),
    "examples all the same": (
        ValueError,
        "nothing is left once it is centred",
        lambda: spectrum_of(kernel=entk(TANH, X[:1].expand(9, 3).clone()), centered=True),
    ),
    "dead network": (
        ValueError,
        "no output depends on a weight here",
        lambda: spectrum_of(kernel=entk(DEAD, X)),
    ),
    "nearly constant targets": (
        ValueError,
        "targets are zero, .* once they are centred.$",
        lambda: spectrum_of(targets=torch.full((9, 2), 0.1).double(), centered=True),
    ),
    "class labels": (
        ValueError,
        "targets must hold one number for each output of each example, \\(9, 2\\) or \\(18,\\), "
        "but have shape \\(9,\\); classes as one-hot",
        lambda: spectrum_of(targets=torch.ones(9).double()),
    ),
    "transposed targets": (
        ValueError,
        "but have shape \\(2, 9\\)",
        lambda: spectrum_of(targets=torch.ones(2, 9).double()),
    ),
    "one target": (ValueError, "shape \\(\\)", lambda: spectrum_of(targets=torch.tensor(1.0))),
    "list of targets": (
        TypeError,
        "targets must be a tensor, but got list",
        lambda: spectrum_of(targets=[1.0] * 18),
    ),
    "float32 targets": (
        ValueError,
        "targets must be torch.float64 on cpu, as the kernel is, but got torch.float32",
        lambda: spectrum_of(targets=torch.ones(9, 2)),
    ),
    "NaN in targets": (
        ValueError,
        "targets of 1 of 9 examples are NaN or Inf, the first at position 4",
        lambda: spectrum_of(
            targets=torch.ones(9, 2).double().index_fill(0, torch.tensor([4]), float("nan"))
        ),
    ),
    "zero targets": (
        ValueError,
        "targets are zero, so that nothing can be aligned with them.$",
        lambda: spectrum_of(targets=torch.zeros(9, 2).double()),
    ),
    "constant targets": (
        ValueError,
        "targets are zero, .* once they are centred.$",
        lambda: spectrum_of(targets=torch.ones(9, 2).double(), centered=True),
    ),
    "no memory for eigenpairs": (
        ValueError,
        "too small for vectors of 18 rows, which need .*fewer eigenpairs \\(k\\) or probes",
        lambda: spectrum_of(15, kernel=entk(LINEAR, X, max_memory=10_000), probes=2),
    ),
    "no memory for probes": (
        ValueError,
        "too small for vectors of 18 rows",
        lambda: spectrum_of(1, kernel=entk(LINEAR, X, max_memory=20_000), probes=30),
    ),
    "no memory for eigsh": (
        ValueError,
        "too small for vectors of 18 rows",
        lambda: entk(LINEAR, X, max_memory=10_000).eigsh(15),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    kind, message, call = ERRORS[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_refusal_comes_before_the_work() -> None:
    """No product is spent on what memory or targets will not allow."""
    told = list[int]()
    kernel = entk(LINEAR, X, max_memory=20_000)

    def progress(done: int, total: int | None) -> None:
        told.append(done)

    for options in ({"probes": 30}, {"targets": torch.ones(9).double()}):
        with pytest.raises(ValueError, match=r"too small|targets must hold"):
            spectrum_of(1, kernel, progress=progress, **options)
    assert told == []


def test_traces_of_rough_pairs_are_unbiased_by_construction() -> None:
    """With all signs as probes, so without chance: traces of the part outside of any V."""
    matrix = semidefinite(4, 4)
    V = torch.linalg.qr(randn(4, 2)).Q
    inner = V.T @ matrix @ V
    values, turn = torch.linalg.eigh(inner)
    V, values = V @ turn.flip(1), values.flip(0)
    residuals = torch.linalg.vector_norm(matrix @ V - V * values, dim=0)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4).T
    found = traces(lambda v: matrix @ v, Eigenpairs(values, V, residuals), signs, steps=9)
    trace, square, entropy = found.values
    unit = found.unit
    assert unit * trace == pytest.approx(float(matrix.trace()))
    assert unit**2 * square == pytest.approx(float(matrix.square().sum()))
    assert abs(entropy - reference.entropy_trace(matrix / unit)) <= found.bound + 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_vectors_are_single(dtype: torch.dtype) -> None:
    """There is no orthogonalization in half; products are those of the half kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)
    x = randn(12, 3).to(dtype)
    exact = entk(copy.deepcopy(model).double(), x.double()).dense()
    kernel, targets = entk(model, x), randn(24).to(dtype)
    values = torch.linalg.eigvalsh(exact).flip(0)
    off = 20 * torch.finfo(dtype).eps * float(values[0])
    pairs = kernel.eigsh(3)
    assert pairs.vectors.dtype == torch.float32
    assert float((pairs.values.double() - values[:3]).abs().max()) < off
    assert float(pairs.residuals.max()) < off
    found = kernel.spectrum(3, targets=targets, centered=True, probes=16)
    centred = entk(copy.deepcopy(model).double(), x.double()).spectrum(
        3, targets=targets.double(), centered=True, probes=16
    )
    for name in FIGURES:
        mine, theirs = getattr(found, name), getattr(centred, name)
        limit = 20 * torch.finfo(dtype).eps * max(1.0, theirs.value)
        assert mine.value == pytest.approx(theirs.value, abs=limit + 4 * mine.standard_error)
    trace = kernel.trace(16)
    assert trace.value == pytest.approx(float(exact.trace()), abs=off + 4 * trace.standard_error)
