"""Problems of the claim about stopping: their true risks, and that a twin trains on each."""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from poprisk import TwinRisk
from poprisk.losses import binary_cross_entropy, cross_entropy, squared_error
from poprisk.randomness import RandomState, generator_of
from poprisk.risk.estimate import grouped_error
from poprisk_lab.studies.risk.problems import PROBLEMS as OLD
from poprisk_lab.studies.risk.problems import (
    NoisyData,
    TrainingProblem,
    binary_costs,
    class_costs,
    number_costs,
)
from poprisk_lab.studies.stopping import drawn, problems, tables, text
from poprisk_lab.studies.stopping.problems import PROBLEMS

LOSSES = (squared_error, cross_entropy, binary_cross_entropy, drawn.absolute_error)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters start from a model that has learned nothing: it takes seconds."""
    torch.manual_seed(5)
    model = text.Reader(text.SYMBOLS, length=text.WINDOW, width=text.WIDTH, blocks=text.BLOCKS)
    monkeypatch.setattr(text, "pretrained", model.state_dict)


def problem_of(name: str) -> TrainingProblem:
    problem = PROBLEMS[name]
    for package in problem.needs:
        pytest.importorskip(package)
    return problem


@cache  # some take seconds
def first_of(name: str) -> NoisyData:
    return PROBLEMS[name].data(0)


def outputs_of(problem: TrainingProblem, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return problem.model().eval()(x)


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_they_are_new_and_many_of_all_sizes() -> None:
    assert problems.OLD is OLD
    assert not PROBLEMS.keys() & OLD.keys()
    found = importlib.util.find_spec
    installed = [name for name, p in PROBLEMS.items() if all(map(found, p.needs))]
    sizes = sorted(len(first_of(name).y) for name in installed)
    assert len(PROBLEMS) >= 9
    assert len(installed) >= 9
    assert (sizes[0], sizes[-1]) == (200, 20_000)
    assert len(set(sizes)) == len(sizes)


def test_losses_and_optimizers_vary() -> None:
    model = nn.Linear(2, 1)
    found = {type(p.optimizer(model, 100, 10)).__name__ for p in PROBLEMS.values()}
    assert found == {"AdamW", "SGD", "PopRiskAdamW"}
    assert {p.loss for p in PROBLEMS.values()} == set(LOSSES)
    assert len({p.batch_size for p in PROBLEMS.values()}) >= 6


@pytest.mark.slow
@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_its_seed_s(name: str) -> None:
    problem = problem_of(name)
    before = RandomState.now()
    data, again, other = problem.data(3), problem.data(3), first_of(name)
    assert RandomState.now().same(before)
    n, m = len(data.x), len(data.fresh)
    assert len(data.y) == n
    assert data.x.shape[1:] == data.fresh.shape[1:]
    assert m >= (200 if {"sklearn", "plotly"} & set(problem.needs) else 4_000)
    assert not torch.equal(data.x, other.x)
    assert not torch.equal(data.y, other.y)
    assert not torch.equal(data.fresh, other.fresh)
    for mine, same in zip(data, again, strict=True):
        if isinstance(mine, Tensor):
            assert isinstance(same, Tensor)
            assert torch.equal(mine, same)
    u = outputs_of(problem, data.fresh)
    costs = data.costs(u)
    assert costs.shape == (m,)
    assert torch.equal(costs, again.costs(u))
    assert data.risk(u) == pytest.approx(float(costs.double().mean()), rel=1e-5)
    assert 0 < data.risk_error(u) < 0.3 * data.risk(u)
    for ids, count in ((data.groups, n), (data.fresh_groups, m)):
        assert ids is None or (
            ids.shape == (count,) and set(ids.tolist()) == {*range(ids.max() + 1)}
        )


@pytest.mark.slow
@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_twin_takes_two_steps(name: str) -> None:
    problem = problem_of(name)
    data, b = first_of(name), problem.batch_size
    n = len(data.y)
    assert n >= 3 * b
    torch.manual_seed(0)
    twin = TwinRisk(
        problem.model, lambda m: problem.optimizer(m, n, b), problem.loss, dataset_size=n
    )
    with torch.no_grad():
        first = data.risk(twin.model(data.fresh))
    for index in torch.randperm(n)[: 2 * b].split(b):
        for run in twin.runs(index):
            run.optimizer.zero_grad()
            run.loss(run.model(data.x[index]), data.y[index]).mean().backward()
            run.optimizer.step()
    found = twin.estimate(data.x, data.y, groups=data.groups)
    assert math.isfinite(found.value)
    assert 0 < found.standard_error < found.value
    with torch.no_grad():
        assert data.risk(twin.model(data.fresh)) != first
    if data.groups is not None:
        assert found.standard_error != twin.estimate(data.x, data.y).standard_error


# --- true risks -----------------------------------------------------------------------------------

TUMOURS, SIGNALS = "breast cancer 20%, MLP, AdamW", "mnist1d 25%, CNN, SGD with momentum"
DRAWN = {
    "heavy tails, MLP, AdamW": 12_000,
    "uneven noise, tanh MLP, AdamW": 12_000,
    "kinds of text 20%, LoRA, AdamW": 6_000,
    "groups with offsets, deep MLP, SGD with momentum": 12_000,
    SIGNALS: 5_000,
    "unequal classes 10%, MLP, PopRiskAdamW": 12_000,
    "uneven flips, MLP, AdamW": 20_000,
}
"""How many training examples tell the true risk of those whose noise is known."""
MEASURED = {
    "diabetes, deep MLP, SGD with momentum",
    "countries, MLP, AdamW",
    "next character, transformer, AdamW",
}
"""Those whose fresh targets are as they were measured."""


def test_noise_is_known_or_not() -> None:
    assert {*DRAWN} | MEASURED | {TUMOURS} == {*PROBLEMS}


@pytest.mark.slow
@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", DRAWN)
def test_true_risk_is_the_mean_over_noisy_labels_that_nothing_was_trained_on(name: str) -> None:
    problem = problem_of(name)
    make: Any = problem.data
    data = make(1, n=DRAWN[name])
    trained = DRAWN[name] // 2
    torch.manual_seed(1)
    model = problem.model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for index in torch.arange(trained).repeat(2).split(50):  # what it knows, noise takes away
        optimizer.zero_grad()
        problem.loss(model(data.x[index]), data.y[index]).mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        losses = problem.loss(model(data.x[trained:]), data.y[trained:]).double()
        u = model(data.fresh)
    groups = None if data.groups is None else data.groups[trained:].unique(return_inverse=True)[1]
    error = grouped_error(losses - losses.mean(), groups) / len(losses)
    error = math.hypot(error, data.risk_error(u))
    assert error < 0.05 * data.risk(u)
    assert abs(float(losses.mean()) - data.risk(u)) < 4 * error


def noisy_mean(
    loss: Callable[[Tensor, Tensor], Tensor], u: Tensor, noisy: Callable[[torch.Generator], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean losses (m,) over many draws of the labels, and their errors."""
    g = generator_of(0, "labels")
    draws = torch.stack([loss(u, noisy(g)) for _ in range(4_000)]).double()
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


U = torch.linspace(-2, 2, 15).reshape(5, 3)
CLEAN = torch.tensor([0, 1, 2, 2, 0])
SHARES = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.45])
BITS, NUMBERS = (CLEAN > 0).float()[:, None], U[:, :1] + torch.arange(5)[:, None] / 4


@pytest.mark.parametrize("case", ["classes", "bits", "squares", "absolute"])
def test_an_expected_loss_is_the_mean_over_draws_of_its_label(case: str) -> None:
    if case == "classes":
        costs = class_costs(CLEAN, 0.3, 3)(U)

        def noisy(g: torch.Generator) -> Tensor:
            other = (CLEAN + torch.randint(1, 3, (5,), generator=g)) % 3
            return torch.where(torch.rand(5, generator=g) < 0.3, other, CLEAN)

        mean, error = noisy_mean(cross_entropy, U, noisy)
    elif case == "bits":
        costs = binary_costs(BITS, SHARES)(U[:, :1])
        mean, error = noisy_mean(
            binary_cross_entropy,
            U[:, :1],
            lambda g: (BITS - (torch.rand(5, 1, generator=g) < SHARES[:, None]).float()).abs(),
        )
    elif case == "squares":
        costs = number_costs(NUMBERS, SHARES)(U[:, :1])
        mean, error = noisy_mean(
            squared_error,
            U[:, :1],
            lambda g: NUMBERS + SHARES[:, None] * torch.randn(5, 1, generator=g),
        )
    else:
        costs = drawn.absolute_costs(NUMBERS, 0.7)(U[:, :1])
        mean, error = noisy_mean(
            drawn.absolute_error,
            U[:, :1],
            lambda g: NUMBERS + 0.7 * torch.randn(5, 1, generator=g),
        )
    assert costs.shape == (5,)
    assert bool(((costs - mean).abs() <= 4.5 * error + 1e-5).all())
    assert float(error.max()) > 1e-4


def test_the_error_of_a_risk_is_that_of_groups() -> None:
    x = torch.zeros(6, 1)
    data = NoisyData(x, x, x, partial(torch.flatten))
    u = torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0, 4.0])[:, None]
    assert data.risk(u) == 2.5
    assert data.risk_error(u) == pytest.approx(float(u.std()) / 6**0.5)
    grouped = data._replace(fresh_groups=torch.tensor([0, 0, 0, 1, 1, 1]))
    assert grouped.risk_error(u) == pytest.approx(float(torch.tensor([1.0, 4.0]).std()) / 2**0.5)


# --- what each is about ---------------------------------------------------------------------------


def test_classes_are_unequal() -> None:
    counts = drawn.unequal(0, n=40_000, noise=0.1).y.bincount() / 40_000
    shares = torch.tensor([0.90, 0.07, 0.03])
    torch.testing.assert_close(counts, 0.9 * shares + 0.05 * (1 - shares), atol=0.006, rtol=0)


def test_examples_of_a_group_share_an_offset_and_a_neighbourhood() -> None:
    still = drawn.offsets(0, n=500, size=10, shared=0.0, own=0.0)
    data = drawn.offsets(0, n=500, size=10, shared=0.6, own=0.0)
    assert torch.equal(data.x, still.x)
    offset = (data.y - still.y).reshape(50, 10)
    torch.testing.assert_close(offset, offset[:, :1].expand(50, 10))
    assert 0.4 < float(offset[:, 0].std()) < 0.8
    within = data.x.reshape(50, 10, 10)
    assert float(within.mean(1).std()) > 2 * float((within - within.mean(1, True)).std()) / 10**0.5
    assert data.groups is not None
    assert torch.equal(data.groups, torch.arange(50).repeat_interleave(10))


def test_tails_are_those_of_student() -> None:
    x = drawn.heavy_tails(0, n=400, noise=0.5).fresh.flatten().double()
    for limit in (1.0, 5.0, 30.0):
        p = 2 * stats.t(2.5).sf(limit)
        share = float((x.abs() > limit).double().mean())
        assert abs(share - p) < 4.5 * math.sqrt(p / len(x))


def test_noise_is_larger_on_one_side() -> None:
    u = torch.zeros(4_000, 1)
    floor = drawn.uneven_noise(0, n=10).costs
    costs = floor(u)  # 0.5·(clean² + σ²)
    assert float(costs.max()) > 1.0
    flips = drawn.uneven_flips(0, n=10).costs
    near = torch.sigmoid((flips(u + 50) - flips(u - 50)) / 50)  # right label and probability
    spread = (near - 0.5).abs()
    assert float(spread.max()) > 0.2
    assert float(spread.min()) < 0.05


@pytest.mark.parametrize(
    ("make", "rows"), [(partial(tables.cancer, noise=0.2), 569), (tables.diabetes, 442)]
)
def test_a_table_is_split_into_training_and_other_rows(
    make: Callable[..., NoisyData], rows: int
) -> None:
    data = make(0, n=200)
    assert len(data.x) == 200
    assert len(data.x) + len(data.fresh) == rows
    together = torch.cat([data.x, data.fresh]).unique(dim=0)
    assert len(together) == rows
    torch.testing.assert_close(data.x.mean(0), torch.zeros(data.x.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(data.x.std(0), torch.ones(data.x.shape[1]))


def test_fresh_targets_are_those_that_came_with_the_rows() -> None:
    from sklearn.datasets import load_diabetes

    x, y = (torch.as_tensor(a).float() for a in load_diabetes(return_X_y=True, scaled=False))
    data = tables.diabetes(0, n=200)
    order = torch.randperm(442, generator=generator_of(0, "rows"))
    train, rest = order[:200], order[200:]
    torch.testing.assert_close(data.fresh, (x[rest] - x[train].mean(0)) / x[train].std(0))
    u = torch.linspace(-1, 1, 242)
    right = (y[rest] - y[train].mean()) / y[train].std()
    torch.testing.assert_close(data.costs(u[:, None]), 0.5 * (u - right).square())


def test_labels_of_the_tumours_are_flipped_at_random() -> None:
    right, noisy = tables.cancer(0, n=250, noise=0.0), tables.cancer(0, n=250, noise=0.2)
    assert torch.equal(right.x, noisy.x)
    share = float((right.y != noisy.y).double().mean())
    assert abs(share - 0.2) < 4 * math.sqrt(0.16 / 250)
    u = torch.full((319, 1), 2.0)
    flipped = (1 - right.costs(u).exp() ** -1).log().neg()  # the loss of the other label
    torch.testing.assert_close(noisy.costs(u), 0.8 * right.costs(u) + 0.2 * flipped)


def test_countries_are_for_training_or_fresh() -> None:
    data = tables.countries(0, training=70)
    assert data.groups is not None
    assert data.fresh_groups is not None
    assert data.groups.bincount().tolist() == [12] * 70
    assert data.fresh_groups.bincount().tolist() == [12] * 72
    assert data.x.shape[1] == 8


# --- text -----------------------------------------------------------------------------------------


def test_windows_are_parts_of_their_texts() -> None:
    said = ["abcdefgh", "xy", "nopqrstuvw"]
    windows = text.Windows(said, 5)
    x, ids = windows.draw(400, torch.Generator().manual_seed(0))
    assert set(ids.tolist()) == {0, 2}
    found = {
        ("".join(text.LETTERS[s] for s in row), i)
        for row, i in zip(x.tolist(), ids.tolist(), strict=True)
    }
    assert found == {(said[i][k : k + 5], i) for i in (0, 2) for k in range(len(said[i]) - 4)}


def test_characters_are_told_apart_as_far_as_they_have_symbols() -> None:
    found = text.encode(" A\n\tz09(?é~")
    known = [text.LETTERS.index(c) for c in "a z00("]
    assert found.tolist() == [*known, *3 * [len(text.LETTERS)]]
    assert sorted({*text.SYMBOL_OF.tolist()}) == [*range(text.SYMBOLS)]
    assert len(text.encode("")) == 0


def test_code_has_neither_docstrings_nor_comments() -> None:
    source = '"""A module."""\n# a remark\ndef f():\n    """A function."""\nx = 1  # one\n'
    tree = ast.parse(source)
    assert text._docstrings(tree) == "A module. A function."
    assert text._comments(source) == "a remark"
    assert text._code(tree) == "def f():\n    pass\nx = 1"


def test_fresh_windows_are_of_other_texts() -> None:
    train, fresh = text._halves([str(i) for i in range(101)], 3)
    assert not {*train} & {*fresh}
    assert {*train} | {*fresh} == {str(i) for i in range(101)}


def test_adapters_alone_are_trained_and_say_nothing_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = text.Reader(text.SYMBOLS, length=text.WINDOW, width=text.WIDTH, blocks=text.BLOCKS)
    monkeypatch.setattr(text, "pretrained", base.state_dict)
    model = text.adapted(rank=4)
    x = torch.randint(text.SYMBOLS, (6, text.WINDOW))
    torch.testing.assert_close(model.states(x), base.states(x))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {
        f"blocks.{i}.{layer}.{part}.weight"
        for i in range(text.BLOCKS)
        for layer in ("attend", "merge", "widen", "narrow")
        for part in ("down", "up")
    }
    assert trained == {*adapters, "head.weight", "head.bias"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in trained}
    for _ in range(2):
        cross_entropy(model(x), torch.arange(6) % 3).mean().backward()
        optimizer.step()
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
    assert not torch.allclose(model.states(x), base.states(x))


def test_a_reader_sees_no_later_symbols() -> None:
    model = text.Reader(3, length=8, width=16, blocks=2)
    x = torch.randint(text.SYMBOLS, (4, 8))
    changed = x.clone()
    changed[:, 5] = (x[:, 5] + 1) % text.SYMBOLS
    before, after = model.states(x), model.states(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5], after[:, 5])


@pytest.mark.slow
def test_pre_training_learns_and_leaves_random_numbers_alone() -> None:
    before = RandomState.now()
    start, found = (text.pretrained.__wrapped__(steps) for steps in (0, 30))
    assert RandomState.now().same(before)
    model = text.Reader(text.SYMBOLS, length=text.WINDOW, width=text.WIDTH, blocks=text.BLOCKS)
    x, _ = text.Windows(text.pages(), text.WINDOW + 1).draw(200, generator_of(1, "other"))
    losses = list[float]()
    for weights in (start, found):
        model.load_state_dict(weights)
        with torch.no_grad():
            u = model.head(model.states(x[:, :-1])).flatten(0, 1)
        losses.append(float(cross_entropy(u, x[:, 1:].flatten()).mean()))
    assert losses[1] < losses[0] - 0.5
