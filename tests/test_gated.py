import doctest
import inspect
import io
import pickle
import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler

from asserts import assert_bitwise, assert_close, nothing_changes
from cases import DECOUPLED, MASKS, REDUCTIONS, WRAPPED
from poprisk import PopRiskAdamW, gated
from poprisk.optim.settings import GATE_SETTINGS, MODES
from poprisk.optim.wrapper import GatedOptimizer, rewrite_step
from samplers import (
    copies,
    grad_rows,
    noisy_grads,
    observed_masks,
    parameter,
    take_steps,
    trajectory,
)

each_wrapped = pytest.mark.parametrize("name", WRAPPED)
each_mask = pytest.mark.parametrize("mask", MASKS)
SIZES = {"batch_size": 5, "dataset_size": 50}


def sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def last(weights: list[list[Tensor]]) -> list[Tensor]:
    return weights[-1]


def total_state(opt: Any) -> dict[str, Any]:
    """Weights and the whole state of a wrapper, copied."""
    return deepcopy(
        {"w": [p.detach() for g in opt.param_groups for p in g["params"]], **opt.state_dict()}
    )


def closed(mean_sq: list[Tensor], var: list[Tensor], **_: float) -> list[Tensor]:
    """A mask that lets nothing pass."""
    return [torch.zeros_like(x) for x in mean_sq]


@each_mask
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha", ["auto", "fresh", 0.3])
@pytest.mark.parametrize("mode", MODES)
def test_gated_adamw_is_pop_risk_adamw(
    mask: str, reduction: str | None, alpha: float | str, mode: str
) -> None:
    """Weight decay included: neither gates it."""
    shared: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.3, "eps": 1e-2}
    gate: dict[str, Any] = {"mask": mask, "reduction": reduction, "alpha": alpha, **SIZES}
    gate["mode"] = mode
    starts = [parameter(4), parameter(2, 3), parameter(3, dtype=torch.complex128)]
    rows: list[list[Tensor | None]] = [[*row] for row in grad_rows(starts, 20)]
    rows[0][1] = rows[5][0] = None
    ours = trajectory(lambda ps: PopRiskAdamW(ps, **shared, **gate), starts, rows)
    wrapped = trajectory(
        lambda ps: gated(torch.optim.AdamW(ps, **shared), **gate, eps=1e-2), starts, rows
    )
    for a, b in zip(wrapped, ours, strict=True):
        assert_close(a, b, 1e-13)


@each_wrapped
@each_mask
def test_the_gate_multiplies_the_update_of_any_optimizer(name: str, mask: str) -> None:
    """These updates do not depend on the weights, so they are those of the optimizer alone."""
    start, grads = parameter(3, 4), noisy_grads(12, 3, 4)
    rows = [[g] for g in grads]
    alone = [start.detach(), *(w for (w,) in trajectory(WRAPPED[name], [start], rows))]
    masks = observed_masks(grads, mask=mask, **SIZES)
    updates = [q * (b - a) for q, a, b in zip(masks, alone, alone[1:], strict=False)]
    expected = list((start + torch.stack(updates).cumsum(0)).detach())
    actual = trajectory(lambda ps: gated(WRAPPED[name](ps), mask=mask, **SIZES), [start], rows)
    assert_close([w for (w,) in actual], expected, 1e-12)
    assert any(0 < q.mean() < 1 for q in masks)


@each_wrapped
def test_an_open_gate_leaves_the_trajectory_alone(name: str) -> None:
    """To a few units in the last place: the update is rounded once more when it is added."""
    starts = [parameter(3, 4), parameter(5, 2)]
    rows = grad_rows(starts, 50)
    alone = trajectory(WRAPPED[name], starts, rows)
    wrapped = trajectory(lambda ps: gated(WRAPPED[name](ps), q_min=1.0), starts, rows)
    assert_close(last(wrapped), last(alone), 5e-15)


@pytest.mark.parametrize("name", DECOUPLED)
def test_an_open_gate_keeps_decoupled_weight_decay(name: str) -> None:
    start, rows = parameter(3, 4), [[g] for g in noisy_grads(20, 3, 4)]
    alone = trajectory(DECOUPLED[name], [start], rows)
    wrapped = trajectory(lambda ps: gated(DECOUPLED[name](ps), q_min=1.0), [start], rows)
    assert_close(last(wrapped), last(alone), 1e-13)


@pytest.mark.parametrize("name", DECOUPLED)
def test_decoupled_weight_decay_is_not_gated(name: str) -> None:
    w = parameter(3, 4)
    opt = gated(DECOUPLED[name]([w]), mask=closed)
    rows = [[g] for g in noisy_grads(6, 3, 4)]
    (start,) = take_steps(opt, rows[:1])[-1]
    (end,) = take_steps(opt, rows[1:])[-1]
    torch.testing.assert_close(end, start * (1 - 0.1 * 0.5) ** 5, rtol=1e-13, atol=0)
    assert opt.param_groups[0]["weight_decay"] == 0.5


class DecayLast(Optimizer):
    """Weights shrink after the update, and the update with them."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad).mul_(1 - group["lr"] * group["weight_decay"])


@pytest.mark.parametrize("name", [*DECOUPLED, "last"])
@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_a_rewritten_step_decays_as_the_optimizer_does(name: str, kept: float) -> None:
    """Other parameters, without gradient, stay where they are."""
    build, last = ({**DECOUPLED, "last": DecayLast}[name], name == "last")
    start, (g,) = parameter(3, 4), noisy_grads(1, 3, 4)
    (plain,) = trajectory(build, [start], [[g]])[0]
    shrunk = start.detach() * (1 - 0.1 * 0.5)
    whole, seen = plain - shrunk, list[Tensor]()
    w, idle = copies([start, start])
    w.grad, opt = g, build([w, idle])

    def rewrite(p: Tensor, update: Tensor) -> Tensor:
        assert p is w
        seen.append(update)
        return kept * update

    with torch.no_grad():
        rewrite_step(opt, rewrite)
    close = torch.testing.assert_close
    close(w.detach(), shrunk + kept * whole, rtol=1e-12, atol=1e-14)
    close(seen[0], whole / (1 - 0.1 * 0.5 if last else 1), rtol=1e-12, atol=1e-14)
    assert_bitwise(idle, start)
    assert opt.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize("mask", ["soft", closed])
def test_weight_decay_after_the_update_is_not_gated(mask: Any) -> None:
    w, (plain,) = parameter(3, 4), copies([parameter(3, 4)])
    opt, alone = gated(DecayLast([w]), mask=mask), DecayLast([plain])
    rows = [[g] for g in noisy_grads(2, 3, 4)]
    take_steps(alone, rows[:1])
    (start,) = take_steps(opt, rows[:1])[-1]  # nothing is gated yet
    torch.testing.assert_close(start, plain.detach(), rtol=1e-13, atol=0)
    (end,) = take_steps(opt, rows[1:])[-1]
    if mask is closed:
        torch.testing.assert_close(end, start * (1 - 0.1 * 0.5), rtol=1e-13, atol=0)
    else:
        q = observed_masks([row[0] for row in rows])[1]
        torch.testing.assert_close(end, (start - 0.1 * q * rows[1][0]) * (1 - 0.1 * 0.5))


def test_weight_decay_that_enters_the_gradient_is_gated_with_it() -> None:
    w = parameter(3)
    opt = gated(torch.optim.SGD([w], lr=0.1, weight_decay=0.5), mask=closed)
    rows = [[g] for g in noisy_grads(4, 3)]
    assert_bitwise(take_steps(opt, rows[:1]), take_steps(opt, rows[1:])[-1:])


def test_an_error_of_the_optimizer_leaves_its_weight_decay() -> None:
    w = parameter(3, 4)
    opt = torch.optim.AdamW([w], weight_decay=0.5)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    opt.register_step_pre_hook(fail)
    w.grad = torch.ones_like(w)
    with pytest.raises(ZeroDivisionError):
        gated(opt).step()
    assert opt.param_groups[0]["weight_decay"] == 0.5


def test_an_error_after_the_step_puts_the_weights_back() -> None:
    params = [parameter(3, 4), parameter(2)]
    opt = gated(sgd(params))
    take_steps(opt, grad_rows(params, 2))
    before = [p.detach().clone() for p in params]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    opt.optimizer.register_step_post_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    assert_bitwise(params, before)


def test_an_error_while_loading_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opt = stepped(sgd, parameter(3))
    before, load = total_state(opt), opt.optimizer.load_state_dict

    def fail(state: dict[str, Any]) -> None:
        load(state)
        raise KeyboardInterrupt

    monkeypatch.setattr(opt.optimizer, "load_state_dict", fail)
    with pytest.raises(KeyboardInterrupt):
        opt.load_state_dict(stepped(lambda ps: torch.optim.SGD(ps, 9.0), parameter(3)).state_dict())
    assert_bitwise(total_state(opt), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    w = parameter(8, dtype=dtype)
    opt = gated(sgd([w]))
    take_steps(opt, grad_rows([w], 5))
    expected = torch.complex64 if dtype.is_complex else torch.float32
    assert {opt.state[w][key].dtype for key in ("exp_avg", "grad_mean_var")} == {expected}
    assert bool(w.isfinite().all())


def test_weights_that_were_moved_to_double_precision_are_kept_in_it() -> None:
    w, twin = (parameter(5, dtype=torch.float32) for _ in range(2))
    opt, alone = gated(sgd([w]), q_min=1.0), sgd([twin])
    for t, g in enumerate(noisy_grads(6, 5)):
        if t == 3:
            for p in (w, twin):
                p.data = p.data.double()
            for state in (opt.optimizer.state, alone.state):
                (entries,) = state.values()
                entries["momentum_buffer"] = entries["momentum_buffer"].double()
            with torch.no_grad():
                w.copy_(twin)
        for o in (opt, alone):
            take_steps(o, [[g.to(w.dtype)]])
    assert opt.state[w]["exp_avg"].dtype == torch.float64
    torch.testing.assert_close(w, twin, rtol=1e-13, atol=1e-13)


def test_the_gradient_is_never_written() -> None:
    w = parameter(4)
    rows = grad_rows([w], 4)
    before = deepcopy(rows)
    take_steps(gated(sgd([w])), rows)
    assert_bitwise(rows, before)


NOT_WRAPPED: dict[str, tuple[Callable[[list[Parameter]], Any], str]] = {
    "LBFGS": (torch.optim.LBFGS, "LBFGS cannot be gated: it needs a closure"),
    "PopRiskAdamW": (PopRiskAdamW, "PopRiskAdamW is gated already"),
    "gated": (lambda ps: gated(sgd(ps)), "GatedOptimizer is gated already"),
    "class": (lambda _: torch.optim.SGD, "takes a torch optimizer, but got type"),
    "None": (lambda _: None, "but got NoneType"),
}


@pytest.mark.parametrize(("make", "message"), NOT_WRAPPED.values(), ids=NOT_WRAPPED)
def test_what_cannot_be_gated(make: Callable[[list[Parameter]], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        gated(make([parameter(2)]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"beta1": 1.0}, "beta"),
        ({"rho": 1.0}, "rho"),
        ({"mask": "none"}, "mask"),
        ({"alpha": "finite"}, "dataset_size"),
        ({"batch_size": 9, "dataset_size": 9}, "full batch"),
        ({"q_min": 1.5}, "q_min"),
    ],
)
def test_bad_settings(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated(sgd([parameter(2)]), **bad)


@pytest.mark.parametrize("make", [gated, GatedOptimizer])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"variance": "exact"}, ValueError, "variance=\"ema\" only, but got 'exact'"),
        ({"variance": "second-moment"}, ValueError, 'variance="ema" only'),
        ({"variance": "none"}, ValueError, "variance must be one of"),
        ({"mode": "letter"}, ValueError, "mode must be one of"),
        ({"eps": -1.0}, ValueError, "eps must lie in"),
        ({"gate": 1}, TypeError, "gate must be True or False"),
        ({"foreach": True}, TypeError, "foreach"),
        ({"fused": 1}, TypeError, "fused must be True, False or None"),
        ({"fused": True, "mask": closed}, TypeError, "fused=True needs a mask by name"),
    ],
)
def test_what_a_wrapped_optimizer_cannot_have_is_refused_by_name(
    make: Any, bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    w = parameter(2)
    before = w.detach().clone()
    with pytest.raises(error, match=message):
        make(sgd([w]), **bad)
    assert_bitwise(w.detach(), before)


def test_the_class_takes_the_arguments_of_the_function() -> None:
    made = GatedOptimizer(sgd([parameter(2)]), rho=0.5, mode="paper")
    assert made.settings == gated(sgd([parameter(2)]), rho=0.5, mode="paper").settings


def test_every_argument_of_the_gate_has_the_name_it_has_in_the_optimizer() -> None:
    """All of :data:`GATE_SETTINGS`, and two; the average gradient's decay alone is called beta1."""
    mine = set(inspect.signature(gated).parameters) - {"optimizer", "beta1"}
    assert mine == {*GATE_SETTINGS, "eps", "fused"}
    assert mine <= set(inspect.signature(PopRiskAdamW).parameters)
    theirs = inspect.signature(PopRiskAdamW).parameters
    for name, argument in inspect.signature(gated).parameters.items():
        if name in mine:
            assert argument.default == theirs[name].default, name


@each_wrapped
def test_without_the_gate_steps_are_the_optimizers_own(name: str) -> None:
    """Up to rounding, where decay is taken apart from the update."""
    starts = [parameter(3, 4), parameter(2, 2)]
    rows = grad_rows(starts, 8)
    alone = trajectory(WRAPPED[name], starts, rows)
    wrapped = trajectory(lambda ps: gated(WRAPPED[name](ps), gate=False), starts, rows)
    assert_close(last(wrapped), last(alone), 5e-15)


def test_sparse_gradients_are_refused() -> None:
    w = parameter(2)
    w.grad = torch.ones_like(w).to_sparse()
    opt = gated(sgd([w]))
    before = total_state(opt)
    with pytest.raises(RuntimeError, match="sparse=False"):
        opt.step()
    assert_bitwise(total_state(opt), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    params = [parameter(3), parameter(2)]
    opt = gated(sgd(params))
    take_steps(opt, grad_rows(params, 3))
    before = total_state(opt)
    good, spoilt = grad_rows(params, 1)[0]
    spoilt[-1] = bad
    params[0].grad, params[1].grad = good, spoilt
    with pytest.warns(RuntimeWarning, match="gated optimizer skipped") as record:
        opt.step()
    opt.step()
    assert opt.skipped_steps == opt.state_dict()["param_groups"][0]["gate_skipped_steps"] == 2
    before["param_groups"][0]["gate_skipped_steps"] = 2
    assert_bitwise(total_state(opt), before)
    assert (len(record), record[0].filename) == (1, __file__)


def test_a_closure_is_evaluated_once_with_gradients() -> None:
    w = parameter(3)
    opt, calls = gated(sgd([w])), list[bool]()

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    loss: Any = opt.step(closure)  # pyrefly: ignore
    assert loss.requires_grad
    assert calls == [True]
    assert opt.step(lambda: None) is None


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3),
    "one cycle, momentum too": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_may_hold_the_wrapper_or_the_wrapped(
    make: Callable[[Optimizer], Any],
) -> None:
    def run(*, on_the_wrapper: bool) -> list[list[Tensor]]:
        inner = sgd([parameter(4)])
        opt = gated(inner)
        scheduler, weights = make(opt if on_the_wrapper else inner), list[list[Tensor]]()
        for g in noisy_grads(10, 4):
            weights += take_steps(opt, [[g]])
            scheduler.step()
        return weights

    expected = run(on_the_wrapper=False)
    assert_bitwise(run(on_the_wrapper=True), expected)
    constant = take_steps(gated(sgd([parameter(4)])), [[g] for g in noisy_grads(10, 4)])
    assert not torch.equal(expected[-1][0], constant[-1][0])


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_wrapped
def test_going_on_after_a_load_equals_never_having_stopped(name: str) -> None:
    starts = [parameter(3, 4, dtype=torch.float32), parameter(2, 2, dtype=torch.float32)]
    rows = grad_rows(starts, 8)
    expected = trajectory(lambda ps: gated(WRAPPED[name](ps)), starts, rows)
    first = gated(WRAPPED[name](copies(starts)))
    weights = take_steps(first, rows[:4])
    second = gated(WRAPPED[name](copies(last(weights))))
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    assert_bitwise(second.state_dict(), first.state_dict())
    assert_bitwise(weights + take_steps(second, rows[4:]), expected)


def test_loading_a_state_of_before_the_first_step_forgets_all_steps() -> None:
    opt = gated(sgd([parameter(3)]))
    initial = deepcopy(opt.state_dict())
    take_steps(opt, [[g] for g in noisy_grads(3, 3)])
    opt.load_state_dict(initial)
    assert_bitwise(opt.state_dict(), initial)


def test_saved_settings_replace_present_ones_and_others_stay() -> None:
    """Both the optimizer's and the gate's; what an old state does not know keeps its value."""
    saved = gated(torch.optim.SGD([parameter(3)], lr=0.3, momentum=0.5), rho=0.5, beta1=0.7)
    opt = gated(torch.optim.SGD([parameter(3)], lr=0.1, nesterov=True, momentum=0.9))
    state = saved.state_dict()
    del state["param_groups"][0]["nesterov"]
    with pytest.warns(RuntimeWarning, match=r"beta1.*rho"):
        opt.load_state_dict(state)
    group = opt.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.3, 0.5, True)
    assert (opt.settings["rho"], opt.settings["betas"]) == (0.5, (0.7, 0.0))


REFUSED: dict[str, Callable[[], Any]] = {
    "another optimizer's": lambda: stepped(torch.optim.Adam, parameter(3)).state_dict(),
    "another shape": lambda: stepped(sgd, parameter(4)).state_dict(),
    "more parameters": lambda: stepped(sgd, parameter(3), parameter(2)).state_dict(),
    "empty": dict,
    "None": lambda: None,
}


def stepped(build: Callable[[Any], Optimizer], *params: Parameter) -> GatedOptimizer:
    opt = gated(build([*params]))
    take_steps(opt, grad_rows(params, 3))
    return opt


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(make: Callable[[], Any]) -> None:
    opt = stepped(sgd, parameter(3))
    before, state = total_state(opt), make()
    with pytest.raises((ValueError, TypeError), match="state"):
        opt.load_state_dict(state)
    assert_bitwise(total_state(opt), before)


def unpickled(opt: GatedOptimizer) -> GatedOptimizer:
    return pickle.loads(pickle.dumps(opt))


@pytest.mark.parametrize("duplicate", [deepcopy, unpickled])
def test_copies_go_on_alike(duplicate: Callable[[Any], Any]) -> None:
    opt = stepped(sgd, parameter(3))
    twin, rows = duplicate(opt), [[g] for g in noisy_grads(3, 3, seed=5)]
    assert_bitwise(take_steps(twin, rows), take_steps(opt, rows))


def test_a_group_can_be_added_later() -> None:
    """Settings that it lacks come from the wrapped optimizer's defaults."""
    starts = [parameter(3), parameter(2)]
    rows = grad_rows(starts, 5)
    params = copies(starts)
    opt = gated(sgd(params[:1]))
    opt.add_param_group({"params": params[1:]})
    expected = trajectory(lambda ps: gated(sgd(ps)), starts, rows)
    assert_bitwise(take_steps(opt, rows), expected)


@each_mask
def test_statistics_are_those_of_pop_risk_adamw(mask: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    twin = deepcopy(model)
    ours = PopRiskAdamW(model, weight_decay=0.0, mask=mask)
    wrapped = gated(torch.optim.AdamW(twin.parameters(), weight_decay=0.0), mask=mask)
    for opt in (ours, wrapped):
        take_steps(opt, grad_rows(list(model.parameters()), 10))
    expected, actual = ours.gate_stats(), wrapped.gate_stats(twin)
    assert set(actual) == {"0", "1"}
    for name, stats in actual.items():
        assert [*stats] == pytest.approx([*expected[name]], rel=1e-6)


def test_statistics_of_the_first_step() -> None:
    opt = gated(sgd([parameter(3)]))
    take_steps(opt, [[g] for g in noisy_grads(1, 3)])
    assert opt.gate_stats()["groups[0]"] == (1.0, 1.0, 1.0, False, 3)


def test_statistics_count_a_gradient_without_noise() -> None:
    opt = gated(sgd([parameter(3)]), beta1=0.0)
    take_steps(opt, [[torch.ones(3, dtype=torch.float64)]] * 4)
    assert opt.gate_stats()["groups[0]"] == (1.0, 1.0, 1.0, False, 3)


def test_statistics_do_not_change_the_optimizer() -> None:
    opt = gated(sgd([parameter(3), parameter(2)]))
    take_steps(opt, [[*noisy_grads(1, 3), None]])
    before = total_state(opt)
    with nothing_changes(opt.optimizer):
        opt.gate_stats()
    assert_bitwise(total_state(opt), before)


def test_examples_in_the_documentation() -> None:
    failed, attempted = doctest.testmod(sys.modules["poprisk.optim.wrapper"])
    assert failed == 0 < attempted
