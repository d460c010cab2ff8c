"""PopRiskAdamW and a gated optimizer where torch's own optimizers are expected."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler

import samplers
from asserts import assert_bitwise, nothing_changes
from poprisk import GatedOptimizer, PopRiskAdamW, gated
from samplers import copies, grad_rows, noisy_grads, parameter, randn, take_steps

Make = Callable[..., Any]
SIZES: dict[str, Any] = {"batch_size": 8, "dataset_size": 100}


def gated_sgd(params: Any, **changes: Any) -> GatedOptimizer:
    return gated(torch.optim.SGD(params, lr=0.05, momentum=0.9), **SIZES | changes)


def gated_adamw(params: Any, **changes: Any) -> GatedOptimizer:
    return gated(torch.optim.AdamW(params, lr=0.05), **SIZES | changes)


def pop(params: Any, **changes: Any) -> PopRiskAdamW:
    return PopRiskAdamW(params, lr=0.05, **SIZES | changes)


OURS: dict[str, Make] = {"PopRiskAdamW": pop, "gated SGD": gated_sgd, "gated AdamW": gated_adamw}
each = pytest.mark.parametrize("make", OURS.values(), ids=OURS)

NINE: dict[str, dict[str, Any]] = {
    "default": {},
    "loop": {"foreach": False},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "second-moment": {"variance": "second-moment"},
    "paper": {"mode": "paper"},
    "per tensor": {"reduction": "per_tensor"},
    "no gate": {"gate": False},
    "maximize": {"maximize": True},
}
each_setting = pytest.mark.parametrize("settings", NINE.values(), ids=NINE)


def stepped(make: Make, params: Sequence[Parameter], steps: int = 3, **changes: Any) -> Any:
    opt = make([*params], **changes)
    take_steps(opt, grad_rows(params, steps))
    return opt


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def unpickled(opt: Any) -> Any:
    return pickle.loads(pickle.dumps(opt))


# What torch asks of its own optimizers, in nine settings.


@each
def test_gradients_are_cleared_as_torch_clears_them(make: Make) -> None:
    w = Parameter(randn(3))
    opt, w.grad = make([w]), randn(3)
    opt.zero_grad(set_to_none=False)
    assert w.grad is not None
    assert not w.grad.any()
    opt.zero_grad()
    assert w.grad is None


@each_setting
def test_the_loss_goes_down_and_schedulers_go_along(settings: dict[str, Any]) -> None:
    w, b, x = Parameter(randn(10, 5)), Parameter(randn(10)), randn(5)
    opt = PopRiskAdamW([w, b], lr=1e-2, **settings)
    steps, plateau = lr_scheduler.StepLR(opt, 10, 0.9), lr_scheduler.ReduceLROnPlateau(opt)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (w.mv(x) + b).square().sum()
        loss.backward()
        return loss

    first = float(closure().detach())
    for _ in range(30):
        loss = opt.step(closure).detach()
        steps.step()
        plateau.step(loss)
    assert (float(loss) > first) == bool(settings.get("maximize"))


@each_setting
def test_no_gradient_no_step(settings: dict[str, Any]) -> None:
    w = parameter(3)
    before = w.detach().clone()
    PopRiskAdamW([w], **settings).step()
    assert_bitwise(w.detach(), before)


@each_setting
def test_weight_decay_by_group(settings: dict[str, Any]) -> None:
    w, b = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    groups = [{"params": [w], "weight_decay": 0.9}, {"params": [b], "weight_decay": 0}]
    take_steps(PopRiskAdamW(groups, lr=0.01, **settings), [[torch.zeros(3)] * 2] * 20)
    torch.testing.assert_close(w.detach(), torch.full((3,), (1 - 0.009) ** 20))
    assert bool((b == 1).all())


@each_setting
def test_a_learning_rate_may_be_a_tensor(settings: dict[str, Any]) -> None:
    start = parameter(5)
    (p,), (q,) = copies([start]), copies([start])
    opts = [PopRiskAdamW([p], lr=0.01, **settings)]
    opts.append(PopRiskAdamW([q], lr=torch.tensor(0.01), **settings))
    schedules = [lr_scheduler.StepLR(opt, 2, 0.5) for opt in opts]
    for g in noisy_grads(6, 5):
        for opt, schedule in zip(opts, schedules, strict=True):
            take_steps(opt, [[g]])
            schedule.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


@each_setting
def test_groups_of_one_learning_rate_tensor_part(settings: dict[str, Any]) -> None:
    """Or stay together, as torch has it."""

    def rates(kind: Any, **changes: Any) -> list[float]:
        groups = [{"params": [parameter(5)]}, {"params": [parameter(5)]}]
        opt = kind(groups, lr=torch.tensor(1e-2), **changes)
        lr_scheduler.LambdaLR(opt, [lambda _: 1.0, lambda _: 0.1])
        return [float(g["lr"]) for g in opt.param_groups]

    assert rates(PopRiskAdamW, **settings) == rates(torch.optim.AdamW)


@each_setting
def test_complex_numbers_are_pairs(settings: dict[str, Any]) -> None:
    if "reduction" in settings:
        settings = {}
    z = Parameter(randn(4, dtype=torch.complex128))
    pair = Parameter(torch.view_as_real(z.detach()).clone())
    rows = noisy_grads(5, 4, dtype=torch.complex128)
    take_steps(PopRiskAdamW([z], **settings), [[g] for g in rows])
    take_steps(PopRiskAdamW([pair], **settings), [[torch.view_as_real(g)] for g in rows])
    torch.testing.assert_close(torch.view_as_real(z.detach()), pair.detach(), rtol=1e-12, atol=0)


@each_setting
@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_copies_go_on_alike(settings: dict[str, Any], copied: Callable[[Any], Any]) -> None:
    opt = stepped(PopRiskAdamW, [parameter(5)], **settings)
    twin, rows = copied(opt), [[g] for g in noisy_grads(3, 5, seed=8)]
    assert_bitwise(take_steps(twin, rows), take_steps(opt, rows))


@each_setting
def test_a_number_for_the_step_count(settings: dict[str, Any]) -> None:
    w = parameter(5)
    opt = stepped(PopRiskAdamW, [w], **settings)
    state = copy.deepcopy(opt.state_dict())
    state["state"][0]["step"] = 3
    opt.load_state_dict(state)
    take_steps(opt, [[randn(5)]])
    assert float(opt.state[w]["step"]) == 4


@each_setting
def test_many_kinds_of_tensors_at_once(settings: dict[str, Any]) -> None:
    params = [
        parameter(3, dtype=torch.float32),
        parameter(3),
        parameter(2, 2, dtype=torch.bfloat16),
        parameter(),
        parameter(0, 3),
    ]
    opt = PopRiskAdamW(params, **settings)
    schedule = lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=9)
    for row in grad_rows(params, 6):
        take_steps(opt, [row])
        schedule.step()
    assert all(bool(p.isfinite().all()) for p in params)


# Settings.

NUMBERS: dict[str, Any] = {
    "lr": 0.25,
    "eps": 0.5,
    "weight_decay": 0.125,
    "rho": 0.5,
    "alpha": 2.0,
    "z": 2.0,
    "softness": 0.25,
    "q_min": 0.125,
    "batch_size": 8,
    "dataset_size": 64,
}
FORMS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda x: x,
    "numpy scalar": lambda x: np.float32(x) if isinstance(x, float) else np.int64(x),
    "numpy 0-d": np.array,
    "tensor": torch.tensor,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("path", [{}, {"fused": True}, {"foreach": False}, {"capturable": True}])
def test_numbers_of_any_make(form: Callable[[Any], Any], path: dict[str, Any]) -> None:
    """All of these numbers are exact in single precision."""
    start, rows = parameter(6), [[g] for g in noisy_grads(5, 6)]
    (p,), (q,) = copies([start]), copies([start])
    betas = (0.5, 0.75)
    plain = PopRiskAdamW([p], betas=betas, **NUMBERS, **path)
    other = PopRiskAdamW(
        [q],
        betas=(form(betas[0]), form(betas[1])),
        **{key: form(value) for key, value in NUMBERS.items()},
        **path,
    )
    expected = take_steps(plain, rows)
    torch.testing.assert_close(take_steps(other, rows), expected, rtol=1e-12, atol=1e-12)
    assert other.gate_stats() == plain.gate_stats()
    again = PopRiskAdamW(copies([q]), betas=betas, **NUMBERS, **path)
    again.load_state_dict(saved(other.state_dict()))
    torch.testing.assert_close(take_steps(again, rows), take_steps(plain, rows))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_numbers_of_any_make_for_a_wrapper(form: Callable[[Any], Any]) -> None:
    start, rows = parameter(6), [[g] for g in noisy_grads(5, 6)]
    own = ("lr", "eps", "weight_decay")
    settings: dict[str, Any] = {k: v for k, v in NUMBERS.items() if k not in own}
    results = [
        take_steps(
            gated(
                torch.optim.SGD(copies([start]), lr=0.1),
                beta1=f(0.5),
                **{key: f(value) for key, value in settings.items()},
            ),
            rows,
        )
        for f in (FORMS["plain"], form)
    ]
    assert_bitwise(results[1], results[0])


@pytest.mark.parametrize("key", ["weight_decay", "eps", "z"])
def test_a_number_that_becomes_a_tensor_later(key: str) -> None:
    start, rows = parameter(6), [[g] for g in noisy_grads(5, 6)]
    opts = [PopRiskAdamW(copies([start]), **SIZES) for _ in range(2)]
    for opt, value in zip(opts, (0.5, torch.tensor(0.5)), strict=True):
        opt.param_groups[0][key] = value
    expected, actual = (take_steps(opt, rows) for opt in opts)
    assert_bitwise(actual, expected)


@pytest.mark.parametrize("bad", [np.bool_(True), np.array([1.0, 2.0]), np.str_("x"), "1"])
def test_what_is_no_number(bad: Any) -> None:
    with pytest.raises(TypeError, match="lr must be a number"):
        PopRiskAdamW([parameter(2)], lr=bad)


# Parameters and groups.


def test_none_is_no_set_of_parameters() -> None:
    with pytest.raises(TypeError, match=r"params must be parameters.*None.*model"):
        PopRiskAdamW(None)
    with pytest.raises(ValueError, match="empty parameter list"):
        PopRiskAdamW([])


def test_a_frozen_model_is_noticed() -> None:
    with pytest.warns(RuntimeWarning, match="none of which requires a gradient") as record:
        PopRiskAdamW(nn.Linear(3, 1).requires_grad_(False))
    assert record[0].filename == __file__


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def test_a_group_without_names_gets_those_of_the_model() -> None:
    model = net()
    model[1].requires_grad_(False)
    opt = PopRiskAdamW(model, **SIZES)
    assert [len(g["params"]) for g in opt.param_groups] == [4]
    first = PopRiskAdamW([("0.weight", model[0].weight), ("0.bias", model[0].bias)], **SIZES)
    first.add_param_group({"params": list(model[1].parameters()), "lr": 0.5})
    assert first.param_groups[1]["param_names"] == ["groups[1].0", "groups[1].1"]
    model.append(nn.Linear(2, 2))
    opt.add_param_group({"params": model[2].parameters()})
    assert opt.param_groups[1]["param_names"] == ["2.weight", "2.bias"]
    opt.add_param_group({"params": nn.Linear(2, 1).weight})
    assert opt.param_groups[2]["param_names"] == ["groups[2].0"]


def test_named_groups_after_unnamed_ones() -> None:
    model, start = net(), parameter(3)
    opt = PopRiskAdamW([start], **SIZES)
    opt.add_param_group({"params": model[0].named_parameters()})
    names = [g["param_names"] for g in opt.param_groups]
    assert names == [["groups[0].0"], ["weight", "bias"]]
    with nothing_changes(opt), pytest.raises(ValueError, match="more than one"):
        opt.add_param_group({"params": [start]})
    plain = PopRiskAdamW([parameter(3)], **SIZES)
    with pytest.raises(TypeError, match="only optimize Tensors"):
        plain.add_param_group({"params": [("a", 1.0)]})
    assert "param_names" not in plain.param_groups[0]


@each
def test_a_late_group_goes_as_in_an_optimizer_of_its_own(make: Make) -> None:
    a, b = parameter(3), parameter(4)
    opt = stepped(make, [a])
    opt.add_param_group({"params": [b]})
    (alone,) = copies([b])
    rows = grad_rows([a, b], 5, seed=9)
    take_steps(opt, rows)
    take_steps(make([alone]), [[row[1]] for row in rows])
    assert_bitwise(b.detach(), alone.detach())


def test_a_late_group_is_refused_with_its_optimizer_unchanged() -> None:
    opt = gated_sgd([parameter(3)])
    with pytest.raises(ValueError, match="more than one"):
        opt.add_param_group({"params": opt.param_groups[0]["params"]})
    assert len(opt.param_groups) == 1


# Steps that do nothing.


@each
def test_a_hundred_skipped_steps_in_a_row_are_said_aloud(make: Make) -> None:
    w = parameter(3)
    opt, bad = make([w]), [[torch.full((3,), float("nan"), dtype=torch.float64)]]
    good = [[g] for g in noisy_grads(1, 3)]
    with pytest.warns(RuntimeWarning, match="skipped a step") as record:
        take_steps(opt, [*bad * 60, *good, *bad * 99])
    assert len(record) == 1
    with pytest.warns(RuntimeWarning, match="NOTHING IS BEING TRAINED") as second:
        take_steps(opt, bad * 150)
    assert len(second) == 1
    assert {r.filename for r in (*record, *second)} == {samplers.__file__}
    assert opt.skipped_steps == 60 + 99 + 150


@each
def test_steps_without_any_gradient_are_noticed_once(make: Make) -> None:
    """A set-up that trains other parameters than the optimizer's, as a wrong path to adapters."""
    w = parameter(3)
    opt = make([w])
    for _ in range(9):
        opt.step()
    take_steps(opt, [[g] for g in noisy_grads(1, 3)])
    opt.zero_grad()
    for _ in range(9):
        opt.step()
    with pytest.warns(RuntimeWarning, match="no gradient at all in 10 steps"):
        opt.step()
    for _ in range(30):
        opt.step()


@each
def test_parameters_that_were_frozen_afterwards_are_noticed_at_once(make: Make) -> None:
    """As by adapters, put on a model after its optimizer was made."""
    w = parameter(3)
    opt = make([w])
    w.requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="holds frozen parameters only: nothing") as record:
        opt.step()
    assert record[0].filename == __file__
    for _ in range(30):
        opt.step()


@pytest.mark.parametrize("variance", ["exact", "microbatch"])
def test_a_batch_that_is_larger_than_was_said_is_refused(variance: str) -> None:
    model = net()
    opt = PopRiskAdamW(model, variance=variance, batch_size=4)
    x = torch.randn(6, 4)

    def step(examples: int) -> None:
        opt.zero_grad()
        for rows in x[:examples].chunk(2):
            losses = model(rows).square().sum(1)
            if variance == "exact":
                opt.backward(losses, weight=len(rows) / examples)
            else:
                (losses.sum() / examples).backward()
                opt.microbatch(len(rows))
        opt.step()

    with nothing_changes(opt), pytest.raises(ValueError, match=r"batch_size=4, but .*6 examples"):
        step(6)
    step(4)


# Hooks and checkpoints.


class Log(list[str]):
    """Hooks that write down when they were called."""

    def hang_on(self, opt: Any, name: str, **order: Any) -> None:
        def save(_: Any) -> None:
            self.append(f"save {name}")

        def saved(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            self.append(f"saved {name}")
            return {**state_dict, name: [*state_dict]}

        def load(_: Any, state_dict: dict[str, Any]) -> None:
            self.append(f"load {name} {sorted(state_dict)}")

        def loaded(_: Any) -> None:
            self.append(f"loaded {name}")

        opt.register_state_dict_pre_hook(save, **order)
        opt.register_state_dict_post_hook(saved, **order)
        opt.register_load_state_dict_pre_hook(load, **order)
        opt.register_load_state_dict_post_hook(loaded, **order)


@each
@pytest.mark.parametrize("order", [{}, {"prepend": True}], ids=str)
def test_hooks_around_saving_and_loading_run_as_torchs(make: Make, order: dict[str, Any]) -> None:
    def trace(opt: Any) -> tuple[Log, Any]:
        log = Log()
        for name in ("a", "b"):
            log.hang_on(opt, name, **order)
        state = opt.state_dict()
        opt.load_state_dict(state)
        return log, {key: state[key] for key in ("a", "b")}

    ours = trace(stepped(make, [parameter(3)]))
    theirs = trace(stepped(torch.optim.AdamW, [parameter(3)]))
    assert ours == theirs


@each
@pytest.mark.parametrize("when", ["before, in place", "before, another", "after"])
def test_what_a_hook_does_to_the_state_sticks(make: Make, when: str) -> None:
    w = parameter(4)
    opt = stepped(make, [w])
    key = "exp_avg" if isinstance(opt, PopRiskAdamW) else "gate_exp_avg"

    def before(_: Any, state_dict: Any) -> Any:
        state_dict["state"] = copy.deepcopy(state_dict["state"])
        state_dict["state"][0][key].fill_(7.0)
        return dict(state_dict) if when == "before, another" else None

    def after(o: Any) -> None:
        o.state[w]["exp_avg"] = torch.full((4,), 7.0, dtype=torch.float64)

    if when == "after":
        opt.register_load_state_dict_post_hook(after)
    else:
        opt.register_load_state_dict_pre_hook(before)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert bool((opt.state[w]["exp_avg"] == 7.0).all())


@each
def test_a_hook_may_make_a_checkpoint_fit(make: Make) -> None:
    """The state of a smaller vocabulary, padded."""
    state = stepped(make, [parameter(4)]).state_dict()
    opt = stepped(make, [parameter(6)])

    def pad(_: Any, state_dict: Any) -> Any:
        state_dict = copy.deepcopy(state_dict)
        for key, value in state_dict["state"][0].items():
            if isinstance(value, Tensor) and value.dim() == 1:
                state_dict["state"][0][key] = torch.cat([value, value.new_zeros(2)])
        return state_dict

    with pytest.raises(ValueError, match="shape"):
        opt.load_state_dict(state)
    opt.register_load_state_dict_pre_hook(pad)
    opt.load_state_dict(state)
    take_steps(opt, [[randn(6)]])


@each
def test_an_error_in_a_hook_leaves_the_hooks(make: Make) -> None:
    opt = stepped(make, [parameter(4)])

    def spoil(*_: Any) -> dict[str, Any]:
        return {"state": {}}

    handle = opt.register_load_state_dict_pre_hook(spoil)
    with nothing_changes(opt), pytest.raises(ValueError, match="param_groups"):
        opt.load_state_dict(opt.state_dict())
    handle.remove()
    opt.load_state_dict(opt.state_dict())


@each
def test_an_entry_that_is_no_parameter_stays(make: Make) -> None:
    opt = stepped(make, [parameter(4)])
    state = copy.deepcopy(opt.state_dict())
    state["state"]["of the run"] = {"seen": 5}
    state["state"]["a number"] = 3
    opt.load_state_dict(state)
    again = opt.state_dict()["state"]
    assert (again["of the run"], again["a number"]) == ({"seen": 5}, 3)
    take_steps(opt, [[randn(4)]])


@each
def test_a_distributed_checkpoint_of_one_process(make: Make) -> None:
    def trained() -> tuple[nn.Module, Any]:
        model = net()
        opt = make(model.parameters())
        take_steps(opt, grad_rows([*model.parameters()], 3, dtype=torch.float32))
        return model, opt

    (model, opt), (twin, other) = trained(), trained()
    state = copy.deepcopy(get_optimizer_state_dict(model, opt))
    set_optimizer_state_dict(twin, other, state)
    fresh, third = net(), None
    fresh.load_state_dict(model.state_dict())
    third = make(fresh.parameters())
    set_optimizer_state_dict(fresh, third, copy.deepcopy(state))
    rows = grad_rows([*model.parameters()], 3, seed=7, dtype=torch.float32)
    expected = take_steps(opt, rows)
    assert_bitwise(take_steps(other, rows), expected)
    assert_bitwise(take_steps(third, rows), expected)


GROUPS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "more groups": lambda: [
        {"params": [parameter(3), parameter(2, 2)]},
        {"params": [parameter(4)]},
    ],
    "another shape": lambda: [{"params": [parameter(5), parameter(2, 2)]}],
    "a transposed shape": lambda: [{"params": [parameter(3), parameter(4, 1)]}],
    "other order": lambda: [{"params": [parameter(2, 2), parameter(3)]}],
    "fewer": lambda: [{"params": [parameter(3)]}],
}


@each
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("plain", [False, True])
def test_a_resume_into_other_groups_is_refused(
    make: Make, groups: Callable[[], list[dict[str, Any]]], plain: bool
) -> None:
    source = stepped(make, [parameter(3), parameter(2, 2)])
    opt = make(groups())
    params = [p for g in opt.param_groups for p in g["params"]]
    take_steps(opt, grad_rows(params, 3))
    inner = source.optimizer if plain and isinstance(source, GatedOptimizer) else source
    with nothing_changes(opt), pytest.raises(ValueError, match=r"fit|shape"):
        opt.load_state_dict(copy.deepcopy(inner.state_dict()))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


@pytest.mark.parametrize(
    "changes",
    [
        {"rho": 0.9},
        {"mask": "hard"},
        {"alpha": 0.5},
        {"z": 2.5},
        {"softness": 0.5},
        {"batch_size": 16},
        {"dataset_size": 200},
        {"reduction": "per_tensor"},
        {"q_min": 0.2},
        {"mode": "paper"},
        {"variance": "second-moment"},
        {"beta1": 0.5},
    ],
    ids=str,
)
@each
def test_saved_settings_are_taken_up_and_told(make: Make, changes: dict[str, Any]) -> None:
    """As with torch's own settings; the numbers are those of the run that was saved."""
    ((key, value),) = changes.items()
    if key in ({"beta1"} if make is pop else {"mode", "variance"}):
        pytest.skip("no setting of this optimizer")
    w = parameter(5)
    opt = stepped(make, [w], 4, **changes)
    again = make(copies([w]))
    with pytest.warns(RuntimeWarning, match=rf"{key}={value!r} \(was ") as record:
        again.load_state_dict(saved(opt.state_dict()))
    assert len(record) == 1
    assert record[0].filename == __file__
    rows = [[g] for g in noisy_grads(4, 5, seed=5)]
    assert_bitwise(take_steps(again, rows), take_steps(opt, rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(opt.state_dict())


# The gate's own checkpoints.


def test_a_plain_checkpoint_starts_the_gate_fresh() -> None:
    start = parameter(4)
    (w,) = copies([start])
    plain = stepped(torch.optim.SGD, [w], lr=0.3, momentum=0.9)
    opt = gated_sgd(copies([w]))
    opt.load_state_dict(saved(plain.state_dict()))
    assert opt.param_groups[0]["lr"] == 0.3
    assert opt.gate_stats() == {} == dict(opt.state)
    (g,) = noisy_grads(1, 4, seed=3)
    assert_bitwise(take_steps(opt, [[g]]), take_steps(plain, [[g]]))


def test_a_checkpoint_of_the_first_version_is_read() -> None:
    opt = stepped(gated_sgd, [parameter(4), parameter(2, 3)])
    state = {
        "optimizer": opt.optimizer.state_dict(),
        "gate": {
            i: {**{k: v for k, v in s.items() if k != "step"}, "step": int(s["step"]), "sums": 0}
            for i, s in enumerate(opt.state.values())
        },
        "skipped_steps": 2,
    }
    params = copies([p for g in opt.param_groups for p in g["params"]])
    again = gated_sgd(params)
    again.load_state_dict(saved(state))
    assert again.skipped_steps == 2
    rows = grad_rows(params, 4, seed=4)
    assert_bitwise(take_steps(again, rows), take_steps(opt, rows))


def test_the_settings_of_a_gate_can_be_seen() -> None:
    text = repr(gated_sgd([parameter(2)], z=2.5))
    for part in ("SGD", "momentum: 0.9", "z=2.5", "batch_size=8", "rho=0.99", "beta1=0.9"):
        assert part in text


def test_weights_are_put_back_after_an_error_of_the_wrapped_optimizer() -> None:
    class Failing(torch.optim.SGD):
        fail = False

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if self.fail:
                raise ZeroDivisionError

    w = parameter(3)
    inner = Failing([w], lr=0.1)
    opt = gated(inner)
    inner.fail, before = True, w.detach().clone()
    w.grad = randn(3)
    with pytest.raises(ZeroDivisionError):
        opt.step()
    assert_bitwise(w.detach(), before)


class NoRate(Optimizer):
    """Signs of gradients at a rate that is no setting."""

    def __init__(self, params: Any, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["weight_decay"])
                p.sub_(0.01 * p.grad.sign())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_optimizer_without_a_learning_rate(decay: float) -> None:
    start, rows = parameter(4), [[g] for g in noisy_grads(5, 4)]
    (p,), (q,) = copies([start]), copies([start])
    take_steps(NoRate([p], decay), rows)
    take_steps(gated(NoRate([q], decay), q_min=1.0), rows)
    torch.testing.assert_close(p, q, rtol=1e-13, atol=0)


def test_weight_decay_of_another_form_that_comes_later_is_refused_before_the_step() -> None:
    class Own(NoRate):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(0.01 * p.grad.sign() + 0.01 * group["weight_decay"] * p.sign())

    w = parameter(3)
    opt = gated(Own([w]))
    take_steps(opt, [[g] for g in noisy_grads(3, 3)])
    opt.param_groups[0]["weight_decay"] = 0.1
    w.grad = randn(3)
    with (
        nothing_changes(opt),
        pytest.raises(TypeError, match=r"Own cannot be gated.*weight_decay=0"),
    ):
        opt.step()
