"""What is measured before one tries, what is expected from it, and the command that says so."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import tiny
from poprisk import Task, grad_mean_var
from poprisk.linalg import Estimate
from poprisk.monitor.signal import Counts, GradientSignal, sums_of
from poprisk_lab.advise import FIRST_SEED, NEVER, Advice, advise, measuring, words
from poprisk_lab.advise.measuring import (
    BLOCKS,
    Quotient,
    TaskStatistics,
    block_gradients,
    constant_loss,
    gradient_signal,
    held_out_loss,
    measure,
    pooled,
    split_half_signal,
)
from poprisk_lab.advise.rule import (
    CANDIDATES,
    EXPECTED,
    KINDS,
    OUTCOMES,
    RIVALS,
    THRESHOLDS,
    TRACK,
    Features,
    Thresholds,
    features_of,
    fit,
    right,
)
from poprisk_lab.arms import DEFAULT_ADAMW, Arm
from poprisk_lab.cli import app
from poprisk_lab.fit import ArmRun
from poprisk_lab.tasks import TaskError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- gradients ------------------------------------------------------------------------------------


def test_split_halves_are_what_a_loop_over_coordinates_gives() -> None:
    g = torch.randn(8, 250, generator=seeded(), dtype=torch.float64) + torch.arange(250.0) / 100
    generator, inside, whole = seeded(3), 0.0, 0.0
    for _ in range(measuring.HALVINGS):
        order = torch.randperm(8, generator=generator).tolist()
        for a, b in itertools.permutations((order[:4], order[4:])):
            chosen = sorted(range(250), key=lambda j: -abs(sum(float(g[k, j]) for k in a)))[:2]
            for j in range(250):
                values = [float(g[k, j]) for k in b]
                mean = sum(values) / 4
                signal = mean**2 - sum((v - mean) ** 2 for v in values) / 3 / 4
                whole += signal
                inside += signal * (j in chosen)
    assert split_half_signal(g, seeded(3)) == pytest.approx((inside, whole))


@pytest.mark.parametrize(("few", "share"), [(5, 1.0), (500, 0.01)])
def test_concentration_tells_few_coordinates_from_many(few: int, share: float) -> None:
    """Of 500 coordinates five, or all alike, have signal: the noise of a hundred draws averages."""
    mean = torch.zeros(500, dtype=torch.float64)
    mean[:few] = (100.0 / few) ** 0.5
    generator = seeded()
    found = [
        Quotient(*split_half_signal(
            mean + torch.randn(BLOCKS, 500, generator=generator, dtype=torch.float64), generator
        ))
        for _ in range(100)
    ]  # fmt: skip
    value, error, *_ = pooled(found)
    assert abs(value - share) < 4 * error + 0.01
    assert error < 0.1
    per_split = sum(r.under for r in found) / len(found) / (2 * measuring.HALVINGS)
    assert per_split == pytest.approx(100.0, rel=0.05)  # |μ|², without bias


def test_pure_noise_has_no_signal() -> None:
    generator = seeded()
    found = [
        split_half_signal(torch.randn(BLOCKS, 100, generator=generator).double(), generator)[1]
        for _ in range(200)
    ]
    mean = sum(found) / len(found)
    spread = (sum((v - mean) ** 2 for v in found) / len(found) ** 2) ** 0.5
    assert abs(mean) < 3 * spread


def test_the_noise_scale_of_single_examples_is_the_exact_one() -> None:
    """With one example a block: the trace of the exact variance, and the U-statistic of signal."""
    task, rows = tiny.regression(2), torch.arange(BLOCKS)
    torch.manual_seed(0)
    model = task.new_model()
    _, scale = gradient_signal(task, model, rows, 0)
    batch = task.train[0][rows], task.train[1][rows]
    exact = sum(float(v.sum()) for v in grad_mean_var(model, task.loss, batch).values())
    assert scale.over == pytest.approx(BLOCKS * exact, rel=1e-5)
    g = block_gradients(task, model, rows.split(1), seeded())
    statistic = GradientSignal.of(
        float(g.sum(0).square().sum()), sums_of(g @ g.T).tolist(), Counts.of(BLOCKS)
    )
    assert scale.under == pytest.approx(statistic.norm, rel=1e-9)
    _, twice = gradient_signal(task, model, rows.repeat_interleave(2), 0)
    assert twice.over == pytest.approx(2 * scale.over)  # of two examples a block, alike
    assert twice.under == pytest.approx(scale.under)


def test_gradients_are_of_block_means_and_leave_the_model_alone() -> None:
    task = tiny.tiny()
    torch.manual_seed(0)
    model = task.new_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rows = torch.arange(32)
    g = block_gradients(task, model.eval(), rows.split(2), seeded())
    (task.loss(model(task.train[0][:2]), task.train[1][:2]).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.equal(g[0], expected.double())
    model.zero_grad()
    gradient_signal(task, model.train(), rows, 0)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_many_coordinates_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny.tiny()
    model = task.new_model().eval()
    whole = block_gradients(task, model, torch.arange(32).split(2), seeded())
    monkeypatch.setattr(measuring, "COORDINATES", 20)
    some = block_gradients(task, model, torch.arange(32).split(2), seeded())
    assert some.shape == (BLOCKS, 20)
    columns = {tuple(column.tolist()) for column in whole.T}
    assert {tuple(column.tolist()) for column in some.T} <= columns


class Rotation(nn.Module):
    """A complex weight, one that is frozen and one that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.idle = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.weight).abs()


def test_complex_frozen_and_idle_weights() -> None:
    task = dataclasses.replace(tiny.tiny(), model=Rotation)
    g = block_gradients(task, task.new_model(), torch.arange(32).split(2), seeded())
    assert g.shape == (BLOCKS, 4 * 2 * 2 + 5)
    assert not g[:, -5:].any()
    assert measure(task, 0).weights_per_example == (8 + 5) / 40


# --- losses ---------------------------------------------------------------------------------------


def test_constant_outputs_of_classes_and_of_numbers() -> None:
    classes, numbers = tiny.tiny(), tiny.regression()
    y = classes.train[1]
    shares = torch.bincount(y).double() / len(y)
    entropy = -float((shares * shares.log()).sum())
    assert constant_loss(classes, classes.new_model(), torch.arange(40)) == pytest.approx(entropy)
    spread = float(numbers.train[1].var(correction=0))
    found = constant_loss(numbers, numbers.new_model(), torch.arange(40))
    assert found == pytest.approx(spread, rel=1e-5)


def test_the_held_out_loss_is_that_of_the_arm_which_stops_early() -> None:
    """The same fifth, initial weights, batches and updates as a comparison's."""
    task = tiny.regression(3, epochs=30)
    arm = Arm("stopped", "", "early-stopping", "adamw", DEFAULT_ADAMW, held_out=True)
    rows = list(ArmRun(task, arm, 3).rows())
    expected = [row["held_out_metric"] for row in rows if row["event"] == "epoch"][:3]
    found = measure(task, 3).unexplained.over
    assert found <= min(expected) * (1 + 1e-6)
    assert any(found == pytest.approx(value) for value in (min(expected), _start(task)))


def _start(task: Task) -> float:
    run = ArmRun(task, Arm("a", "", "adamw", "adamw", DEFAULT_ADAMW, held_out=True), 3)
    held = run.held_out
    with torch.no_grad():
        return float(task.loss(run.model(held[0]), held[1]).mean())


def test_a_tenth_of_the_epochs_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny.tiny(epochs=31)
    steps = list[int]()
    step = torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW, closure: Any = None) -> Any:
        steps.append(1)
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    held_out_loss(task, task.new_model(), torch.arange(32), torch.arange(32, 40), 0)
    assert len(steps) == 4 * 4  # epochs, batches of 8 among 32


def test_measuring_repeats_and_leaves_random_numbers_alone() -> None:
    task = tiny.tiny()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = measure(task, 1)
    assert torch.equal(torch.rand(3), expected)
    assert measure(task, 1) == first
    assert measure(task, 2) != first
    assert first.batch_share == tiny.BATCH / tiny.TRAINING
    assert first.weights_per_example == (4 * 8 + 8 + 8 * 2 + 2) / tiny.TRAINING


def test_the_test_set_is_not_looked_at() -> None:
    task = tiny.tiny()
    x, y = task.test
    other = dataclasses.replace(task, test=(-x, 1 - y))
    assert measure(other, 0) == measure(task, 0)


class Rows(torch.utils.data.Dataset[Any]):
    """The rows of a task, read one by one."""

    def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
        self.pair = pair

    def __len__(self) -> int:
        return len(self.pair[1])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pair[0][index], self.pair[1][index]


def test_data_that_is_read_batch_by_batch() -> None:
    task = tiny.tiny()
    read = dataclasses.replace(task, train=Rows(task.train), test=Rows(task.test))
    assert measure(read, 0) == measure(task, 0)


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (Features(0.09, 1, 0.0), "easy"),
        (Features(0.1, 1, 0.9), "hard"),
        (Features(0.29, 3, 0.9), "hard"),
        (Features(0.3, 2, 0.9), "noisy"),
        (Features(0.3, 1, 0.3), "few"),
        (Features(1.0, 1, 0.29), "spread"),
    ],
)
def test_thresholds_part_the_kinds(found: Features, kind: str) -> None:
    assert Thresholds(0.1, 0.3, 0.3).kind(found) == kind


def test_every_kind_has_an_outcome_and_a_meaning() -> None:
    assert {*EXPECTED} == {*KINDS} == {*words.MEANINGS}
    for kind in KINDS:
        assert {*EXPECTED[kind]} == {*RIVALS} == {*words.NAMES}
        assert {*EXPECTED[kind].values()} <= {*OUTCOMES} == {*words.EXPECTED}
    assert all(value in column for value, column in zip(THRESHOLDS, CANDIDATES, strict=True))


def test_a_fit_finds_the_thresholds_that_made_the_outcomes() -> None:
    truth = Thresholds(0.1, 0.4, 0.5)
    values = torch.rand(300, 2, generator=seeded()).tolist()
    features = [Features(0.8 * u, 1 + i % 2, c) for i, (u, c) in enumerate(values)]
    tasks = [(found, truth.expect(found)) for found in features]
    assert fit(tasks) == truth
    assert right(truth, tasks) == 600
    wrong = [(f, dict.fromkeys(RIVALS, "even")) for f, _ in tasks]
    assert right(truth, wrong) == sum(o[r] == "even" for _, o in tasks for r in RIVALS)


def test_pooling_is_a_ratio_of_sums_with_its_jackknife() -> None:
    ratios = [Quotient(1.0, 2.0), Quotient(3.0, 1.0), Quotient(2.0, 4.0)]
    value, error, *_ = pooled(ratios)
    left = [5 / 5, 3 / 6, 4 / 3]
    mean = sum(left) / 3
    assert value == pytest.approx(6 / 7)
    assert error == pytest.approx((2 / 3 * sum((x - mean) ** 2 for x in left)) ** 0.5)
    assert math.isnan(pooled(ratios[:1]).standard_error)
    assert math.isnan(pooled([Quotient(1.0, -1.0)]).value)


def measured(unexplained: float = 0.5, few: float = 0.2, signal: float = 1.0) -> TaskStatistics:
    seen, learned = Quotient(few, signal), Quotient(unexplained, 1.0)
    return TaskStatistics(seen, learned, Quotient(10.0, signal), 0.1, 2.0, layers=1)


def test_a_signal_that_is_not_seen_is_in_no_coordinate() -> None:
    assert features_of([measured(signal=-1.0)]).concentration == 0.0
    assert features_of([measured()]) == Features(0.5, 1, 0.2)


def made(*seeds: TaskStatistics) -> Advice:
    return Advice.of("mine", dict(enumerate(seeds)), (100, 10))


def test_what_is_near_to_another_kind_is_told() -> None:
    sure = made(measured(0.5, 0.0), measured(0.52, 0.01), measured(0.51, 0.0))
    assert not sure.unsure
    assert not words.warnings(sure)
    near = made(measured(0.5, 0.0), measured(0.1, 0.0), measured(0.5, 0.0))
    assert near.unsure == ("unexplained",)
    assert "Within two errors of unexplained" in words.warnings(near)[0]
    assert made(measured(0.5, 0.0)).unsure == ()  # one seed has no error


def test_a_task_of_which_nothing_is_learned_early_is_told() -> None:
    """And what is expected of noise is not said without that condition."""
    for unexplained in (0.5, NEVER - 0.01, NEVER, 1.0, 1.3):
        for few in (0.0, 0.2, 0.9):
            found = made(measured(unexplained, few))
            late = unexplained >= NEVER
            assert words.warnings(found) == ([words.LATE] if late else [])
            assert words.headline(found).startswith(words.IF_NOISE if late else "Expect ")


def test_what_is_written_of_an_advice() -> None:
    sparse = made(measured(0.5, 0.9), measured(0.5, 0.9))
    assert sparse.kind == "few"
    assert words.headline(sparse) == (
        "Expect a gain over AdamW at the same settings, and a gain over the best of eight AdamW "
        "settings: a linear model with signal in few coordinates."
    )
    assert words.setting(sparse).startswith("PopRiskAdamW(model, lr=0.001, weight_decay=0.01")
    spread = made(measured(0.5, 0.0, -1.0))
    assert words.setting(spread).startswith("torch.optim.AdamW")
    rows = {row[0].partition(":")[0]: row[1] for row in words.table(spread).rows}
    assert rows["concentration"] == rows["noise scale, examples"] == "not seen"
    assert spread.as_json()["measured"]["noise_scale"] == {"value": None, "standard_error": None}
    assert words.number(Estimate.of(0.5, 0.04)) == "0.5 ± 0.04"


def test_the_record_of_the_rule_is_complete() -> None:
    for rival in RIVALS:
        assert {*TRACK[rival]} == {"all", *KINDS}
        kinds = [TRACK[rival][kind] for kind in KINDS]
        assert TRACK[rival]["all"] == (sum(k[0] for k in kinds), sum(k[1] for k in kinds))


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["advise", *arguments])


def test_the_command_prints_what_was_measured_and_expected() -> None:
    result = run(tiny.source("tiny"))
    assert result.exit_code == 0, result.output
    found = advise(tiny.source("tiny"))
    text = " ".join(result.output.split())
    assert words.headline(found) in text
    assert f"Begin with: {words.setting(found)}" in text
    assert words.number(found.noise_scale) in text


def test_the_command_prints_json_alone() -> None:
    result = run(tiny.source("tiny"), "--seeds", "2", "--set", "epochs=5", "--json")
    found = json.loads(result.output)
    assert found == advise(tiny.source("tiny"), seeds=2, settings={"epochs": 5}).as_json()
    assert found["seeds"] == [FIRST_SEED, FIRST_SEED + 1]
    assert found["examples"] == tiny.TRAINING
    assert {*found["expected"]} == {*RIVALS}
    for rival in RIVALS:
        told = found["record"][rival]
        assert told == {called: [*TRACK[rival][called]] for called in ("all", found["kind"])}


def broken(loss: Callable[[Tensor, Tensor], Tensor]) -> Task:
    task = tiny.tiny()
    object.__setattr__(task, "loss", loss)
    return task


def test_what_cannot_be_measured_is_refused() -> None:
    small = tiny.tiny()
    object.__setattr__(small, "train", (small.train[0][:39], small.train[1][:39]))
    cases: list[tuple[Any, str]] = [
        (small, "task tiny has 39 training examples, too few"),
        (broken(lambda u, y: tiny.cross_entropy(u, y) * math.nan), "finite losses"),
        (broken(lambda u, y: tiny.cross_entropy(u, y) - 5), "the latter above 0"),
        (broken(tiny._failing), "task tiny could not be measured: ArithmeticError: the loss gave"),
    ]
    for task, told in cases:
        with pytest.raises(TaskError, match=re.escape(told)) as caught:
            advise(task)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nothing",), "unknown task 'nothing'"),
        ((tiny.source("tiny"), "--seeds", "0"), "--seeds must be at least 1"),
        ((tiny.source("tiny"), "--set", "seed=3"), "seed is no setting of a task"),
        ((tiny.source("tiny"), "--set", "noise"), "--set takes name=value"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: tuple[str, ...], told: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert told in result.output
    assert len(result.output.splitlines()) == 1


def test_a_made_task_is_measured_and_progress_told() -> None:
    told = list[tuple[int, int]]()

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    found = advise(tiny.tiny(), seeds=2, progress=tell)
    assert told == [(1, 2), (2, 2)]
    assert found.source == "tiny"
    assert found.expected == EXPECTED[found.kind]


def test_the_shipped_tasks_are_what_they_are_made_as() -> None:
    """The same regression with signal in five coordinates of 200, and in all."""
    few, spread = (advise(f"{name}-regression", seeds=4) for name in ("sparse", "dense"))
    assert few.concentration.value > 0.3 > 0.15 > spread.concentration.value
    assert (few.kind, spread.kind) == ("few", "spread")


ROOT = Path(__file__).parents[1]
