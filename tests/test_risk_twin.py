"""A twin changes nothing about the training of its model, and measures what the theory says."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import poprisk
from asserts import assert_bitwise
from poprisk import PopRiskAdamW, TwinRisk
from poprisk.randomness import RandomState
from poprisk.risk.twin import Probe
from reference import risk as reference
from samplers import randn

N = 60
Make = Callable[[nn.Module], Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().mean(1)


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    x = randn(N, 4, seed=seed, dtype=torch.float32)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3),
    "PopRiskAdamW": lambda m: PopRiskAdamW(m, lr=1e-2, batch_size=20, dataset_size=N),
    "gated SGD": lambda m: poprisk.gated(torch.optim.SGD(m.parameters(), lr=0.1)),
}


def make_twin(make: Make = OPTIMIZERS["AdamW"], **settings: Any) -> TwinRisk:
    return TwinRisk(network, make, cross_entropy, dataset_size=N, **settings)


def train(twin: TwinRisk, epochs: int = 3, *, accumulate: int = 1) -> None:
    """A user's loop: augmentation inside, a schedule, gradients accumulated over batches."""
    x, y = data()
    schedules = [torch.optim.lr_scheduler.StepLR(r.optimizer, 4) for r in twin.replicas]
    for _ in range(epochs):
        for i, index in enumerate(torch.randperm(N).split(20)):
            for run in twin.runs(index):
                noise = random.random() * torch.randn(len(index), 4) * float(np.random.rand())
                loss = run.loss(run.model(x[index] + noise), y[index]).mean() / accumulate
                loss.backward()
                if (i + 1) % accumulate == 0:
                    run.optimizer.step()
                    schedules[run.position].step()
                    run.optimizer.zero_grad()


def train_alone(make: Make, epochs: int = 3, *, accumulate: int = 1) -> nn.Module:
    x, y = data()
    model = network()
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4)
    for _ in range(epochs):
        for i, index in enumerate(torch.randperm(N).split(20)):
            noise = random.random() * torch.randn(len(index), 4) * float(np.random.rand())
            loss = cross_entropy(model(x[index] + noise), y[index]).mean() / accumulate
            loss.backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return model


def seed_everything() -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_model_is_trained_bitwise_as_alone(name: str, accumulate: int) -> None:
    seed_everything()
    alone = train_alone(OPTIMIZERS[name], accumulate=accumulate)
    after = RandomState.now()
    twin = make_twin(OPTIMIZERS[name], probes=2)
    seed_everything()
    train(twin, accumulate=accumulate)
    assert_bitwise(twin.model.state_dict(), alone.state_dict())
    assert after.same(RandomState.now())
    assert twin.doubt == ""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_twin_without_perturbation_is_the_model(name: str) -> None:
    twin = make_twin(OPTIMIZERS[name], delta=1e-300)
    train(twin)
    model, other = (run.model for run in twin.replicas)
    assert_bitwise(other.state_dict(), model.state_dict())


def test_the_twin_learns_tilted_labels() -> None:
    """For cross-entropy the tilted loss is that of soft labels y + δz, up to its own gradient."""
    twin = make_twin(delta=0.5)
    x, y = data()
    index = torch.arange(20, 40)
    slopes = []
    for run in twin.runs(index):
        u = run.model.eval()(x[index])
        slopes.append(torch.autograd.grad(run.loss(u, y[index]).sum(), u)[0])
    start, tilted = slopes
    scale = 0.5 * float((start - start.mean(0)).square().mean().sqrt())
    z = twin.probes[0].perturbation(index, torch.Size([3]), shift_invariant=True)
    torch.testing.assert_close(tilted, start - scale * z.float())
    torch.testing.assert_close(z.sum(1), torch.zeros(20, dtype=torch.float64))
    assert float(z.square().mean()) == pytest.approx(1, rel=0.35)


@pytest.mark.parametrize("shape", [(2,), (3,), (7,), (2, 5), (3, 5)])
def test_every_example_is_pushed_alike_where_a_shift_does_not_count(shape: tuple[int, ...]) -> None:
    """Signs that are all equal would push nothing, of two classes every other example."""
    n, c = 20_000, shape[0]
    z = Probe(n, 0).perturbation(torch.arange(n), torch.Size(shape), shift_invariant=True)
    z = z.reshape(n, c, -1).movedim(1, 2).reshape(-1, c)
    assert bool((z.abs().amax(1) > 0).all())
    centred = (torch.eye(c) - 1 / c) * c / (c - 1)
    torch.testing.assert_close(z.T @ z / len(z), centred.double(), atol=0.05, rtol=0)


def test_signs_of_outputs_that_shifts_change_are_independent() -> None:
    """Also if the same probe was asked for others before."""
    probe, index = Probe(20_000, 0), torch.arange(20_000)
    before = probe.perturbation(index, torch.Size([2]), shift_invariant=False)
    probe.perturbation(index, torch.Size([2]), shift_invariant=True)
    z = probe.perturbation(index, torch.Size([2]), shift_invariant=False)
    assert torch.equal(z, before)
    torch.testing.assert_close(z.T @ z / len(z), torch.eye(2).double(), atol=0.05, rtol=0)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_h_of_a_linear_model_is_that_of_its_smoother(decay: float) -> None:
    x, y = randn(N, 8), randn(N, 1, seed=1)
    sgd: Make = lambda m: torch.optim.SGD(m.parameters(), lr=0.2, weight_decay=decay)  # noqa: E731
    half: Loss = lambda u, y: 0.5 * (u - y).square().sum(1)  # noqa: E731

    def linear() -> nn.Module:
        model = nn.Linear(8, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        return model

    twin = TwinRisk(linear, sgd, half, dataset_size=N)
    for _ in range(30):
        for run in twin.runs(range(N)):
            run.optimizer.zero_grad()
            run.loss(run.model(x), y).mean().backward()
            run.optimizer.step()
    found = twin.estimate(x, y)
    h = reference.descent_smoother(x, lr=0.2, decay=decay, steps=30)
    z = twin.probes[0].perturbation(torch.arange(N), torch.Size([1]), shift_invariant=False)
    along = float((z.T @ h @ z).squeeze()) / N
    assert found.dof == pytest.approx(along, rel=1e-9)
    assert found.dof == pytest.approx(float(h.trace()) / N, abs=3 * reference.response_error(h))
    residual = y - h @ y
    assert found.value == pytest.approx(0.5 * float((residual / (1 - along)).square().mean()))


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
def test_the_unit_of_the_loss_does_not_matter(scale: float) -> None:
    x, y = randn(N, 4), randn(N, 2, seed=1)

    def loss(u: Tensor, y: Tensor) -> Tensor:
        return scale * squared(u, y)

    def linear() -> nn.Module:
        model = nn.Linear(4, 2).double()
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    sgd: Make = lambda m: torch.optim.SGD(m.parameters(), lr=0.2 / scale)  # noqa: E731
    twin = TwinRisk(linear, sgd, loss, dataset_size=N)
    for _ in range(20):
        for run in twin.runs(range(N)):
            run.optimizer.zero_grad()
            run.loss(run.model(x), y).mean().backward()
            run.optimizer.step()
    found = twin.estimate(x, y)
    assert found.response == pytest.approx(found.dof)
    assert 0.03 < found.dof < 0.12  # five of sixty
    assert found.value / scale == pytest.approx(found.train_loss / scale / (1 - found.dof) ** 2)


def test_mixed_precision_and_a_scaler() -> None:
    twin, (x, y) = make_twin(), data()
    scalers = [torch.amp.GradScaler("cpu", init_scale=16.0) for _ in twin.replicas]
    for index in torch.arange(N).split(20):
        for run in twin.runs(index):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = run.loss(run.model(x[index]), y[index]).mean()
            scaler = scalers[run.position]
            scaler.scale(loss).backward()
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
    assert math.isfinite(twin.estimate(x, y).value)


def test_resuming_ends_with_the_same_numbers() -> None:
    through, stopped, resumed = make_twin(), make_twin(), make_twin()
    seed_everything()
    train(through, 1)
    train(through, 1)
    seed_everything()
    train(stopped, 1)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    train(resumed, 1)
    x, y = data()
    assert resumed.estimate(x, y).value == through.estimate(x, y).value
    with pytest.raises(ValueError, match="it holds 2 models, this one 3"):
        make_twin(probes=2).load_state_dict(stopped.state_dict())


def test_estimates_leave_modes_and_randomness_alone() -> None:
    twin, (x, y) = make_twin(), data()
    train(twin, 1)
    twin.model[2].eval()  # pyrefly: ignore[bad-index]
    before = RandomState.now()
    first = twin.estimate(x, y)
    assert before.same(RandomState.now())
    assert [m.training for m in twin.model.modules()] == [True, True, True, False, True]
    batches = [(x[i], y[i], i) for i in torch.randperm(N).split(7)]
    assert twin.estimate_batches(batches).value == pytest.approx(first.value, rel=1e-6)
    assert twin.estimate(x[:30], y[:30]).losses.shape == (30,)


def test_the_cost_is_that_of_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(poprisk.risk.twin, "time", SimpleNamespace(perf_counter=clock.__next__))
    twin = make_twin(probes=2)
    train(twin, 1)
    assert twin.estimate(*data()).cost == 2


def test_a_model_whose_outputs_are_wrapped() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"logits": self.net(batch["x"])}

    forward: Callable[[nn.Module, Any], Tensor] = lambda model, x: model({"x": x})["logits"]  # noqa: E731
    x, y = data()
    twin = TwinRisk(Wrapped, OPTIMIZERS["SGD"], cross_entropy, dataset_size=y, forward=forward)
    for run in twin.runs(torch.arange(N)):
        run.loss(forward(run.model, x), y).mean().backward()
        run.optimizer.step()
    assert twin.estimate(x, y).valid


def step(twin: TwinRisk, index: Any = None, **change: Any) -> None:
    x, y = data()
    index = torch.arange(20) if index is None else index
    for run in twin.runs(index):
        inputs, targets = x[:20], y[:20]
        if run.position == 1:
            inputs, targets = change.get("x", inputs), change.get("y", targets)
        run.loss(run.model(inputs), targets).mean().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": data()[1][20:40]}, "the targets that the twin got differ"),
        ({"x": data()[0][20:40]}, "the twin's outputs differ from the model's at the first step"),
        ({"index": torch.arange(19)}, "outputs hold 20 examples, but index has 19"),
        ({"index": torch.arange(20) + 50}, r"index must lie in 0..59 .* but got 50..69"),
        ({"index": -torch.arange(20)}, r"but got -19..0"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step(make_twin(), **change)


@pytest.mark.parametrize(
    "index", [torch.rand(20), torch.ones(20) > 0, torch.ones(2, 2).long(), "a"]
)
def test_an_index_that_is_none_is_refused(index: Any) -> None:
    with pytest.raises(TypeError, match="index must"):
        step(make_twin(), index)


def test_inputs_that_differ_later_are_refused() -> None:
    twin = make_twin()
    step(twin)
    with pytest.raises(ValueError, match="the inputs that the twin got differ"):
        step(twin, x=data()[0][20:40])


class Named(nn.Module):
    """Takes its inputs in a dictionary, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, *, batch: dict[str, Any]) -> Tensor:
        return self.net(batch["parts"][0])


@pytest.mark.parametrize("change", ["value", "count"])
def test_inputs_by_name_that_differ_later_are_refused(change: str) -> None:
    x, y = data()
    twin = TwinRisk(Named, OPTIMIZERS["SGD"], cross_entropy, dataset_size=N)

    def train(other: bool) -> None:
        for run in twin.runs(torch.arange(20)):
            parts = [x[:20]]
            if other and run.position == 1:
                parts = [x[20:40]] if change == "value" else [x[:20], y]
            run.loss(run.model(batch={"parts": parts}), y[:20]).mean().backward()

    train(other=False)
    with pytest.raises(ValueError, match="the inputs that the twin got differ"):
        train(other=True)


def test_randomness_of_its_own_is_found() -> None:
    own = torch.Generator().manual_seed(0)

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + torch.randn(x.shape, generator=own))

    twin = TwinRisk(Noisy, OPTIMIZERS["SGD"], cross_entropy, dataset_size=N)
    with pytest.raises(ValueError, match=r"random in a way that runs\(\) cannot repeat"):
        step(twin)


def test_other_random_numbers_are_flagged() -> None:
    twin, (x, y) = make_twin(), data()
    for run in twin.runs(torch.arange(20)):
        run.loss(run.model(x[:20]), y[:20]).mean().backward()
        if run.position == 1:
            torch.rand(1)
    found = twin.estimate(x, y)
    assert (found.valid, found.reason) == (
        False,
        "the twin drew other random numbers than the model",
    )


def test_one_run_without_a_call_is_refused() -> None:
    twin, (x, y) = make_twin(), data()
    loop = twin.runs(torch.arange(20))
    run = next(loop)
    run.loss(run.model(x[:20]), y[:20]).mean().backward()
    next(loop)
    with pytest.raises(ValueError, match="called 1 times and its twin 0 times"):
        next(loop)


def test_a_loop_that_is_left_is_refused() -> None:
    twin = make_twin()
    loop = twin.runs(torch.arange(20))
    next(loop)
    with pytest.raises(RuntimeError, match="left before every twin had its turn"):
        next(twin.runs(torch.arange(20)))


def test_a_loss_outside_of_the_loop_is_refused() -> None:
    twin, (x, y) = make_twin(), data()
    with pytest.raises(ValueError, match="called outside of"):
        twin.replicas[1].loss(twin.model(x), y)


def test_a_loss_that_is_a_mean_is_refused() -> None:
    mean: Loss = lambda u, y: cross_entropy(u, y).mean()  # noqa: E731
    twin = TwinRisk(network, OPTIMIZERS["SGD"], mean, dataset_size=N)
    with pytest.raises(ValueError, match=r"loss must give one value per example.*reduction='none'"):
        step(twin)


@pytest.mark.parametrize("kind", ["spread mean", "normalized"])
def test_a_loss_that_mixes_examples_is_refused(kind: str) -> None:
    def loss(u: Tensor, y: Tensor) -> Tensor:
        losses = cross_entropy(u, y)
        return losses.mean().expand(len(u)) if kind == "spread mean" else losses / losses.max()

    twin = TwinRisk(network, OPTIMIZERS["SGD"], loss, dataset_size=N)
    with pytest.raises(
        ValueError, match=r"that of an example changes with the others of its batch"
    ):
        step(twin)


def test_a_loss_without_a_scale_is_refused() -> None:
    flat: Loss = lambda u, y: 0 * u.sum(1)  # noqa: E731
    twin = TwinRisk(network, OPTIMIZERS["SGD"], flat, dataset_size=N)
    with pytest.raises(ValueError, match=r"output gradient of size 0\.0"):
        step(twin)


@pytest.mark.parametrize("side", [0.0, 1.0])
def test_labels_that_are_all_the_same_have_a_scale(side: float) -> None:
    """As in DPO, where the first answer is the better one: all output gradients start alike."""

    def pairs(u: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(u, y, reduction="none").mean(1)

    def model() -> nn.Module:
        found = nn.Linear(4, 1)
        nn.init.zeros_(found.weight)
        nn.init.zeros_(found.bias)
        return found

    x, y = data()[0], torch.full((N, 1), side)
    twin = TwinRisk(model, OPTIMIZERS["SGD"], pairs, dataset_size=N)
    for _ in range(5):
        for run in twin.runs(torch.arange(N)):
            run.optimizer.zero_grad()
            run.loss(run.model(x), y).mean().backward()
            run.optimizer.step()
    found = twin.estimate(x, y)
    assert math.isfinite(found.value)
    assert found.value >= float(pairs(twin.model(x), y).mean().detach())


def test_outputs_of_changing_shape_are_refused() -> None:
    twin = TwinRisk(network, OPTIMIZERS["SGD"], lambda u, y: u.square().sum(1), dataset_size=N)
    step(twin)
    run = next(twin.runs(torch.arange(2)))
    with pytest.raises(ValueError, match=r"keep their shape from batch to batch, \(3,\)"):
        run.loss(run.model(torch.ones(2, 4))[:, :2], torch.ones(2))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


def test_a_loader_counts_as_its_data() -> None:
    loader = DataLoader(TensorDataset(*data()), batch_size=20)
    twin = TwinRisk(network, OPTIMIZERS["SGD"], cross_entropy, dataset_size=loader)
    assert twin.dataset_size == N


@pytest.mark.parametrize("size", [None, Stream(), DataLoader(Stream()), iter([1]), 1, True, 2.0])
def test_data_of_unknown_length_are_refused(size: Any) -> None:
    with pytest.raises(TypeError, match="dataset_size must be the number of training examples"):
        TwinRisk(network, OPTIMIZERS["SGD"], cross_entropy, dataset_size=size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"make_model": nn.Linear(4, 3)}, "make_model must be a function that returns a module"),
        ({"make_model": lambda: 3}, "make_model must return a module, but returned int"),
        ({"make_optimizer": torch.optim.SGD([torch.ones(1)])}, "each twin needs its own"),
        ({"loss": 3}, "loss must be callable, but got 3"),
    ],
)
def test_factories_that_are_none_are_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "make_model": network,
        "make_optimizer": OPTIMIZERS["SGD"],
        "loss": cross_entropy,
    }
    with pytest.raises(TypeError, match=message):
        TwinRisk(*{**good, **change}.values(), dataset_size=N)


@pytest.mark.parametrize(("name", "value"), [("delta", 0.0), ("delta", math.inf), ("probes", 0)])
def test_settings_that_are_none_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        make_twin(**{name: value})  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize("groups", [torch.zeros(N), torch.zeros(3), "a"])
def test_groups_that_are_none_are_refused(groups: Any) -> None:
    twin = make_twin()
    train(twin, 1)
    with pytest.raises(ValueError, match="groups must"):
        twin.estimate(*data(), groups=groups)


def test_a_response_per_class() -> None:
    twin, (x, y) = make_twin(), data()
    train(twin, 1)
    y = y.clamp(max=1)  # the third class is rare
    found, one = twin.estimate(x, y, parts=y), twin.estimate(x, y)
    assert len(found.parts) == 2
    assert len(one.parts) == 1
    assert found.dof == one.dof == one.parts[0].dof
    batches = [(x[i], y[i], i) for i in torch.arange(N).split(25)]
    assert twin.estimate_batches(batches, parts=y).value == pytest.approx(found.value, rel=1e-6)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (torch.zeros(3), r"parts must be a tensor of one id an example, \(60,\), but got \(3,\)"),
        ("class", "but got str"),
        ((torch.arange(N) < 9).long(), "parts must have at least 10 examples .* one has 9"),
    ],
)
def test_parts_that_are_none_are_refused(parts: Any, message: str) -> None:
    twin = make_twin()
    train(twin, 1)
    with pytest.raises(ValueError, match=message):
        twin.estimate(*data(), parts=parts)


# --- hooks, empty batches, low precision ----------------------------------------------------------


def test_a_twin_has_the_hooks_on_parameters_that_its_model_has() -> None:
    """A mask that freezes a weight freezes the twin's: they end with the same number there."""

    def make() -> nn.Module:
        model = nn.Linear(4, 1)
        mask = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
        model.weight.register_hook(lambda g: g * mask)  # pyrefly: ignore
        return model

    x, y = data()
    twin = TwinRisk(make, OPTIMIZERS["SGD"], squared, dataset_size=N)
    start = twin.model.weight.detach().clone()  # pyrefly: ignore
    for index in torch.arange(N).split(20):
        for run in twin.runs(index):
            run.optimizer.zero_grad()
            run.loss(run.model(x[index]), y[index, None].float()).mean().backward()
            run.optimizer.step()
    moved = [(run.model.weight.detach() - start)[0] for run in twin.replicas]  # pyrefly: ignore
    assert [float(m[0]) for m in moved] == [0.0, 0.0]
    assert not torch.equal(moved[0], moved[1])


def test_a_hook_with_a_step_of_its_own_is_refused_before_anything_is_made() -> None:
    def make() -> nn.Module:
        model = nn.Linear(4, 1)
        model.weight.register_post_accumulate_grad_hook(lambda p: None)  # pyrefly: ignore
        return model

    made: list[nn.Module] = []

    def optimizer(model: nn.Module) -> Optimizer:
        made.append(model)
        return OPTIMIZERS["SGD"](model)

    with pytest.raises(ValueError, match=r"weight has a post-accumulate-grad hook"):
        TwinRisk(make, optimizer, squared, dataset_size=N)
    assert made == []


def test_an_empty_batch_is_refused() -> None:
    twin = TwinRisk(network, OPTIMIZERS["SGD"], cross_entropy, dataset_size=N)
    with pytest.raises(ValueError, match="index must hold at least one example"):
        next(twin.runs(torch.arange(0)))
    assert twin.steps == 0


def test_a_single_example_gives_no_valid_estimate() -> None:
    x, y = data()
    twin = TwinRisk(lambda: nn.Linear(4, 3), OPTIMIZERS["SGD"], cross_entropy, dataset_size=N)
    for run in twin.runs(torch.arange(N)):
        run.loss(run.model(x), y).mean().backward()
        run.optimizer.step()
    found = twin.estimate(x[:1], y[:1])
    assert (found.valid, found.reason) == (
        False,
        "a single example or group leaves no standard error",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_scale_of_a_loss_that_takes_one_dtype_only(dtype: torch.dtype) -> None:
    """``huber_loss`` has no derivative for outputs of one dtype and targets of another."""
    x, y = data()

    def huber(u: Tensor, y: Tensor) -> Tensor:
        return F.huber_loss(u, y, reduction="none").sum(1)

    twin = TwinRisk(lambda: nn.Linear(4, 1).to(dtype), OPTIMIZERS["SGD"], huber, dataset_size=N)
    for run in twin.runs(torch.arange(N)):
        run.loss(run.model(x.to(dtype)), y[:, None].to(dtype)).mean().backward()
    assert math.isfinite(twin.estimate(x.to(dtype), y[:, None].to(dtype)).value)
