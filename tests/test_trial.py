"""What is tried when a task is made: the whole class of errors that would else come after hours.

Each bad task is refused with one line that names the part; each odd but sound one is trained by
every arm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asserts import assert_bitwise
from poprisk import Metric, Task
from poprisk.randomness import RandomState
from poprisk.task.batches import LAST_BATCH, batch_sizes, last_batch, split_batches
from poprisk_lab.arms import default_arms
from poprisk_lab.fit import ArmRun

N, TEST, BATCH = 113, 40, 16
CE = nn.CrossEntropyLoss(reduction="none")
Function = Callable[[Any, Any], Any]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, XT = randn(N, 8), randn(TEST, 8, seed=1)
Y, YT = (X[:, 0] > 0).long(), (XT[:, 0] > 0).long()
R, RT = X[:, :1] - X[:, 1:2], XT[:, :1] - XT[:, 1:2]


def net(inputs: int = 8, outputs: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 12), nn.ReLU(), nn.Linear(12, outputs))


def classes(*, loss: Function = CE, **parts: Any) -> Task:
    """Two classes; ``parts`` take the place of what it is made of."""
    known: dict[str, Any] = {
        "model": net,
        "loss": loss,
        "train": (X, Y),
        "test": (XT, YT),
        "epochs": 2,
        "batch_size": BATCH,
    }
    return Task("classes", **known | parts)


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().flatten(1).mean(1)


def numbers(*, loss: Function = squared, **parts: Any) -> Task:
    """A line; targets (n, 1)."""
    known: dict[str, Any] = {
        "model": lambda: net(outputs=1),
        "loss": loss,
        "train": (X, R),
        "test": (XT, RT),
        "metric": "mse",
        "epochs": 2,
        "batch_size": BATCH,
    }
    return Task("numbers", **known | parts)


def scored(name: str, function: Function, *, higher: bool = True) -> Metric:
    return Metric(name, function, higher)


def changed(t: Tensor, i: Any, value: Any) -> Tensor:
    t = t.clone()
    t[i] = value
    return t


class Wrapped(nn.Module):
    """A net whose outputs go through a function."""

    def __init__(self, then: Callable[[Tensor], Any], *, training_only: bool = False) -> None:
        super().__init__()
        self.inner, self.then, self.training_only = net(), then, training_only

    def forward(self, x: Tensor) -> Any:
        u = self.inner(x)
        return self.then(u) if self.training or not self.training_only else u


def wrapped(then: Callable[[Tensor], Any], **more: bool) -> Callable[[], nn.Module]:
    return lambda: Wrapped(then, **more)


def frozen() -> nn.Module:
    return net().requires_grad_(False)


def poison(u: Tensor) -> Tensor:
    """NaN in its gradient only."""
    return u + 0 * u.square().sum(1, keepdim=True).sub(u.square().sum(1, keepdim=True)).sqrt()


SHARED = net()


class LearnedTemperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.ones(()))

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        return CE(u / self.t, y)


def failing_metric(u: Tensor, y: Tensor) -> float:
    raise LookupError("no such class")


class Ragged:
    """A data set whose rows differ in shape from one on."""

    def __init__(self, row: Callable[[int], Any]) -> None:
        self.row = row

    def __len__(self) -> int:
        return 60

    def __getitem__(self, i: int) -> Any:
        return self.row(i)


BAD: dict[str, tuple[Callable[[], Task], str]] = {
    # labels
    "label too large": (
        lambda: classes(train=(X, changed(Y, 50, 2))),
        r"loss failed on train\[50\], target 2: IndexError: Target 2 is out of bounds",
    ),
    "label too large in the test set": (
        lambda: classes(test=(XT, changed(YT, 39, 7))),
        r"loss failed on test\[39\], target 7: IndexError",
    ),
    "label too small": (
        lambda: classes(train=(X, changed(Y, 112, -1))),
        r"loss failed on train\[112\], target -1",
    ),
    "labels from one": (
        lambda: classes(train=(X, Y + 1)),
        r"loss failed on train\[\d+\], target 2",
    ),
    "a clean label out of range": (
        lambda: classes(clean=changed(Y, 7, 5)),
        r"clean\[7\] has label 5, but model gives 2 classes, 0 to 1",
    ),
    "a label that only accuracy minds": (
        lambda: classes(
            train=(X, changed(Y, 50, 2)),
            loss=lambda u, y: F.cross_entropy(u, y.clamp(max=1), reduction="none"),
        ),
        r"train\[50\] has label 2, but model gives 2 classes",
    ),
    "an ignored class": (
        lambda: classes(loss=nn.CrossEntropyLoss(ignore_index=0, reduction="none")),
        r"loss is zero for label 0 .*would count the \d+ of them in train; set them to -100",
    ),
    "a class that a function ignores": (
        lambda: classes(
            train=(X, Y.clamp(min=1)),
            loss=lambda u, y: F.cross_entropy(u, y, ignore_index=0, reduction="none"),
        ),
        "loss is zero for label 0 .* of them in test",
    ),
    "a class of weight zero": (
        lambda: classes(
            loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0]), reduction="none")
        ),
        "loss is zero for label 1 ",
    ),
    "padding among tokens": (
        lambda: classes(
            model=lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 1)),
            loss=lambda u, y: F.cross_entropy(u, y, ignore_index=2, reduction="none").mean(1),
            train=(X, torch.stack([Y, 1 - Y, Y, 0 * Y + 2], 1)),
            test=(XT, torch.stack([YT, YT, YT, YT], 1)),
        ),
        "loss is zero for label 2 .*count the 113 of them in train",
    ),
    "one class only": (
        lambda: classes(train=(X, torch.ones_like(Y))),
        "train targets are all 1: with one class there is nothing to learn",
    ),
    "all labels ignored": (
        lambda: classes(train=(X, torch.full_like(Y, -100))),
        "train targets are all one that is ignored",
    ),
    "int32 labels": (
        lambda: classes(train=(X, Y.int())),
        r"loss failed on train\[0\], target \d: .*\(outputs are float32, targets int32: convert",
    ),
    "float labels": (
        lambda: classes(train=(X, Y.float())),
        r"loss failed on train\[0\], target [01].0: ",
    ),
    "bool labels": (lambda: classes(train=(X, Y.bool())), r"loss failed on train\[0\], target "),
    "test labels of another type": (
        lambda: classes(test=(XT, YT.int())),
        r"loss failed on test\[0\]",
    ),
    "clean targets with NaN": (
        lambda: numbers(clean=changed(R, 3, float("nan"))),
        "clean holds NaN or Inf",
    ),
    # losses
    "all with all": (
        lambda: numbers(train=(X, R[:, 0]), test=(XT, RT[:, 0]), loss=lambda u, y: (u - y) ** 2),
        r"one value per example.*\(113, 113\).*Outputs are \(113, 1\) and targets \(113,\): torch "
        "compares all with all",
    ),
    "all with all, averaged": (
        lambda: numbers(
            train=(X, R[:, 0]), test=(XT, RT[:, 0]), loss=lambda u, y: ((u - y) ** 2).mean(1)
        ),
        "changes with the others of its batch.*torch compares all with all",
    ),
    "targets of one more dimension": (
        lambda: numbers(
            model=lambda: nn.Sequential(net(outputs=1), nn.Flatten(0)),
            loss=lambda u, y: ((u - y) ** 2).mean(1),
        ),
        r"Outputs are \(113,\) and targets \(113, 1\): torch compares all with all",
    ),
    "a loss across the batch": (
        lambda: classes(loss=lambda u, y: CE(u, y) / CE(u, y).sum()),
        "loss gives one value per example, but that of an example changes with the others",
    ),
    "an average": (
        lambda: classes(loss=nn.CrossEntropyLoss()),
        r"loss must give one value per example, shape \(113,\).*reduction='none'",
    ),
    "no number": (lambda: classes(loss=lambda u, y: None), "per example.* but gave NoneType"),
    "integers": (
        lambda: classes(loss=lambda u, y: u.argmax(1) - y),
        "loss must give floating-point numbers, but gave torch.int64",
    ),
    "no derivative": (
        lambda: classes(loss=lambda u, y: (u.argmax(1) != y).float()),
        "loss cannot be differentiated in the parameters",
    ),
    "detached": (
        lambda: classes(loss=lambda u, y: CE(u.detach(), y)),
        "loss cannot be differentiated in the parameters",
    ),
    "derivative zero": (
        lambda: numbers(loss=lambda u, y: (u.round() - y).abs().mean(1)),
        "loss has derivative zero in all outputs",
    ),
    "NaN for one label": (
        lambda: numbers(
            train=(X, changed(R.abs(), 77, -1.0)), loss=lambda u, y: y.sqrt()[:, 0] * u[:, 0]
        ),
        r"loss is nan for train\[77\], target \[-1.0\], at the initial weights",
    ),
    "Inf in the test set": (
        lambda: numbers(test=(XT, changed(RT, 9, 1e30)), loss=squared),
        r"loss is inf for test\[9\]",
    ),
    "NaN in the gradient": (
        lambda: classes(model=wrapped(poison)),
        r"the gradient of inner\.0\.weight holds NaN or Inf on a batch of 17 in training mode",
    ),
    "a loss that learns": (
        lambda: classes(loss=LearnedTemperature()),
        "loss has trainable parameters, which no arm would train",
    ),
    # models
    "no parameters": (
        lambda: classes(model=lambda: nn.Flatten()),
        "model has nothing to train: it has no parameters",
    ),
    "all frozen": (
        lambda: classes(model=frozen),
        "model has nothing to train: all parameters are frozen",
    ),
    "always the same": (
        lambda: classes(model=lambda: SHARED),
        "model must return a new module at each call",
    ),
    "a shared part": (
        lambda: classes(model=lambda: nn.Sequential(SHARED, nn.Linear(2, 2))),
        "model must return a new module at each call",
    ),
    "a sparse embedding": (
        lambda: classes(
            model=lambda: nn.Sequential(nn.EmbeddingBag(9, 8, sparse=True), nn.Linear(8, 2)),
            train=(X.abs().long(), Y),
            test=(XT.abs().long(), YT),
        ),
        r"sparse gradient for 0\.weight.*sparse=False",
    ),
    "a tuple": (
        lambda: classes(model=wrapped(lambda u: (u, u))),
        "model must return one tensor of outputs, but returned tuple",
    ),
    "a tuple in training": (
        lambda: classes(model=wrapped(lambda u: (u, u), training_only=True)),
        "model must return one tensor of outputs, but returned tuple",
    ),
    "rows lost": (
        lambda: classes(model=wrapped(lambda u: u[:-1])),
        r"one row of outputs per example, \(113, ...\) for 113 examples, but gave shape \(112, 2\)",
    ),
    "nothing depends on the weights": (
        lambda: classes(model=wrapped(lambda u: u.detach().requires_grad_())),
        "no parameter of model gets a gradient",
    ),
    "batch normalization of single examples": (
        lambda: classes(
            model=lambda: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
            batch_size=1,
        ),
        r"model failed on a batch of 1 in training mode \(113 examples, batch_size=1\): "
        "ValueError: Expected more than 1 value per channel",
    ),
    "the last batch of the fifth held out": (  # 64 has no last batch, its four fifths one of 4
        lambda: classes(
            model=wrapped(lambda u: u if len(u) > 4 else u[:, 5:6] @ u),
            train=(X[:64], Y[:64]),
        ),
        r"model failed on a batch of 4 in training mode \(64 examples, batch_size=16\)",
    ),
    "an embedding that is too small": (
        lambda: classes(
            model=lambda: nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(2, 2)),
            train=(changed(Y[:, None], 90, 4), Y),
            test=(YT[:, None], YT),
        ),
        r"model failed on train\[90\], int64 of shape \(113, 1\): IndexError: index out of range",
    ),
    # inputs
    "integer inputs": (
        lambda: classes(train=(X.long(), Y)),
        r"model failed on the train inputs, int64 of shape \(113, 8\): .*"
        r"\(the weights are float32, the inputs int64: convert",
    ),
    "double inputs": (
        lambda: classes(train=(X.double(), Y)),
        "the weights are float32, the inputs float64: convert",
    ),
    "test inputs of another type": (
        lambda: classes(test=(XT.double(), YT)),
        r"model failed on the test inputs, float64 of shape \(40, 8\)",
    ),
    "test inputs of another shape": (
        lambda: classes(test=(XT[:, :5], YT)),
        r"model failed on the test inputs, float32 of shape \(40, 5\)",
    ),
    "NaN in one row": (
        lambda: classes(train=(changed(X, (50, 3), float("nan")), Y)),
        "train inputs hold NaN or Inf",
    ),
    "test targets of another shape": (
        lambda: numbers(test=(XT, RT[:, 0]), loss=lambda u, y: ((u - y) ** 2).mean(1)),
        r"Outputs are \(40, 1\) and targets \(40,\): torch compares all with all",
    ),
    "rows of different shapes": (
        lambda: classes(train=Ragged(lambda i: (torch.zeros(8 if i < 31 else 9), i % 2))),
        r"train must hold inputs of one shape, but train\[16\] has \(8,\) and train\[31\] \(9,\)",
    ),
    "targets of different shapes": (
        lambda: classes(test=Ragged(lambda i: (torch.zeros(8), [0] * (1 + i // 40)))),
        r"test must hold targets of one shape, but test\[32\] has \(1,\) and test\[40\] \(2,\)",
    ),
    "rows of text": (
        lambda: classes(train=Ragged(lambda i: ("a cat", i % 2))),
        r"train\[0\] must hold a tensor or numbers as input, but got str",
    ),
    # scores
    "one column": (
        lambda: classes(
            model=lambda: net(outputs=1),
            loss=lambda u, y: F.binary_cross_entropy_with_logits(
                u[:, 0], y.float(), reduction="none"
            ),
        ),
        "accuracy compares columns of outputs, but model gives one column only",
    ),
    "a metric that fails": (
        lambda: classes(metric=scored("f", failing_metric)),
        "metric 'f' failed on the train set: LookupError: no such class",
    ),
    "a metric that fails on the test set": (
        lambda: classes(
            metric=scored("f", lambda u, y: 1.0 if len(y) == N else failing_metric(u, y))
        ),
        "metric 'f' failed on the test set: LookupError",
    ),
    "a metric of many numbers": (
        lambda: classes(metric=scored("f", lambda u, y: u.argmax(1) == y)),
        r"metric 'f' must give one number, but gave \(113,\) on the train set",
    ),
    "a metric that gives nothing": (
        lambda: classes(metric=scored("f", lambda u, y: None)),
        "metric 'f' must give one number, but gave NoneType",
    ),
    "no metric": (
        lambda: classes(metric=Metric("f", cast(Any, 3))),
        "metric must hold a function of outputs and targets, but got 3",
    ),
    "a metric of all with all": (
        lambda: numbers(
            train=(X, R[:, 0]),
            test=(XT, RT[:, 0]),
            loss=lambda u, y: (u[:, 0] - y).square(),
            metric=scored("error", lambda u, y: float((u - y).square().mean()), higher=False),
        ),
        r"metric 'error' gives .* for outputs \(113, 1\) and targets \(113,\), but .* compares all",
    ),
    "memorization of other shapes": (
        lambda: numbers(
            model=lambda: net(outputs=2),
            loss=lambda u, y: (u[:, :1] - y).square()[:, 0],
            metric=scored(
                "error", lambda u, y: float((u[:, :1] - y).square().mean()), higher=False
            ),
            clean=R + 1,
        ),
        "clean was given, but memorization cannot be measured",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_task_that_would_fail_is_refused_when_it_is_made(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600


# --- odd, but right -------------------------------------------------------------------------------


class Forces(nn.Module):
    """Differentiates an energy in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0][:, :1]


class Counting(nn.Module):
    """Keeps state in its forward pass, also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.register_buffer("mean", torch.zeros(8))
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.inner(x - self.mean)


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def partly_frozen() -> nn.Module:
    model = net()
    model.get_submodule("0").requires_grad_(False)
    return model


def with_unused() -> nn.Module:
    model = Wrapped(torch.clone)
    model.unused = nn.Linear(3, 3)
    return model


ODD: dict[str, Callable[[], Task]] = {
    "batch normalization": lambda: classes(model=batch_norm),
    "lazy modules": lambda: classes(
        model=lambda: nn.Sequential(
            nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2)
        )
    ),
    "forces": lambda: numbers(model=Forces),
    "state": lambda: classes(model=Counting),
    "a frozen layer": lambda: classes(model=partly_frozen),
    "an unused layer": lambda: classes(model=with_unused),
    "more classes than examples": lambda: classes(
        model=lambda: net(outputs=30), train=(X[:20], torch.arange(20))
    ),
    "byte labels": lambda: classes(train=(X, Y.byte()), test=(XT, YT.byte())),
    "ignored labels": lambda: classes(train=(X, changed(Y, slice(0, 20), -100))),
    "double": lambda: numbers(
        model=lambda: net(outputs=1).double(),
        train=(X.double(), R.double()),
        test=(XT.double(), RT.double()),
    ),
    "double targets": lambda: numbers(train=(X, R.double()), test=(XT, RT.double())),
    "an embedding with a largest norm": lambda: classes(
        model=lambda: nn.Sequential(
            nn.Embedding(9, 3, max_norm=0.5), nn.Flatten(), nn.Linear(24, 2)
        ),
        train=(X.abs().long(), Y),
        test=(XT.abs().long(), YT),
    ),
    "a test set of one": lambda: classes(test=(XT[:1], YT[:1])),
    "few examples": lambda: classes(train=(X[:6], Y[:6]), batch_size=5),
    "residuals": lambda: numbers(train=(X, 0 * R), test=(XT, 0 * RT)),
    "a random loss": lambda: numbers(loss=lambda u, y: squared(u + torch.randn_like(u), y)),
}
ARMS = default_arms(full=True)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_task_is_trained_by_every_arm(name: str) -> None:
    task = ODD[name]()
    for arm in ARMS:
        if arm.name.startswith(("adamw", "stopped")) and "lr0.001-wd0.01" not in arm.name:
            continue
        tensors = len([*task.new_model().parameters()])
        run = ArmRun(task, arm, 0, trace=[[1e-3] * tensors] * 99 if arm.follows else None)
        before = [p.detach().clone() for p in run.model.parameters()]
        *epochs, end = run.rows()
        assert len(epochs) == 2
        assert end["skipped_steps"] == 0
        assert all(torch.isfinite(torch.tensor(row["train_loss"])) for row in epochs)
        assert any(
            not torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True)
        )


def test_a_task_of_a_compiled_model_is_taken() -> None:
    task = classes(model=lambda: torch.compile(net(), backend="eager"))
    *_, end = ArmRun(task, ARMS[0], 0).rows()
    assert end["final_metric"] >= 0


def test_making_a_task_leaves_no_trace() -> None:
    """Neither in the random numbers nor in what the loss keeps."""
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]), reduction="none")
    before = RandomState.now()
    classes(model=lambda: nn.Sequential(net(), nn.Dropout(0.5)), loss=loss)
    assert before.same(RandomState.now())
    assert loss.training
    assert_bitwise(loss.state_dict(), {"weight": torch.tensor([1.0, 2.0])})


def test_an_evaluation_leaves_no_trace_in_a_model() -> None:
    run = ArmRun(ODD["state"](), ARMS[0], 0)
    run._train_epoch()
    model = cast(Counting, run.model)
    state, calls = copy.deepcopy(model.state_dict()), list(model.calls)
    run.evaluate()
    assert_bitwise(model.state_dict(), state)
    assert model.calls == calls


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "size", "sizes"),
    [
        (8, 4, [4, 4]),
        (9, 4, [4, 5]),
        (10, 4, [4, 4, 2]),
        (5, 4, [5]),
        (3, 1, [1, 1, 1]),
        (3, 2, [3]),
        (4, 8, [4]),
        (1, 8, [1]),
    ],
)
def test_a_last_batch_of_one_joins_the_one_before(n: int, size: int, sizes: list[int]) -> None:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    batches = split_batches(order, size)
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat([*batches]), order)
    assert batch_sizes(n, size) == sorted(set(sizes), reverse=True)
    assert last_batch(n, size) == LAST_BATCH * any(s > size for s in sizes)


@pytest.mark.parametrize(
    ("n", "size", "least", "sizes"),
    [(70, 32, 16, [32, 38]), (80, 32, 16, [32, 32, 16]), (5, 32, 16, [5]), (3, 1, 16, [1, 1, 1])],
)
def test_a_last_batch_of_few_joins_the_one_before(
    n: int, size: int, least: int, sizes: list[int]
) -> None:
    batches = split_batches(torch.arange(n), size, least=least)
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat([*batches]), torch.arange(n))


def test_all_arms_and_the_twin_cut_an_epoch_alike() -> None:
    """113 and its four fifths, 91, leave 1 and 11; 16 divides neither."""
    seen: list[int] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = batch_norm()

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(len(x))
            return self.inner(x)

    task = classes(model=Watched, epochs=1)
    for arm, times, n in ((ARMS[0], 1, 113), (ARMS[0], 2, 113), (STOPPED, 1, 91)):
        seen.clear()
        [*ArmRun(task, arm, 0, with_twin=times == 2).rows()]
        whole = [16] * 6 + [17] if n == 113 else [16] * 5 + [11]
        assert seen == [size for size in whole for _ in range(times)]


STOPPED = next(arm for arm in ARMS if arm.held_out)
