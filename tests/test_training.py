"""One arm on one seed: what it trains on, what it measures, and that it can be interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poprisk_lab.checkpoint
import tiny
from poprisk import Metric, Task
from poprisk_lab.arms import Arm, default_arms
from poprisk_lab.checkpoint import CHECKPOINT_SECONDS, Workspace, load_checkpoint
from poprisk_lab.fit import PATIENCE, ArmRun, Row

ARMS = {arm.name: arm for arm in default_arms(full=True)}
ADAMW = ARMS["adamw-lr0.003-wd0.1"]
STOPPED = ARMS["stopped-lr0.003-wd0.01"]
KINDS = ["poprisk", "shuffled", "rms-matched", ADAMW.name, STOPPED.name, "paper-snr"]
KINDS += ["m-svag", "adabelief", "grokfast", "poprisk-soap"]


def without_time(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def same(a: Any, b: Any) -> bool:
    """Equal as JSON texts, which give every bit of a float and know NaN."""
    return json.dumps(a) == json.dumps(b)


def weights(run: ArmRun) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def finished(task: Task, arm: Arm, seed: int = 0, **settings: Any) -> tuple[ArmRun, list[Row]]:
    run = ArmRun(task, arm, seed, **settings)
    return run, without_time(list(run.rows()))


def recorded(task: Task) -> tuple[Task, list[Tensor]]:
    """The task, and the targets of each batch that will be trained on."""
    batches: list[Tensor] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            batches.append(targets.clone())
        return task.loss(outputs, targets)

    observed = replace(task, loss=loss)
    batches.clear()  # of the trial when the task is made
    return observed, batches


def positions(batches: list[Tensor], task: Task) -> list[list[int]]:
    """Which training examples the batches held; targets are all different."""
    y = task.train[1].flatten()
    assert len(y.unique()) == len(y)
    return [[int((y == t).nonzero()) for t in batch.flatten()] for batch in batches]


# --- what it trains on ----------------------------------------------------------------------------


def mixing() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def raised(grad: Tensor) -> Tensor:
    return grad + 0.1


def hooked() -> nn.Module:
    model = nn.Linear(4, 2)
    model.weight.register_hook(raised)
    return model


@pytest.mark.parametrize(
    ("model", "factors", "variance"),
    [(tiny.network, "examples", "exact"), (mixing, "gradient", "ema"), (hooked, "gradient", "ema")],
)
def test_bases_come_from_examples_where_these_can_be_told_apart(
    model: Any, factors: str, variance: str
) -> None:
    task = replace(tiny.tiny(), model=model)
    run, rows = finished(task, ARMS["poprisk-soap"])
    (group,) = run.optimizer.param_groups
    assert (group["factors"], group["variance"]) == (factors, variance)
    assert math.isfinite(rows[-1]["final_metric"])
    assert any("right_basis" in state for state in run.optimizer.state.values())
    drawn = list[Tensor]()
    for arm in (ARMS["poprisk-soap"], ADAMW):
        ArmRun(task, arm, 0)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)  # looking at a batch takes no random number from the run


def test_bases_from_the_gradient_keep_their_variance() -> None:
    settings = {"factors": "gradient", "variance": "second-moment"}
    run = ArmRun(tiny.tiny(), replace(ARMS["poprisk-soap"], settings=settings), 0)
    (group,) = run.optimizer.param_groups
    assert {key: group[key] for key in settings} == settings


def test_a_last_batch_that_joins_another_is_no_larger_than_told() -> None:
    task = tiny.tiny()
    x, y = task.train
    task = replace(task, train=(x[:33], y[:33]), clean=None)
    run, rows = finished(task, ARMS["poprisk-soap"])
    assert run.optimizer.param_groups[0]["batch_size"] == 9
    assert math.isfinite(rows[-1]["final_metric"])


def test_adamw_is_the_loop_anyone_would_write() -> None:
    task, batches = recorded(tiny.regression(epochs=6))
    run, _ = finished(task, ADAMW, seed=3)
    torch.manual_seed(3)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.1, fused=True)
    x, y = task.train
    for batch in positions(batches, task):
        optimizer.zero_grad()
        (model(x[batch]) - y[batch]).square().mean().backward()
        optimizer.step()
    assert torch.equal(weights(run), torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert run.progress.step == len(batches) == 6 * 5


def test_an_epoch_takes_every_example_once_in_an_order_of_its_own() -> None:
    task, batches = recorded(tiny.regression(epochs=3))
    finished(task, ADAMW)
    taken = positions(batches, task)
    assert [len(batch) for batch in taken] == [8] * 15
    epochs = [[i for batch in taken[5 * e : 5 * e + 5] for i in batch] for e in range(3)]
    assert [sorted(order) for order in epochs] == [list(range(40))] * 3
    assert len({tuple(order) for order in [*epochs, range(40)]}) == 4


def test_a_last_batch_that_is_short_is_trained_on_too() -> None:
    task, batches = recorded(replace(tiny.regression(epochs=1), batch_size=12))
    finished(task, ADAMW)
    assert [len(batch) for batch in batches] == [12, 12, 12, 4]


@pytest.mark.parametrize("kind", ["poprisk", "shuffled", "rms-matched", "m-svag"])
def test_all_arms_of_a_seed_see_the_examples_in_one_order(kind: str) -> None:
    task, batches = recorded(tiny.regression())
    finished(task, ADAMW)
    orders = positions(batches, task)
    batches.clear()
    finished(task, ARMS[kind], trace=[[0.01, 0.01]] * 20)
    assert positions(batches, task) == orders
    batches.clear()
    finished(task, ADAMW, seed=1)
    assert positions(batches, task) != orders


def test_all_arms_of_a_seed_start_from_one_set_of_weights() -> None:
    starts = [weights(ArmRun(tiny.tiny(), ARMS[k], 2, trace=[])) for k in KINDS]
    assert all(torch.equal(w, starts[0]) for w in starts)
    assert not torch.equal(weights(ArmRun(tiny.tiny(), ADAMW, 3)), starts[0])


def test_the_trace_changes_nothing_for_the_run_it_is_of() -> None:
    plain, rows = finished(tiny.tiny(), ARMS["poprisk"])
    traced, other = finished(tiny.tiny(), ARMS["poprisk"], record=True)
    assert same(rows, other)
    assert plain.progress.trace == []
    assert [len(sizes) for sizes in traced.progress.trace] == [4] * 20  # tensors, steps
    assert all(0 <= size < 0.01 for sizes in traced.progress.trace for size in sizes)
    assert all(size > 0 for size in traced.progress.trace[0])


# --- the held-out fifth ---------------------------------------------------------------------------


def test_the_held_out_fifth_is_never_trained_on() -> None:
    task, batches = recorded(tiny.regression())
    run, _ = finished(task, STOPPED)
    held_out = positions([run.held_out[1]], task)[0]
    assert len(held_out) == 8
    trained = {i for batch in positions(batches, task) for i in batch}
    assert trained == set(range(40)) - set(held_out)
    assert torch.equal(run.held_out[0][:], task.train[0][held_out])

    x, y = (t.clone() for t in task.train)
    x[held_out], y[held_out] = 100.0, -1e6
    poisoned, _ = finished(replace(task, train=(x, y)), STOPPED)
    assert torch.equal(weights(poisoned), weights(run))
    assert torch.equal(poisoned.held_out[1], torch.full((8, 1), -1e6))


def test_other_arms_train_on_everything() -> None:
    for name in ("poprisk", ADAMW.name):
        assert len(ArmRun(tiny.tiny(), ARMS[name], 0).data[0]) == 40


def test_the_held_out_fifth_is_one_for_all_learning_rates_and_another_for_each_seed() -> None:
    task = tiny.regression()
    stopped = [arm for arm in ARMS.values() if arm.held_out]
    assert len(stopped) == 30
    parts = [ArmRun(task, arm, 0).held_out[1] for arm in stopped]
    assert all(torch.equal(y, parts[0]) for y in parts)
    assert not torch.equal(ArmRun(task, stopped[0], 1).held_out[1], parts[0])


def scripted(
    held_out: list[float], test: list[float], *, higher: bool, epochs: int | None = None
) -> list[Row]:
    """Rows of a held-out run whose metric is what the two lists say."""
    scores: dict[int, Iterator[float]] = {}

    def metric(outputs: Tensor, targets: Tensor) -> float:
        return next(scores[len(targets)]) if len(targets) in scores else 0.0

    task = tiny.tiny(epochs=epochs or len(test))
    task = replace(task, metric=Metric("scripted", metric, higher))
    scores |= {8: iter(held_out), tiny.TEST: iter(test)}
    return finished(task, STOPPED)[1]


NAN = math.nan


@pytest.mark.parametrize(
    ("held_out", "higher", "epoch"),
    [
        ([0.1, 0.5, 0.4, 0.3], True, 2),
        ([0.1, 0.5, 0.4, 0.3], False, 1),
        ([0.5, 0.1, 0.4, 0.1], False, 2),  # the earlier of two equals
        ([0.5, 0.6, 0.6, 0.2], True, 2),
        ([NAN, 0.2, NAN, 0.1], True, 2),
        ([NAN, 0.2, NAN, 0.3], False, 2),
        ([0.4, NAN, NAN, NAN], False, 1),
    ],
)
def test_early_stopping_goes_by_the_held_out_score_alone(
    held_out: list[float], higher: bool, epoch: int
) -> None:
    test = [0.7, 0.6, 0.9, 0.8]
    *epochs, end = scripted(held_out, test, higher=higher)
    assert [row["test_metric"] for row in epochs] == test
    assert same([row["held_out_metric"] for row in epochs], held_out)
    assert (end["stopped_epoch"], end["stopped_metric"]) == (epoch, test[epoch - 1])
    assert end["held_out_best"] == held_out[epoch - 1]
    assert (end["final_metric"], end["epoch"]) == (0.8, 4)
    best = (0.9, 3) if higher else (0.6, 2)
    assert (end["best_metric"], end["best_epoch"]) == best


def test_early_stopping_gives_up_after_its_patience() -> None:
    held_out = [0.1, 0.2, 0.9] + [0.5] * 30
    *epochs, end = scripted(held_out, [0.0] * 33, higher=True)
    assert len(epochs) == end["epoch"] == 3 + PATIENCE
    assert end["stopped_epoch"] == 3


def test_patience_counts_evaluations_not_epochs() -> None:
    """150 epochs are evaluated every third."""
    *epochs, end = scripted([0.9] + [0.5] * 60, [0.0] * 60, higher=True, epochs=150)
    assert [row["epoch"] for row in epochs] == [3 * i for i in range(1, 2 + PATIENCE)]
    assert end["stopped_epoch"] == 3


def test_an_arm_that_holds_nothing_out_runs_to_the_end() -> None:
    _, (*epochs, end) = finished(tiny.tiny(epochs=30), ADAMW)
    assert len(epochs) == 30
    assert (end["stopped_metric"], end["stopped_epoch"], end["held_out_best"]) == (None,) * 3
    assert {row["held_out_metric"] for row in epochs} == {None}


# --- what it measures -----------------------------------------------------------------------------


class Constant(nn.Module):
    """Outputs that no step changes: the targets' own logits, for the first half of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([-x[:, 0], x[:, 0]], dim=1) * 100 + self.bias


def test_an_evaluation_measures_the_whole_training_and_test_set() -> None:
    """The model is right on every clean label: 12 of 40 labels are wrong."""
    task = replace(tiny.tiny(epochs=1), model=Constant)
    for arm in (ADAMW, STOPPED):
        _, (row, end) = finished(task, arm)
        assert row["test_metric"] == 1.0
        assert row["train_metric"] == 28 / 40
        assert row["memorized"] == end["final_memorized"] == 0.0
        assert row["train_loss"] > row["test_loss"]


def test_dropout_is_off_while_measuring() -> None:
    task = replace(tiny.tiny(epochs=1), model=lambda: nn.Sequential(Constant(), nn.Dropout(0.9)))
    _, (row, _) = finished(task, ADAMW)
    assert row["test_metric"] == 1.0


def test_rows_say_where_they_belong_and_are_json() -> None:
    _, rows = finished(tiny.tiny(), ARMS["poprisk"], seed=1)
    events = [(r["event"], r["arm"], r["seed"], r["epoch"], r["step"]) for r in rows]
    expected = [("epoch", "poprisk", 1, e, 5 * e) for e in range(1, 5)]
    assert events == [*expected, ("end", "poprisk", 1, 4, 20)]
    assert json.loads(json.dumps(rows)) == rows
    assert rows[-1]["final_metric"] == rows[-2]["test_metric"]
    assert rows[-1]["final_memorized"] == rows[-2]["memorized"]
    assert rows[-1]["skipped_steps"] == 0


def test_only_a_gate_has_gate_statistics() -> None:
    _, rows = finished(tiny.tiny(), ARMS["poprisk"])
    assert set(rows[0]["gate"]) == {"0", "3"}
    assert rows[0]["gate"]["0"]["coordinates"] == 40
    _, rows = finished(tiny.tiny(), ADAMW)
    assert {row.get("gate") for row in rows} == {None}


@pytest.mark.parametrize(("epochs", "evaluations"), [(1, 1), (49, 49), (100, 50), (125, 63)])
def test_about_fifty_evaluations_a_run_the_last_at_the_end(
    monkeypatch: pytest.MonkeyPatch, epochs: int, evaluations: int
) -> None:
    def advance(run: ArmRun) -> None:
        run.progress.epoch += 1

    monkeypatch.setattr(ArmRun, "_train_epoch", advance)
    *rows, end = ArmRun(tiny.tiny(epochs=epochs), ADAMW, 0).rows()
    assert len(rows) == evaluations
    assert rows[-1]["epoch"] == end["epoch"] == epochs


# --- interrupted and resumed ----------------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every evaluation."""
    monkeypatch.setattr("poprisk_lab.checkpoint.CHECKPOINT_SECONDS", -1.0)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_after_every_epoch_ends_as_if_it_had_not_been(
    tmp_path: Path, kind: str
) -> None:
    arm, task = ARMS[kind], tiny.tiny(epochs=6)
    trace = [[1e-3 * (i % 3 + 1)] * 4 for i in range(30)] if arm.follows else None
    settings: dict[str, Any] = {"trace": trace, "record": kind == "poprisk"}
    whole, expected = finished(task, arm, **settings)

    run = whole
    rows: list[Row] = []
    for epoch in range(task.epochs):
        run = ArmRun(task, arm, 0, workspace=Workspace(tmp_path / "run.safetensors"), **settings)
        assert run.resume() == (epoch > 0)
        assert run.progress.epoch == epoch
        going = run.rows()
        rows.append(next(going))
        rows.append(next(going))  # trains on, after the checkpoint; killed there
        if epoch < task.epochs - 1:
            rows.pop()
    assert same(without_time(rows), expected)
    assert torch.equal(weights(run), weights(whole))
    assert run.progress.trace == whole.progress.trace
    assert same(without_time([vars(run.progress)]), without_time([vars(whole.progress)]))


@pytest.mark.usefixtures("eager")
def test_a_checkpoint_goes_when_its_run_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    rows = ArmRun(tiny.tiny(), ADAMW, 0, workspace=Workspace(path)).rows()
    existed = [path.exists() for _ in rows]
    assert existed == [False, True, True, True, True]
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_written_when_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(poprisk_lab.checkpoint, "time", SimpleNamespace(monotonic=lambda: now))
    path = tmp_path / "run.safetensors"
    kept: list[int | None] = []
    for _ in ArmRun(tiny.tiny(epochs=8), ADAMW, 0, workspace=Workspace(path)).rows():
        kept.append(load_checkpoint(path)["progress"]["epoch"] if path.exists() else None)
        now += 9.0
    assert CHECKPOINT_SECONDS == 20.0
    assert kept == [None, None, None, 3, 3, 3, 6, 6, 6]


@pytest.mark.usefixtures("eager")
def test_a_trace_is_not_kept_in_the_header_of_a_checkpoint(tmp_path: Path) -> None:
    """The JSON header of a file of tensors holds at most 100 MB."""
    workspace = Workspace(tmp_path / "run.safetensors")
    run = ArmRun(tiny.tiny(), ARMS["poprisk"], 0, record=True, workspace=workspace)
    going = run.rows()
    next(going)
    next(going)  # saves what the first left
    state = load_checkpoint(tmp_path / "run.safetensors")
    assert state["trace"].tolist() == run.progress.trace[:5]
    assert "trace" not in state["progress"]


def test_without_a_checkpoint_a_run_starts_at_the_beginning(tmp_path: Path) -> None:
    assert not ArmRun(tiny.tiny(), ADAMW, 0).resume()
    none = Workspace(tmp_path / "none.safetensors")
    assert not ArmRun(tiny.tiny(), ADAMW, 0, workspace=none).resume()


def test_the_global_random_state_of_the_caller_does_not_matter() -> None:
    torch.manual_seed(1)
    _, first = finished(tiny.tiny(), ARMS["shuffled"])
    torch.manual_seed(2)
    torch.rand(17)
    _, second = finished(tiny.tiny(), ARMS["shuffled"])
    assert same(first, second)


def test_a_gate_that_skips_steps_says_so() -> None:
    calls = iter(range(100))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        poison = torch.is_grad_enabled() and next(calls) == 7
        return tiny.cross_entropy(outputs, targets) * (math.nan if poison else 1.0)

    task = replace(tiny.tiny(), loss=loss)
    calls = iter(range(100))  # after the trial when the task is made
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        _, rows = finished(task, ARMS["poprisk"])
    assert rows[-1]["skipped_steps"] == 1
    assert math.isfinite(rows[-1]["final_metric"])
