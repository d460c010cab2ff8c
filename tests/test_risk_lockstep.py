"""A twin follows a model in another loop: bit for bit without a push, or it says why it cannot."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from poprisk import Lockstep, PopRiskAdamW, PopRiskSOAP, TwinRisk, gated
from poprisk.risk import lockstep as lockstep_module
from processes import Call, at_once
from risk_ranks import WORLD, follow

N, C, BATCH, PARTS = 96, 3, 8, 4
NONE = 1e-300
"""A perturbation that single precision has no number for."""
LOSS = nn.CrossEntropyLoss(reduction="none")


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, 5, generator=g), torch.randint(C, (N,), generator=g)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.Linear(16, C)
    )


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "PopRiskAdamW": lambda m: PopRiskAdamW(m, lr=1e-2, batch_size=BATCH * PARTS, dataset_size=N),
    "second moment": lambda m: PopRiskAdamW(m, lr=1e-2, variance="second-moment"),
    "PopRiskSOAP": lambda m: PopRiskSOAP(m, lr=1e-2, variance="ema", factors="gradient"),
    "gated SGD": lambda m: gated(
        torch.optim.SGD(m.parameters(), lr=0.1), batch_size=BATCH * PARTS, dataset_size=N
    ),
}


def clip(model: nn.Module, _: Any = None) -> None:
    clip_grad_norm_(model.parameters(), 0.3)


def steps(count: int) -> Iterator[Tensor]:
    """Examples of each step, of an order that does not depend on what else is drawn."""
    for step in range(count):
        yield torch.randperm(N, generator=torch.Generator().manual_seed(step))[: BATCH * PARTS]


def trained(
    optimizer: str = "AdamW",
    *,
    follow: bool = True,
    amp: bool = False,
    count: int = 13,
    model: nn.Module | None = None,
    objective: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    after_step: Callable[[nn.Module, int], None] = lambda model, step: None,
    each: Callable[[nn.Module, Lockstep], None] = lambda model, lockstep: None,
    clipping: Callable[..., None] | None = clip,
    **settings: Any,
) -> tuple[nn.Module, Lockstep | None]:
    """A loop that knows of its lockstep only what it is told."""
    x, y = data()
    model = net() if model is None else model
    opt = OPTIMIZERS[optimizer](model)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min(1.0, (t + 1) / 5))
    settings = {"delta": NONE, "clip": clip, **settings}
    lockstep = Lockstep(model, opt, LOSS, dataset_size=N, **settings) if follow else None
    torch.manual_seed(2)
    for step, batch in enumerate(steps(count)):
        for index in batch.split(BATCH):
            if lockstep is not None:
                lockstep.batch(index, y[index])
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = objective(model(x[index]), y[index]) / PARTS
            loss.backward()
        if clipping is not None:
            clipping(model)
        opt.step()
        schedule.step()
        opt.zero_grad()
        after_step(model, step)
        if lockstep is not None:
            each(model, lockstep)
    return model, lockstep


def followed(**settings: Any) -> Lockstep:
    found = trained(**settings)[1]
    assert found is not None
    return found


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def is_the_model(model: nn.Module, lockstep: Lockstep) -> None:
    assert same(model, lockstep.twin.replicas[1].model)


def is_not_the_model(model: nn.Module, lockstep: Lockstep) -> None:
    assert not same(model, lockstep.twin.replicas[1].model)


@pytest.mark.parametrize("amp", [False, True], ids=["single", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_a_push_a_twin_is_the_model_after_every_step(optimizer: str, amp: bool) -> None:
    lockstep = followed(optimizer=optimizer, amp=amp, each=is_the_model)
    assert lockstep.twin.steps == 13
    assert not lockstep.twin.doubt
    followed(optimizer=optimizer, amp=amp, each=is_not_the_model, delta=0.3, count=3)


def test_a_loop_trains_as_it_would_alone() -> None:
    with_it, _ = trained(delta=0.3)
    after = torch.rand(3)
    alone, _ = trained(follow=False)
    assert same(with_it, alone)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("probes", [1, 2])
def test_an_estimate_is_that_of_a_twin_in_a_loop_of_its_own(probes: int) -> None:
    x, y = data()
    lockstep = followed(optimizer="SGD", delta=0.3, probes=probes)
    found = lockstep.twin.estimate(x, y)

    def opt(model: nn.Module) -> torch.optim.Optimizer:
        return OPTIMIZERS["SGD"](model)

    # Its scale is that of the first part of the first batch.
    twin = TwinRisk(net, opt, LOSS, dataset_size=N, probes=probes)
    torch.manual_seed(2)
    rates = [min(1.0, (t + 1) / 5) * 0.1 for t in range(13)]
    with pytest.MonkeyPatch.context() as patch:

        def scale(*_: Any) -> Any:
            return lockstep.twin._scale, lockstep.twin._sample

        patch.setattr("poprisk.risk.twin._gradient_scale", scale)
        for rate, batch in zip(rates, steps(13), strict=True):
            for run in twin.runs(batch):
                run.optimizer.param_groups[0]["lr"] = rate
                # The parts of an accumulation, as one call of the loss takes whole batches.
                parts = [run.model(x[index]) for index in batch.split(BATCH)]
                run.loss(torch.cat(parts), y[batch]).mean().backward()
                clip(run.model)
                run.optimizer.step()
                run.optimizer.zero_grad()
    expected = twin.estimate(x, y)
    assert found.valid
    assert expected.valid
    assert found.dof > 0.02
    assert found.value == pytest.approx(expected.value, rel=1e-4)
    assert found.dof == pytest.approx(expected.dof, rel=1e-3)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-2)


class Own(nn.Module):
    """A model that computes its own loss, as those of transformers."""

    def __init__(self, *, smoothing: float = 0.0, half: bool = False) -> None:
        super().__init__()
        self.net, self.smoothing, self.other = net(), smoothing, half

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        u = self.net(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(u, labels, label_smoothing=self.smoothing)
        logits = u.double() if self.other else u  # not what the loss was made of
        return {"loss": loss, "logits": logits, "hidden": (u.sum(1),)}


def own_loss(
    model: Own, *, whole: bool = False, delta: float = NONE, penalty: float = 0.0, count: int = 12
) -> Lockstep:
    x, y = data()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = Lockstep(
        model, opt, LOSS, dataset_size=N, delta=delta, forward=lambda m, x: m(x)["logits"]
    )
    torch.manual_seed(2)
    for batch in steps(count):
        for index in batch.split(BATCH):
            found.batch(index, y[index])
            result = model(x[index], labels=y[index])
            loss = result["loss"]
            loss *= 1.0  # in place, as the Trainer does
            if penalty:
                loss = loss + penalty * result["hidden"][0].square().mean()
            (loss if whole else loss / PARTS).backward()
        opt.step()
        opt.zero_grad()
        if delta == NONE:
            is_the_model(model, found)
    return found


@pytest.mark.parametrize("half", [False, True], ids=["of the loss", "other ones"])
def test_a_model_that_computes_its_own_loss(half: bool) -> None:
    own_loss(Own(half=half))
    inside = own_loss(Own(half=half), delta=0.3).twin.estimate(*data())
    x, y = data()
    model = Own()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    outside = Lockstep(model, opt, LOSS, dataset_size=N, forward=lambda m, x: m(x)["logits"])
    torch.manual_seed(2)
    for batch in steps(12):
        for index in batch.split(BATCH):
            outside.batch(index, y[index])
            (F.cross_entropy(model(x[index])["logits"], y[index]) / PARTS).backward()
        opt.step()
        opt.zero_grad()
    assert inside.value == pytest.approx(outside.twin.estimate(x, y).value, rel=1e-5)


@pytest.mark.parametrize("half", [False, True], ids=["by gradient", "by value"])
def test_another_loss_of_the_model_is_noticed(half: bool) -> None:
    with pytest.raises(ValueError, match="is not the mean of `loss` over the batch"):
        own_loss(Own(half=half, smoothing=0.2))
    with pytest.raises(ValueError, match=r"back-propagates through output\['hidden'\]\[0\]"):
        own_loss(Own(), penalty=0.1)


def test_a_loss_may_sum_the_parts_of_a_step() -> None:
    own_loss(Own(), whole=True)


def test_a_step_that_runs_the_loop_inside() -> None:
    """As Lightning's: the forward pass within ``step(closure)``."""
    x, y = data()
    model = net()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = Lockstep(model, opt, LOSS, dataset_size=N, delta=NONE)
    for index in steps(12):
        found.batch(index, y[index])

        def closure(index: Tensor = index) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            return loss

        opt.step(closure)
        is_the_model(model, found)


def weights_of_classes(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, weight=torch.tensor([1.0, 2.0, 3.0]))


def decayed(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.99)


def penalized(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda u, y: (
        F.cross_entropy(u, y) + sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
    )


def unclipped(*_: Any) -> None:
    """Leave the gradients."""


MODEL = net()
OTHER_LOSS = "is not the mean of `loss` over the batch"
OTHER_GRADIENTS = "the gradients of a copy that is trained without a perturbation"


def negative(u: Tensor, y: Tensor) -> Tensor:
    return -F.cross_entropy(u, y)


def clipped_more(model: nn.Module, _: Optimizer) -> None:
    clip_grad_norm_(model.parameters(), 0.2)


def tripled(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.mul_(3)


def doubled(grad: Tensor) -> Tensor:
    return 2 * grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": partial(F.cross_entropy, label_smoothing=0.1)}, OTHER_LOSS),
        ({"objective": weights_of_classes}, OTHER_LOSS),
        ({"objective": negative}, OTHER_LOSS),
        ({"model": MODEL, "objective": penalized(MODEL)}, OTHER_GRADIENTS),
        ({"clip": None}, OTHER_GRADIENTS),
        ({"clip": clipped_more}, OTHER_GRADIENTS),
        ({"clipping": tripled}, OTHER_GRADIENTS),
        ({"after_step": decayed}, "something else than the optimizer changes the model's weights"),
    ],
    ids=["smoothed", "weighted", "negative", "penalty", "clipped", "other", "scaled", "decayed"],
)
def test_what_cannot_be_followed_is_refused_at_once(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"the twin cannot follow this training: .*{message}"):
        trained(count=2, **settings)


def test_a_hook_on_gradients_is_noticed() -> None:
    model = net()

    def hooked(m: nn.Module, lockstep: Lockstep) -> None:
        next(m.parameters()).register_hook(doubled)

    with pytest.raises(ValueError, match="hooks on gradients"):
        trained(model=model, each=hooked, count=3)


def test_a_scaler_of_gradients_is_noticed() -> None:
    x, y = data()
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    found = Lockstep(model, opt, LOSS, dataset_size=N)
    scaler = torch.amp.GradScaler("cpu")
    index = torch.arange(BATCH)
    found.batch(index, y[index])
    scaler.scale(F.cross_entropy(model(x[index]), y[index])).backward()
    with pytest.raises(ValueError, match="a GradScaler"):
        scaler.step(opt)


def test_what_changes_later_is_a_doubt() -> None:
    """Training goes on, and no estimate is believed."""
    step = 0

    def count(model: nn.Module, _: int) -> None:
        nonlocal step
        step += 1

    def turned(u: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(u, y, label_smoothing=0.2 if step >= 11 else 0.0)

    with pytest.warns(RuntimeWarning, match="no estimate of the twin is valid from now on"):
        found = followed(objective=turned, after_step=count, delta=0.3)
    assert found.twin.steps == 13
    estimate = found.twin.estimate(*data())
    assert not estimate.valid
    assert not estimate.comparable
    assert OTHER_LOSS in estimate.reason


def test_weights_are_looked_at_later_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockstep_module, "CHECKED_EVERY", 12)

    def late(model: nn.Module, step: int) -> None:
        if step == 12:
            decayed(model, step)

    with pytest.warns(RuntimeWarning, match="something else than the optimizer changes"):
        trained(after_step=late, count=14)


@pytest.mark.filterwarnings("ignore:PopRiskAdamW skipped a step:RuntimeWarning")
def test_a_gradient_that_is_not_finite_passes() -> None:
    """An optimizer may skip such a step, and its twin does with it."""

    def spoiled(u: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(u, y) * (torch.nan if int(y.sum()) % 9 == 0 else 1.0)

    _, found = trained(
        optimizer="PopRiskAdamW", objective=spoiled, clipping=None, clip=None, each=is_the_model
    )
    assert found is not None
    assert not found.twin.doubt
    assert 0 < found.twin.optimizer.skipped_steps < 13  # pyrefly: ignore[missing-attribute]


def test_a_killed_run_goes_on_with_the_same_twin(tmp_path: Path) -> None:
    x, y = data()

    def start() -> tuple[nn.Module, torch.optim.Optimizer, Lockstep]:
        model = net()
        opt = OPTIMIZERS["PopRiskAdamW"](model)
        return model, opt, Lockstep(model, opt, LOSS, dataset_size=N)

    def go(model: nn.Module, opt: Any, lockstep: Lockstep, batches: list[Tensor]) -> None:
        for index in batches:
            lockstep.batch(index, y[index])
            F.cross_entropy(model(x[index]), y[index]).backward()
            opt.step()
            opt.zero_grad()

    batches = list(steps(24))
    torch.manual_seed(3)
    whole = start()
    go(*whole, batches[:12])
    state = {
        "model": whole[0].state_dict(),
        "optimizer": whole[1].state_dict(),
        "twin": whole[2].state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(state, tmp_path / "state.pt")
    go(*whole, batches[12:])

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model, opt, lockstep = start()
    with pytest.raises(ValueError, match="saved beside other weights of the model"):
        lockstep.load_state_dict(state["twin"])
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])
    with pytest.raises(ValueError, match=r"is not a Lockstep's: it has no \['followed'"):
        lockstep.load_state_dict({"models": [], "optimizers": [], "seconds": []})
    lockstep.load_state_dict(state["twin"])
    torch.set_rng_state(state["random"])
    go(model, opt, lockstep, batches[12:])
    assert same(whole[2].twin.replicas[1].model, lockstep.twin.replicas[1].model)
    mine, its = (each.twin.estimate(x, y) for each in (lockstep, whole[2]))
    assert mine.valid
    assert (mine.value, mine.standard_error) == (its.value, its.standard_error)


def test_what_was_learned_before_is_a_doubt() -> None:
    model, _ = trained(follow=False, count=2)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    opt.step()
    opt.zero_grad()
    found = Lockstep(model, opt, LOSS, dataset_size=N)
    found.batch(range(N), y)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    assert "the optimizer had taken steps before" in found.twin.estimate(x, y).reason


def test_it_is_told_of_every_batch() -> None:
    x, y = data()
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    found = Lockstep(model, opt, LOSS, dataset_size=N)
    assert "TwinRisk" in repr(found)
    with pytest.raises(ValueError, match="one row for each of the 3 positions of index"):
        found.batch([0, 1, 2], y[:2])
    with pytest.raises(ValueError, match=r"index must lie in 0..95"):
        found.batch([96], y[:1])
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="examples were not told"):
        opt.step()
    found.batch([0, 1, 2], y[:3])
    with pytest.raises(ValueError, match="one row for each of the 3 examples"):
        model(x)
    found.remove()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    F.cross_entropy(model(x), y).backward()
    opt.step()


class Watched(nn.Module):
    """Calls a part of the model, not the model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_part_that_is_called_instead_is_noticed() -> None:
    x, y = data()
    model = Watched()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    found = Lockstep(model, opt, LOSS, dataset_size=N)
    found.batch(range(N), y)
    F.cross_entropy(model.net(x), y).backward()
    with pytest.raises(ValueError, match="is a part of it called instead"):
        opt.step()


def compiled() -> Any:
    return torch.compile(net(), backend="eager")


def hooked() -> nn.Module:
    model = net()
    next(model.parameters()).register_post_accumulate_grad_hook(ignored)
    return model


def ignored(p: Tensor) -> None:
    pass


def lbfgs(model: nn.Module) -> Optimizer:
    return torch.optim.LBFGS(model.parameters())


def of_another(model: nn.Module) -> Optimizer:
    return OPTIMIZERS["SGD"](net())


def told_of_gradients(model: nn.Module) -> Optimizer:
    return PopRiskAdamW(model, variance="microbatch")


def told_of_factors(model: nn.Module) -> Optimizer:
    return PopRiskSOAP(model, variance="ema")


@pytest.mark.parametrize(
    ("model", "optimizer", "message"),
    [
        (compiled, OPTIMIZERS["SGD"], "a twin follows no compiled model"),
        (hooked, OPTIMIZERS["SGD"], "has a post-accumulate-grad hook"),
        (net, lbfgs, "LBFGS calls the model several times"),
        (net, of_another, "must hold parameters of the model"),
        (
            net,
            told_of_gradients,
            r"PopRiskAdamW\(variance='microbatch'\) is told of gradients by the loop",
        ),
        (net, told_of_factors, r"PopRiskSOAP\(factors='examples'\) is told of gradients"),
    ],
    ids=["compiled", "hooked", "LBFGS", "others", "microbatch", "factors"],
)
def test_what_cannot_be_copied_is_refused(model: Any, optimizer: Any, message: str) -> None:
    made = model()
    with pytest.raises(ValueError, match=message):
        Lockstep(made, optimizer(made), LOSS, dataset_size=N)


def test_a_group_that_is_added_is_refused() -> None:
    x, y = data()
    model = net()
    first, *rest = model.parameters()
    opt = torch.optim.SGD(rest, lr=0.1)
    found = Lockstep(model, opt, LOSS, dataset_size=N)
    opt.add_param_group({"params": [first]})
    found.batch(range(N), y)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="a group of parameters was added"):
        opt.step()


def test_layers_that_are_frozen_on_the_way() -> None:
    def freeze(model: nn.Module, step: int) -> None:
        if step == 3:
            for p in list(model.parameters())[:2]:
                p.requires_grad_(False)
            model[3].eval()  # pyrefly: ignore[bad-index]

    trained(after_step=freeze, each=is_the_model)


def test_bad_arguments_leave_the_model_alone() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    opt = OPTIMIZERS["SGD"](model)
    with pytest.raises(TypeError, match="clip must be callable"):
        Lockstep(model, opt, LOSS, dataset_size=N, clip=1.0)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim optimizer"):
        Lockstep(model, OPTIMIZERS, LOSS, dataset_size=N)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(TypeError, match="dataset_size must be the number of training examples"):
        Lockstep(model, opt, LOSS, dataset_size=iter(()))
    assert not model._forward_hooks
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_several_processes_are_refused(tmp_path: Path) -> None:
    for process in at_once(*(Call(follow, (rank, tmp_path)) for rank in range(WORLD))):
        assert process.code == 0, process.stderr
    for rank in range(WORLD):
        message = json.loads((tmp_path / f"followed {rank}.json").read_text())
        assert message.startswith("a twin follows a run on one process, but there are 2")
