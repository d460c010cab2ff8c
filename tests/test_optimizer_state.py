"""What enters the state, what must not, and how the state is saved, loaded and copied."""

import io
import pickle
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler

from asserts import assert_bitwise, complete_state, nothing_changes, ulps_apart
from cases import LAYOUTS, PATHS, VARIANCES, settings
from poprisk import PopRiskAdamW, gated
from samplers import copies, grad_rows, noisy_grads, parameter, take_steps, trajectory

INF, NAN = float("inf"), float("nan")
TENSORS = ("exp_avg", "exp_avg_sq", "grad_mean_var")

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
BAD_VALUES: dict[str, list[complex]] = {
    "NaN": [NAN],
    "Inf": [INF],
    "-Inf": [-INF],
    "Inf and -Inf": [INF, -INF],
}
each_bad_value = pytest.mark.parametrize("bad", BAD_VALUES.values(), ids=BAD_VALUES)


def stepped(params: Any, steps: int = 3, **changes: Any) -> PopRiskAdamW:
    """An optimizer that has taken some steps on random gradients."""
    opt = PopRiskAdamW(params, **changes)
    take_steps(opt, grad_rows([p for g in opt.param_groups for p in g["params"]], steps))
    return opt


def spoilt(grad: Tensor, values: list[complex]) -> Tensor:
    """``grad`` with its last entries replaced."""
    grad = grad.clone()
    grad.view(-1)[-len(values) :] = torch.tensor(values, dtype=grad.dtype)
    return grad


@each_bad_value
@each_path
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
)
def test_a_gradient_that_is_not_finite_changes_nothing(
    bad: list[complex], path: dict[str, Any], dtype: torch.dtype
) -> None:
    params = [parameter(5), parameter(4, dtype=dtype)]
    opt = stepped(params, **path)
    (good, grad) = grad_rows(params, 1)[0]
    params[0].grad, params[1].grad = good, spoilt(grad, bad)
    with nothing_changes(opt, but={"skipped_steps"}):
        with pytest.warns(RuntimeWarning, match="NaN or Inf.*unchanged"):
            opt.step()
        opt.step()
    assert opt.skipped_steps == 2


def test_no_state_is_created_by_a_skipped_first_step() -> None:
    w = parameter(3)
    opt = PopRiskAdamW([w])
    w.grad = torch.full_like(w, NAN)
    with pytest.warns(RuntimeWarning, match="skipped") as record:
        opt.step()
    assert opt.state_dict()["state"] == {}
    assert record[0].filename == __file__


def test_training_goes_on_after_skips_as_if_they_had_not_been() -> None:
    rows = grad_rows([parameter(4)], 6)
    bad = [[torch.full_like(rows[0][0], INF)]]
    expected = trajectory(PopRiskAdamW, [parameter(4)], rows)
    opt = PopRiskAdamW([parameter(4)])
    with pytest.warns(RuntimeWarning) as record:
        weights = take_steps(opt, [*bad, *rows[:3], *bad, *bad, *rows[3:]])
    assert len(record) == 1
    assert_bitwise(weights[-1], expected[-1])
    assert opt.skipped_steps == 3


MAKES: dict[str, Callable[[list[Parameter]], Any]] = {
    "PopRiskAdamW": PopRiskAdamW,
    "gated optimizer": lambda params: gated(torch.optim.SGD(params, lr=0.1)),
}


def told(opt: Any, grads: list[Tensor | None]) -> list[tuple[int, str]]:
    """Which of these steps of one parameter warn, counted from 1, and how."""
    (w,), found = opt.param_groups[0]["params"], list[tuple[int, str]]()
    for t, w.grad in enumerate(grads, 1):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            opt.step()
        assert {warning.filename for warning in seen} <= {__file__}
        found += [(t, str(warning.message)) for warning in seen]
    return found


@pytest.mark.parametrize("name", MAKES)
def test_a_hundred_skips_in_a_row_are_told_once_more(name: str) -> None:
    opt, good, bad = MAKES[name]([parameter(2)]), torch.ones(2).double(), torch.full((2,), NAN)
    steps: list[Tensor | None] = [*[bad.double()] * 50, good, *[bad.double()] * 250, good]
    found = told(opt, [*steps, *[bad.double()] * 101])
    assert [t for t, _ in found] == [1, 51 + 100, 302 + 100]
    assert found[0][1].startswith(f"{name} skipped a step because a gradient holds NaN")
    for _, message in found[1:]:
        assert message.startswith(f"{name} has skipped 100 steps in a row: NOTHING IS BEING")
    assert opt.skipped_steps == 50 + 250 + 101


@pytest.mark.parametrize("name", MAKES)
def test_ten_steps_in_a_row_without_a_gradient_are_told_once(name: str) -> None:
    opt, good = MAKES[name]([parameter(2)]), torch.ones(2).double()
    found = told(opt, [*[None] * 9, good, *[None] * 25, good, *[None] * 25])
    assert [t for t, _ in found] == [20]
    assert found[0][1].startswith(f"{name} has found no gradient at all in 10 steps in a row")


def test_the_loss_of_a_skipped_step_is_returned() -> None:
    w = parameter(2)
    opt = PopRiskAdamW([w])

    def closure() -> Tensor:
        w.grad = torch.full_like(w, NAN)
        return torch.tensor(NAN)

    with pytest.warns(RuntimeWarning):
        loss: Any = opt.step(closure)  # pyrefly: ignore
    assert loss.isnan()


@each_path
@pytest.mark.parametrize("mask", ["hard", "soft", "snr"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("size", [1e15, 1e18])
def test_large_finite_gradients_are_not_skipped(
    path: dict[str, Any], mask: str, variance: str, size: float
) -> None:
    """Up to a quarter of the root of the largest number nothing overflows."""
    w, twin = (Parameter(torch.zeros(4)) for _ in range(2))
    rows = [[torch.full((4,), size * sign)] for sign in (1, 1, -1, 1)] + [[torch.ones(4)]] * 2
    opt = PopRiskAdamW([w], mask=mask, variance=variance, **path)
    take_steps(opt, rows)
    take_steps(torch.optim.AdamW([twin]), rows)
    assert bool(twin.isfinite().all())
    assert opt.skipped_steps == 0
    assert opt.state[w]["step"] == len(rows)
    assert bool(w.isfinite().all())


@pytest.mark.parametrize("size", [1e19, 1e25, 1.5e38])
def test_gradients_whose_squares_overflow_are_skipped(size: float) -> None:
    """AdamW would keep an infinite second moment, which stops the weight for ever."""
    w = Parameter(torch.zeros(4))
    opt = stepped([w])
    before = deepcopy(opt.state_dict()["state"])
    with pytest.warns(RuntimeWarning, match="its square"):
        take_steps(opt, [[torch.full((4,), size)]])
    assert opt.skipped_steps == 1
    assert_bitwise(opt.state_dict()["state"], before)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.*skipped a step")
def test_a_quarter_of_the_root_of_the_largest_number_is_the_limit(
    dtype: torch.dtype, capturable: bool
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    limit = torch.finfo(wide).max ** 0.5 / 4
    for size, skipped in ((0.98 * limit, 0), (1.02 * limit, 1)):
        opt = PopRiskAdamW([parameter(4, dtype=dtype)], capturable=capturable)
        take_steps(opt, [[torch.tensor([size, 0.0, -1.0, 1.0], dtype=dtype)]])
        assert opt.skipped_steps == skipped


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_beyond_low_precision_is_not_skipped(dtype: torch.dtype) -> None:
    opt = stepped([parameter(4, dtype=dtype)])
    take_steps(opt, [[torch.full((4,), 6e4, dtype=dtype)]])
    assert opt.skipped_steps == 0


def squared_error(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_grad_scaler() -> None:
    """Scaling by a power of two changes no bit; a step it skips leaves everything as it was."""
    torch.manual_seed(0)
    plain, scaled = nn.Linear(3, 2), nn.Linear(3, 2)
    scaled.load_state_dict(plain.state_dict())
    opt, twin = PopRiskAdamW(plain), PopRiskAdamW(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def scaled_step(x: Tensor) -> None:
        twin.zero_grad()
        scaler.scale(squared_error(scaled, x)).backward()
        scaler.step(twin)
        scaler.update()

    for t in range(5):
        x = torch.randn(4, 3)
        opt.zero_grad()
        squared_error(plain, x).backward()
        opt.step()
        scaled_step(x)
        if t == 2:
            with nothing_changes(twin):
                scaled_step(torch.full((4, 3), 1e30))
            assert scaler.get_scale() == 2.0**9
    assert_bitwise(complete_state(twin), complete_state(opt))
    assert twin.skipped_steps == 0


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle, betas too": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "warm-up": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(make: Callable[[Optimizer], Any]) -> None:
    def run(opt: Optimizer) -> list[list[Tensor]]:
        scheduler, weights = make(opt), list[list[Tensor]]()
        for row in grad_rows([start], 10):
            weights += take_steps(opt, [row])
            scheduler.step()
        return weights

    start = parameter(4)
    shared = {"lr": 0.05, "weight_decay": 0.1}
    ours = run(PopRiskAdamW(copies([start]), **shared, gate=False, foreach=False))
    assert_bitwise(ours, run(torch.optim.AdamW(copies([start]), **shared)))


def test_plateau_scheduler() -> None:
    opt = stepped([parameter(2)], lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.025)


DUPLICATES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "pickle": lambda obj: pickle.loads(pickle.dumps(obj)),
}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_copies_go_on_alike(duplicate: Callable[[Any], Any]) -> None:
    w = parameter(4)
    opt = stepped([w])
    rows = grad_rows([w], 3, seed=7)
    twin = duplicate(opt)
    with nothing_changes(opt):
        weights = take_steps(twin, rows)
    assert_bitwise(weights, take_steps(opt, rows))
    assert_bitwise(complete_state(twin), complete_state(opt))


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_layout
@pytest.mark.parametrize("variance", VARIANCES)
def test_a_state_dict_survives_a_file_bit_for_bit(layout: str, variance: str) -> None:
    opt = stepped([LAYOUTS[layout](), parameter(2)], variance=variance, batch_size=4)
    state = saved_and_loaded(opt.state_dict())
    params = copies([p for g in opt.param_groups for p in g["params"]])
    loaded = PopRiskAdamW(params, lr=5.0, variance=variance, batch_size=4)
    loaded.load_state_dict(state)
    assert_bitwise(complete_state(loaded), complete_state(opt))


@each_path
@pytest.mark.parametrize("changes", [{}, {"mode": "paper"}, {"variance": "second-moment"}], ids=str)
def test_going_on_after_a_load_equals_never_having_stopped(
    path: dict[str, Any], changes: dict[str, Any]
) -> None:
    starts = [parameter(4), parameter(5, dtype=torch.bfloat16)]
    rows: list[list[Tensor | None]] = [[*row] for row in grad_rows(starts, 8)]
    rows[0][1] = rows[2][1] = rows[6][0] = None
    expected = trajectory(lambda ps: PopRiskAdamW(ps, **changes, **path), starts, rows)

    first = PopRiskAdamW(copies(starts), **changes, **path)
    weights = take_steps(first, rows[:4])
    second = PopRiskAdamW(copies(weights[-1]), **changes, **path)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    assert_bitwise(weights + take_steps(second, rows[4:]), expected)


def test_the_count_of_skipped_steps_is_saved() -> None:
    opt = stepped([parameter(2)])
    opt.param_groups[0]["params"][0].grad = torch.full((2,), NAN, dtype=torch.float64)
    with pytest.warns(RuntimeWarning):
        opt.step()
    loaded = PopRiskAdamW([parameter(2)])
    loaded.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert loaded.skipped_steps == 1


def test_a_loaded_state_shares_no_memory() -> None:
    opt = stepped([parameter(4)])
    loaded = PopRiskAdamW([parameter(4)])
    loaded.load_state_dict(opt.state_dict())
    with nothing_changes(opt):
        take_steps(loaded, [[g] for g in noisy_grads(2, 4)])


ADAMW_CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "maximize": {"maximize": True},
}


@pytest.mark.parametrize("kind", ADAMW_CHECKPOINTS.values(), ids=ADAMW_CHECKPOINTS)
@pytest.mark.parametrize("named", [False, True])
def test_an_adamw_checkpoint(kind: dict[str, Any], named: bool) -> None:
    """Moments, counters and settings are AdamW's; with the gate off, so is every later step."""
    starts = [parameter(4), parameter(2, 3)]
    rows = grad_rows(starts, 8)

    def names(params: list[Parameter]) -> Any:
        return [(f"layer.{j}", p) for j, p in enumerate(params)] if named else params

    adamw = torch.optim.AdamW(names(copies(starts)), lr=0.02, weight_decay=0.3, **kind)
    weights = take_steps(adamw, rows[:4])[-1]
    opt = PopRiskAdamW(names(copies(weights)), gate=False, foreach=False)
    opt.load_state_dict(saved_and_loaded(adamw.state_dict()))
    group = opt.param_groups[0]
    assert (group["lr"], group["foreach"], group["fused"]) == (0.02, False, None)
    pairs = zip(take_steps(opt, rows[4:])[-1], take_steps(adamw, rows[4:])[-1], strict=True)
    assert max(ulps_apart(a, b) for a, b in pairs) <= (0 if kind != {"fused": True} else 8)


@pytest.mark.parametrize("mode", ["auto", "paper"])
def test_after_an_adamw_checkpoint_the_variance_starts_fresh(mode: str) -> None:
    """The first step after the load is gated: its deviation is taken from AdamW's average."""
    w = parameter(4)
    adamw = torch.optim.AdamW([w])
    take_steps(adamw, grad_rows([w], 5))
    m = adamw.state[w]["exp_avg"] / (1 - 0.9**5 if mode == "auto" else 1)
    opt = PopRiskAdamW([w], rho=0.9, mode=mode)
    opt.load_state_dict(adamw.state_dict())
    (g,) = noisy_grads(1, 4, seed=9)
    take_steps(opt, [[g]])
    state = opt.state[w]
    torch.testing.assert_close(state["grad_mean_var"], 0.1 * (g - m).square(), rtol=1e-13, atol=0)
    assert state["step"] - state["variance_start"] == 1
    assert opt.gate_stats()["groups[0]"].mean_gate < 1


def test_gate_stats_between_a_load_from_adamw_and_the_first_step() -> None:
    w = parameter(4)
    adamw = torch.optim.AdamW([w])
    take_steps(adamw, grad_rows([w], 5))
    opt = PopRiskAdamW([w])
    opt.load_state_dict(adamw.state_dict())
    with nothing_changes(opt):
        assert opt.gate_stats() == {}


def test_a_gate_that_opens_late_has_its_own_clock() -> None:
    """gate=False for a warm-up, then True: as after a load from AdamW."""
    w = parameter(4)
    opt = stepped([w], 5, gate=False, rho=0.9)
    opt.param_groups[0]["gate"] = True
    assert opt.gate_stats() == {}
    m_hat = opt.state[w]["exp_avg"] / (1 - 0.9**5)
    (g,) = noisy_grads(1, 4, seed=9)
    take_steps(opt, [[g]])
    s = opt.state[w]["grad_mean_var"]
    torch.testing.assert_close(s, 0.1 * (g - m_hat).square(), rtol=1e-13, atol=0)


def test_a_pause_of_the_gate_is_no_observation() -> None:
    """ŝ stays an average: noise of variance 1 is not underestimated after a pause."""
    rows = [[g] for g in noisy_grads(60, 400, seed=3)]
    paused = stepped([parameter(400)], 5)
    paused.param_groups[0]["gate"] = False
    take_steps(paused, rows[:50])
    paused.param_groups[0]["gate"] = True
    take_steps(paused, rows[50:])
    steady = PopRiskAdamW([parameter(400)])
    take_steps(steady, rows)
    closed = [opt.gate_stats()["groups[0]"].pass_rate for opt in (paused, steady)]
    assert closed[0] == pytest.approx(closed[1], abs=0.1)


def checkpoint(**changes: Any) -> dict[str, Any]:
    """A state_dict that fits ``target()``, some parts replaced."""
    return {**stepped([parameter(4), parameter(2, 3)]).state_dict(), **changes}


def target() -> PopRiskAdamW:
    return stepped([parameter(4), parameter(2, 3)], 2, lr=0.5)


def adamw_state(*shapes: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    params = [parameter(*shape) for shape in shapes]
    adamw = torch.optim.AdamW(params, **changes)
    take_steps(adamw, grad_rows(params, 2))
    return adamw.state_dict()


def other_optimizer(kind: type[Optimizer]) -> dict[str, Any]:
    params = [parameter(4), parameter(2, 3)]
    opt = kind(params, lr=0.1)  # pyrefly: ignore
    take_steps(opt, grad_rows(params, 2))
    return opt.state_dict()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "shape": (lambda: adamw_state((4,), (3, 2)), r"'exp_avg' of parameter 1 .*\(3, 2\).*\(2, 3\)"),
    "our shape": (lambda: stepped([parameter(4), parameter(6)]).state_dict(), "parameter 1"),
    "parameters": (lambda: adamw_state((4,)), r"hold \[1\].*optimizer's \[2\]"),
    "groups": (lambda: checkpoint(param_groups=[]), r"hold \[\].*\[2\]"),
    "amsgrad": (lambda: adamw_state((4,), (2, 3), amsgrad=True), "amsgrad=True.*v̂"),
    "no groups": (lambda: {"state": {}}, "no 'param_groups'"),
    "a model's": (lambda: nn.Linear(4, 1).state_dict(), "no 'state'"),
    "empty": (dict, "no 'state'"),
    "bad settings": (
        lambda: checkpoint(param_groups=[{**settings(lr=-1.0), "params": [0, 1]}]),
        "lr must lie in",
    ),
    "None": (lambda: None, "state_dict"),
    "a group without params": (lambda: checkpoint(param_groups=[{"lr": 0.1}]), "state_dict"),
    "no tensors": (lambda: checkpoint(state={0: {"step": 1.0, "exp_avg": 3.0}}), "exp_avg"),
    "incomplete": (lambda: checkpoint(state={0: {"step": 1.0}}), "state_dict"),
    "SGD": (lambda: other_optimizer(torch.optim.SGD), "state_dict"),
    "RMSprop": (lambda: other_optimizer(torch.optim.RMSprop), "state_dict"),
    "Adagrad": (lambda: other_optimizer(torch.optim.Adagrad), "state_dict"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    make: Callable[[], Any], message: str
) -> None:
    opt, state = target(), make()
    with nothing_changes(opt), pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(state)


def test_low_precision_state_keeps_float32() -> None:
    opt = stepped([parameter(4, dtype=torch.bfloat16)])
    loaded = PopRiskAdamW([parameter(4, dtype=torch.bfloat16)])
    loaded.load_state_dict(saved_and_loaded(opt.state_dict()))
    (state,) = loaded.state.values()
    assert [state[key].dtype for key in TENSORS] == [torch.float32] * 3


def test_a_refused_group_is_not_added() -> None:
    opt = target()
    with nothing_changes(opt), pytest.raises(ValueError, match="q_min"):
        opt.add_param_group({"params": [parameter(2)], "q_min": 2.0})
    opt.add_param_group({"params": [parameter(2)], "gate": False})
    assert opt.param_groups[1]["lr"] == 0.5


MOVES: dict[str, torch.dtype] = {
    "double": torch.float64,
    "bfloat16": torch.bfloat16,
    "half": torch.float16,
}


@pytest.mark.parametrize("how", ["loop", "foreach", "fused", "capturable"])
@pytest.mark.parametrize("name", MOVES)
def test_a_model_moved_to_another_precision_goes_on_with_its_state(name: str, how: str) -> None:
    settings: dict[str, Any] = {
        "loop": {"foreach": False},
        "foreach": {},
        "fused": {"fused": True},
        "capturable": {"capturable": True},
    }[how]

    def weights(first: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        w = nn.Parameter(torch.linspace(-1, 1, 501, dtype=first))
        opt = PopRiskAdamW([w], lr=1e-2, batch_size=4, **settings)
        for t in range(6):
            if t == 3:
                w.data, w.grad = w.data.to(MOVES[name]), None
            w.grad = torch.randn(501).to(w.dtype)
            opt.step()
        return w.detach().double()

    low = MOVES[name] in (torch.bfloat16, torch.float16)
    if how == "capturable" and name == "double":
        with pytest.raises(RuntimeError, match="dtype"):
            weights(torch.float32)  # no state is replaced while a step may be captured
        return
    tolerance = 1e-2 if low else 1e-5
    torch.testing.assert_close(
        weights(torch.float32), weights(MOVES[name]), atol=tolerance, rtol=tolerance
    )


RESIZABLE: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "foreach": lambda params: PopRiskAdamW(params, lr=1e-2, batch_size=4),
    "fused": lambda params: PopRiskAdamW(params, lr=1e-2, batch_size=4, fused=True),
    "gated": lambda params: gated(torch.optim.SGD(params, lr=1e-2), batch_size=4),
}


@pytest.mark.parametrize("make", RESIZABLE.values(), ids=RESIZABLE)
def test_a_parameter_resized_under_the_optimizer_is_refused_by_name(
    make: Callable[[list[nn.Parameter]], Any],
) -> None:
    """Before any other parameter moves or is counted, whatever group it is in."""
    other, w = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(300))
    opt = make([other])
    opt.add_param_group({"params": [w]})
    other.grad, w.grad = torch.ones(5), torch.ones(300)
    opt.step()
    before = other.detach().clone()
    w.grad, w.data = None, torch.ones(70_000)
    w.grad = torch.ones(70_000)
    with pytest.raises(ValueError, match=r"resized since.*optimizer\.state\.pop"):
        opt.step()
    assert bool((w == 1).all())
    assert torch.equal(other, before)
    assert [float(opt.state[p]["step"]) for p in (other, w)] == [1, 1]
    opt.state.pop(w)
    opt.step()
    assert float(w.detach().max()) < 1


def test_a_gated_optimizer_follows_a_model_to_another_precision() -> None:
    def weights(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        opt = gated(torch.optim.SGD(model.parameters(), lr=0.1), batch_size=4)
        for t in range(6):
            if t == 3:
                model.to(dtype)
            opt.zero_grad()
            x = torch.randn(4, 6)
            model(x.to(model.weight.dtype)).square().mean().backward()
            opt.step()
        return model.weight.detach().double()

    torch.testing.assert_close(weights(torch.float64), weights(torch.float32), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", RESIZABLE.values(), ids=RESIZABLE)
def test_a_parameter_that_is_listed_twice_is_refused(
    make: Callable[[list[nn.Parameter]], Any],
) -> None:
    w, v = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the wrapped optimizer
        with pytest.raises(ValueError, match=r"the same parameter twice.* position 2"):
            make([w, v, w])
        opt = make([w])
        with pytest.raises(ValueError, match=r"the same parameter twice.* position 1"):
            opt.add_param_group({"params": [v, v]})
    assert len(opt.param_groups) == 1
