"""The variance within a batch: exact and between microbatches, whatever gradients go through."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import zoo
from asserts import assert_bitwise
from poprisk import PopRiskAdamW, PopRiskSOAP
from poprisk.optim.gradient_probe import GradientProbe
from poprisk.optim.state import ADAM_KEYS
from poprisk.optim.variance import grad_mean_var
from reference.optimizer import mask_value, momentum_noise
from samplers import parameter, randn

B = 12
Grads = list[Tensor]
close = torch.testing.assert_close
pytestmark = pytest.mark.filterwarnings("ignore:no factored form")


def brute(rows: Tensor) -> Tensor:
    """Σ_B/(b-1) of per-example gradients (b, ...)."""
    mean = rows.mean(0)
    return ((rows - mean) ** 2).sum(0) / (len(rows) * (len(rows) - 1))


def exact(*params: Tensor, **settings: Any) -> PopRiskAdamW:
    options: dict[str, Any] = {"variance": "exact", "lr": 0.1, **settings}
    return PopRiskAdamW(list(params), **options)


def microbatched(*params: Tensor, **settings: Any) -> PopRiskAdamW:
    return exact(*params, variance="microbatch", **settings)


def observed(opt: PopRiskAdamW, p: Tensor) -> Tensor:
    """The variance that the first step saw: ŝ after one observation."""
    group = opt.param_groups[0]
    rho = group["betas"][0] ** 2 if group["variance"] == "exact" else group["rho"]
    assert opt.state[p]["step"] == 1
    return opt.state[p]["grad_mean_var"] / (1 - rho)


def losses(w: Tensor, rows: Tensor) -> Tensor:
    """One per row, whose gradients are the rows."""
    return (rows * w).flatten(1).sum(1)


@pytest.mark.parametrize(
    "name", ["MLP", "residual CNN", "causal transformer, tied", "shared modules", "Bilinear", "RNN"]
)
@pytest.mark.parametrize("sizes", [[B], [4, 4, 4], [2, 7, 3]])
def test_exact_is_the_variance_of_the_examples(name: str, sizes: list[int]) -> None:
    model = zoo.make(name)
    params = zoo.trainable(model)
    (x,) = zoo.ZOO[name].inputs(B)
    rows = [torch.autograd.grad(model(x)[i].sum(), [*params.values()]) for i in range(B)]
    opt = exact(*params.values())
    for part in x.split(sizes):
        opt.backward(model(part).sum(1), weight=len(part) / B)
    for j, p in enumerate(params.values()):
        expected = torch.stack([row[j] for row in rows])
        close(p.grad, expected.mean(0), rtol=1e-12, atol=1e-14)
    opt.step()
    for j, p in enumerate(params.values()):
        close(observed(opt, p), brute(torch.stack([r[j] for r in rows])), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("chunk", [None, 2, 5, 100])
def test_grad_mean_var_in_chunks(chunk: int | None) -> None:
    model = zoo.make("MLP")
    x, y = randn(B, 6), randn(B, 3, seed=1)
    values = (model(x) - y).square().sum(1)
    rows = [torch.autograd.grad(v, [*model.parameters()], retain_graph=True) for v in values]
    found = grad_mean_var(model, lambda u, t: (u - t).square().sum(1), (x, y), chunk=chunk)
    assert all(p.grad is None for p in model.parameters())
    for j, name in enumerate(zoo.trainable(model)):
        close(found[name], brute(torch.stack([r[j] for r in rows])), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("sizes", [[4, 4, 4], [1, 8, 3], [1] * B])
def test_microbatches_of_any_size(sizes: list[int]) -> None:
    """By definition; and parts of one example give the exact variance."""
    w, rows = parameter(5), randn(B, 5) + 1
    opt = microbatched(w)
    for part in rows.split(sizes):
        losses(w, part).sum().div(B).backward()
        opt.microbatch(len(part))
    means = torch.stack([part.mean(0) for part in rows.split(sizes)])
    share = torch.tensor(sizes, dtype=torch.float64)[:, None]
    mean = rows.mean(0)
    expected = ((share * (means - mean) ** 2).sum(0) / B) / (len(sizes) - 1)
    opt.step()
    close(observed(opt, w), expected, rtol=1e-11, atol=1e-14)
    if len(sizes) == B:
        close(observed(opt, w), brute(rows), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("sizes", [[B], [4, 8], [1, 2, 3, 6]])
def test_unbiased_over_many_batches(sizes: list[int]) -> None:
    """Gradients of variance 4 around 3: the mean of twelve has variance 1/3."""
    n = 40_000
    w = Parameter(torch.zeros(n, dtype=torch.float64))
    rows = 3 + 2 * randn(B, n)
    opt = exact(w) if len(sizes) == 1 else microbatched(w)
    for part in rows.split(sizes):
        if len(sizes) == 1:
            opt.backward(losses(w, part))
        else:
            losses(w, part).sum().div(B).backward()
            opt.microbatch(len(part))
    opt.step()
    found = observed(opt, w)
    error = float(found.std()) / n**0.5
    assert abs(float(found.mean()) - 1 / 3) < 4 * error
    assert error < 0.003


def test_the_average_is_the_variance_of_the_momentum() -> None:
    """r_t·ŝ_t = Σ w² var_t for m̂ = Σ w g, also when the noise changes over time."""
    w, beta = parameter(4), 0.8
    opt = exact(w, betas=(beta, 0.99), lr=0.0)
    steps = 9
    variances = []
    for t in range(steps):
        rows = (1 + t**2) * randn(B, 4, seed=t)
        variances.append(brute(rows))
        opt.zero_grad()
        opt.backward(losses(w, rows))
        opt.step()
        weights = [(1 - beta) * beta ** (t - k) / (1 - beta ** (t + 1)) for k in range(t + 1)]
        expected = sum((a**2 * v for a, v in zip(weights, variances, strict=True)), torch.zeros(4))
        s_hat = opt.state[w]["grad_mean_var"] / (1 - beta ** (2 * (t + 1)))
        close(momentum_noise(t + 1, beta) * s_hat, expected, rtol=1e-11, atol=0)


class Reference:
    """AdamW gated by within-batch variances, from whole histories."""

    def __init__(self, w: Tensor, **settings: Any) -> None:
        self.w, self.c = w.detach().clone(), settings
        self.grads: Grads = []
        self.variances: Grads = []

    def step(self, rows: Tensor) -> Tensor:
        c, (beta1, beta2) = self.c, self.c["betas"]
        self.grads.append(rows.mean(0) * (-1 if c["maximize"] else 1))
        self.variances.append(brute(rows))
        t = len(self.grads)

        def average(values: Grads, beta: float) -> Tensor:
            weights = [beta ** (t - 1 - k) for k in range(t)]
            total = sum((a * v for a, v in zip(weights, values, strict=True)), 0 * values[0])
            return total / sum(weights)

        m, v = average(self.grads, beta1), average([g * g for g in self.grads], beta2)
        s = average(self.variances, beta1**2)
        b, n = c["batch_size"], c["dataset_size"]
        alpha = c["z"] ** 2 * (momentum_noise(t, beta1) + (b / (n - b) if n else 0))
        numbers = zip(m.tolist(), s.tolist(), strict=True)
        q = [mask_value(c["mask"], mi, si, alpha, c["softness"], 0.0) for mi, si in numbers]
        gate = torch.tensor(q, dtype=torch.float64).clamp(min=c["q_min"])
        self.w = self.w * (1 - c["lr"] * c["weight_decay"])
        self.w -= c["lr"] * gate * m / (v.sqrt() + c["eps"])
        return self.w


@pytest.mark.parametrize(
    ("mask", "foreach", "options"),
    [
        ("soft", None, {}),
        ("hard", False, {"dataset_size": 100}),
        ("snr", None, {"maximize": True, "q_min": 0.1}),
        ("soft", False, {"dataset_size": 100, "maximize": True}),
    ],
)
def test_equals_the_reference_over_100_steps(
    mask: str, foreach: bool | None, options: dict[str, Any]
) -> None:
    settings = {
        "lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "z": 1.5, "mask": mask,
        "softness": 0.1, "batch_size": B, "dataset_size": None, "q_min": 0.0, "maximize": False,
        **options,
    }  # fmt: skip
    w, u = parameter(7), parameter(7, seed=1)
    opt = exact(w, u, foreach=foreach, **settings)
    reference = Reference(w, **settings)
    for t in range(100):
        rows = randn(B, 7, seed=t) + torch.linspace(-1, 1, 7, dtype=torch.float64)
        opt.zero_grad()
        opt.backward(losses(w, rows) + losses(u, 2 * rows))
        opt.step()
        close(w.detach(), reference.step(rows), rtol=1e-12, atol=1e-12)


SCALINGS: dict[str, Callable[[Tensor], Any]] = {
    "clip_grad_norm_": lambda p: nn.utils.clip_grad_norm_([p], 0.5 * float(p.grad.norm())),  # pyrefly: ignore
    "in place": lambda p: p.grad.mul_(0.5),  # pyrefly: ignore
    "through data": lambda p: p.grad.data.mul_(0.5),  # pyrefly: ignore
    "another tensor": lambda p: setattr(p, "grad", p.grad * 0.5),  # pyrefly: ignore
}  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_common_factor_counts(scaling: str, dtype: torch.dtype, sparse: bool) -> None:
    """Also where most entries are zero, such as in the table of an embedding."""
    w = Parameter(torch.zeros(20_000 if sparse else 5, dtype=dtype))
    rows = torch.zeros(B, len(w), dtype=torch.float64)
    rows[:, 1:4] = randn(B, 3) + 1
    opt = exact(w)
    opt.backward(losses(w.imag if dtype.is_complex else w, rows))
    SCALINGS[scaling](w)
    opt.step()
    found = observed(opt, w).resolve_conj()
    if dtype.is_complex:
        assert float(found.real.abs().max()) == 0
        found = found.imag
    close(found, brute(rows / 2), rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("variance", ["exact", "microbatch"])
def test_under_a_scaler(variance: str) -> None:
    w, rows = parameter(5), randn(B, 5)
    opt = exact(w, variance=variance)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for part in rows.split(4):
        if variance == "exact":
            opt.backward(scaler.scale(losses(w, part)), weight=1 / 3)
        else:
            scaler.scale(losses(w, part).sum() / B).backward()
            opt.microbatch(4)
    scaler.unscale_(opt)
    scaler.step(opt)
    means = rows.view(3, 4, 5).mean(1)
    close(observed(opt, w), brute(rows if variance == "exact" else means), rtol=1e-10, atol=0)


def test_a_step_that_the_scaler_skips_leaves_nothing_behind() -> None:
    w, rows = parameter(5), randn(B, 5)
    opt, scaler = exact(w), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    opt.backward(scaler.scale(losses(w, rows) * math.inf))
    scaler.step(opt)
    scaler.update()
    w.grad = None
    opt.backward(scaler.scale(losses(w, rows)))
    scaler.step(opt)
    close(observed(opt, w), brute(rows), rtol=1e-10, atol=0)


def cleared(opt: PopRiskAdamW, w: Tensor, how: str) -> None:
    if how == "model":
        w.grad = None
    elif how == "model, in place":
        w.grad.zero_()  # pyrefly: ignore
    else:
        opt.zero_grad(set_to_none=how == "to none")


@pytest.mark.parametrize("how", ["to none", "in place", "model", "model, in place"])
@pytest.mark.parametrize("variance", ["exact", "microbatch"])
@pytest.mark.parametrize("skipped", [False, True])
def test_every_way_to_clear_gradients(how: str, variance: str, skipped: bool) -> None:
    """The second batch is seen as if it were alone, also after a step that was left out."""
    w = Parameter(torch.zeros(5, dtype=torch.float64))
    opt = exact(w, variance=variance, betas=(0.0, 0.9), rho=0.0, lr=0.0)
    for t in range(3):
        rows = randn(B, 5, seed=t) * (math.nan if skipped and t == 1 else 1.0)
        for part in rows.split(4):
            if variance == "exact":
                opt.backward(losses(w, part), weight=1 / 3)
            else:
                losses(w, part).sum().div(B).backward()
                opt.microbatch(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            opt.step()
        cleared(opt, w, how)
    expected = brute(rows if variance == "exact" else rows.view(3, 4, 5).mean(1))
    close(opt.state[w]["grad_mean_var"], expected, rtol=1e-11, atol=0)
    assert opt.skipped_steps == skipped


def test_parameters_of_some_parts_or_none() -> None:
    """What a part does not use has a share of zero there."""
    w, u, never = (parameter(3, seed=i) for i in range(3))
    rows = randn(B, 3)
    opt = microbatched(w, u, never)
    for i, part in enumerate(rows.split(4)):
        (losses(w, part) + (losses(u, part) if i == 1 else 0)).sum().div(B).backward()
        opt.microbatch(4)
    opt.step()
    means = rows.view(3, 4, 3).mean(1)
    close(observed(opt, w), brute(means), rtol=1e-11, atol=0)
    close(observed(opt, u), brute(means * torch.tensor([[0.0], [1.0], [0.0]])), rtol=1e-11, atol=0)
    assert never.grad is None
    assert never not in opt.state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 512.0, 2.0**-8])
def test_low_precision_parameters(dtype: torch.dtype, scale: float) -> None:
    """Squares neither overflow nor vanish; state is float32."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    wide = copy.deepcopy(model).double()
    x = randn(B, 6).to(dtype)
    opt = exact(*model.parameters())
    opt.backward(model(x).square().sum(1) * scale)
    opt.step()
    values = wide(x.double()).square().sum(1) * scale
    rows = [torch.autograd.grad(v, [*wide.parameters()], retain_graph=True) for v in values]
    for j, p in enumerate(model.parameters()):
        found, expected = observed(opt, p), brute(torch.stack([r[j] for r in rows]))
        assert found.dtype == torch.float32
        assert float((found - expected).norm()) < 0.05 * float(expected.norm())


def test_groups_without_a_gate_and_groups_added_later() -> None:
    w, plain, later = (parameter(4, seed=i) for i in range(3))
    rows = randn(B, 4)
    opt = PopRiskAdamW([{"params": [w]}, {"params": [plain], "gate": False}], variance="exact")
    opt.backward(losses(w, rows) + losses(plain, rows))
    opt.step()
    close(plain.grad, rows.mean(0))
    assert "grad_mean_var" not in opt.state[plain]
    w.grad = plain.grad = None
    opt.add_param_group({"params": [later]})
    opt.backward(losses(w, rows) + losses(later, rows))
    close(later.grad, rows.mean(0))
    opt.step()
    close(observed(opt, later), brute(rows), rtol=1e-11, atol=0)


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_goes_on_after_a_round_trip(how: str) -> None:
    def train(opt: PopRiskAdamW, w: Tensor, steps: range) -> None:
        for t in steps:
            opt.zero_grad()
            opt.backward(losses(w, randn(B, 4, seed=t)))
            opt.step()

    w = parameter(4)
    opt = exact(w)
    train(opt, w, range(3))
    if how == "state_dict":
        u = Parameter(w.detach().clone())
        again = exact(u)
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        again = pickle.loads(pickle.dumps(opt)) if how == "pickle" else copy.deepcopy(opt)
        (u,) = again.param_groups[0]["params"]
    train(opt, w, range(3, 6))
    train(again, u, range(3, 6))
    assert_bitwise([u.detach(), *again.state[u].values()], [w.detach(), *opt.state[w].values()])


ROWS = randn(B, 4)


def refuse_step(change: Callable[[Tensor], Any]) -> None:
    w = parameter(4)
    opt = exact(w)
    opt.backward(losses(w, ROWS))
    change(w)
    opt.step()


def microbatch_steps(*, clear: bool = True, calls: int = 1, backwards: int = 1) -> None:
    w = parameter(4)
    opt = microbatched(w)
    for _ in range(2):
        for part in ROWS.split(6):
            for _ in range(backwards):
                losses(w, part).sum().div(B).backward()
            for _ in range(calls):
                opt.microbatch(6)
        opt.step()
        if clear:
            opt.zero_grad()


def plain_backward(opt: PopRiskAdamW) -> None:
    losses(opt.param_groups[0]["params"][0], ROWS).mean().backward()
    opt.step()


def twice(first: Callable[[Tensor], Any], *, weight: float = 0.5) -> None:
    w = parameter(4)
    opt = exact(w)
    opt.backward(losses(w, ROWS), weight=0.5)
    first(w)
    opt.backward(losses(w, ROWS), weight=weight)


def left_over() -> None:
    w = parameter(4)
    losses(w, ROWS).mean().backward()
    exact(w).backward(losses(w, ROWS))


def both() -> PopRiskAdamW:
    groups = [{"params": [parameter(1)], "variance": v} for v in ("exact", "microbatch")]
    return PopRiskAdamW(groups)


def no_zero_grad() -> None:
    w = parameter(4)
    opt = exact(w)
    for _ in range(2):
        opt.backward(losses(w, ROWS))
        opt.step()


REFUSALS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "clipped by value": (
        RuntimeError,
        "clipping by value",
        lambda: refuse_step(lambda p: nn.utils.clip_grad_value_([p], 0.05)),
    ),
    "noise": (RuntimeError, "added noise", lambda: refuse_step(lambda p: p.grad.add_(randn(4)))),  # pyrefly: ignore
    "turned": (RuntimeError, "common factor", lambda: refuse_step(lambda p: p.grad.neg_())),  # pyrefly: ignore
    "another backward": (
        RuntimeError,
        "another backward pass",
        lambda: refuse_step(lambda p: p.square().sum().backward()),
    ),
    "plain backward, exact": (
        RuntimeError,
        "saw 0 part",
        lambda: plain_backward(exact(parameter(4))),
    ),
    "plain backward, microbatch": (
        RuntimeError,
        "saw 0 part.*microbatch\\(size\\)",
        lambda: plain_backward(microbatched(parameter(4))),
    ),
    "forgotten call": (
        RuntimeError,
        "changed 2 times since the last",
        lambda: microbatch_steps(backwards=2),
    ),
    "two calls": (RuntimeError, "no backward pass since", lambda: microbatch_steps(calls=2)),
    "no zero_grad, microbatch": (
        RuntimeError,
        "left from before",
        lambda: microbatch_steps(clear=False),
    ),
    "no zero_grad, exact": (RuntimeError, "left from before", no_zero_grad),
    "left over": (RuntimeError, "left from before this batch", left_over),
    "changed in between": (
        RuntimeError,
        "between two parts",
        lambda: twice(lambda p: cast(Tensor, p.grad).mul_(2)),
    ),
    "unequal weights": (ValueError, "same share", lambda: twice(lambda p: None, weight=0.25)),
    "backward of ema": (
        RuntimeError,
        "backward\\(\\) is for variance='exact'.*'ema'",
        lambda: PopRiskAdamW([parameter(1)]).backward(torch.ones(2)),
    ),
    "microbatch of exact": (
        RuntimeError,
        "microbatch\\(\\) is for variance='microbatch'",
        lambda: exact(parameter(1)).microbatch(2),
    ),
    "both": (RuntimeError, "not both; use two", lambda: both().microbatch(2)),
    "size": (ValueError, "size", lambda: microbatched(parameter(1)).microbatch(0)),
    "scalar": (
        ValueError,
        "one value per example.*gave \\(\\)",
        lambda: exact(parameter(1)).backward(parameter(4).sum()),
    ),
    "matrix": (
        ValueError,
        "gave \\(2, 2\\).*reduction='none'",
        lambda: exact(parameter(1)).backward(parameter(2, 2)),
    ),
    "one example": (
        ValueError,
        "at least two of them, but got 1",
        lambda: exact(parameter(1)).backward(parameter(1) * 2),
    ),
    "no graph": (
        ValueError,
        "depend on no trainable parameter",
        lambda: exact(parameter(1)).backward(torch.ones(2)),
    ),
    "float": (
        TypeError,
        "must be a tensor, but got float",
        lambda: exact(parameter(1)).backward(cast(Any, 1.0)),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    kind, message, call = REFUSALS[name]
    with pytest.raises(kind, match=message):
        call()


def taps(grad: Tensor) -> Tensor:
    """What a masked convolution keeps."""
    kept = torch.zeros(grad.shape[-2:], dtype=grad.dtype)
    kept.view(-1)[: kept.numel() // 2 + 1] = 1
    return grad * kept


def in_columns(grad: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Changed in all columns but every fourth."""
    matrix = grad.flatten(1).clone()
    kept = torch.arange(matrix.shape[1]) % 4 == 0
    return torch.where(kept, matrix, change(matrix)).view_as(grad)


def without_row(grad: Tensor) -> Tensor:
    return grad.index_fill(0, torch.tensor([3]), 0)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "taps of a kernel": taps,
    "columns times 3": lambda g: in_columns(g, lambda m: 3 * m),
    "columns clamped": lambda g: in_columns(g, lambda m: m.clamp(-1e-4, 1e-4)),
    "a row left out": without_row,
    "clipped by value": lambda g: g.clamp(-float(g.std()), float(g.std())),
    "an entry clipped": lambda g: g.clamp(max=float(g.max()) / 2),
    "a sign": lambda g: in_columns(g, torch.neg),
    "decay": lambda g: g + 0.1 * g.std(),
    "centred": lambda g: g - g.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (16, 16, 3, 3), (128, 32, 3, 1), (7, 586, 2, 2)])
@pytest.mark.parametrize("kind", [PopRiskAdamW, PopRiskSOAP])
def test_changes_of_a_part_of_a_gradient_are_refused(
    change: str, shape: tuple[int, ...], kind: type[PopRiskAdamW]
) -> None:
    """Of any regular part, in gradients of any size: weights and averages stay as they are."""
    w = Parameter(torch.zeros(shape))
    rows = (randn(B, *shape) + 1).float()
    rows[:, 5, 6] += 40  # that one entry matters for itself
    opt = kind([w], variance="exact", lr=0.1)
    opt.backward(losses(w, rows))
    assert w.grad is not None
    changed = CHANGES[change](w.grad)
    w.grad.data.copy_(changed)
    with pytest.raises(RuntimeError, match="not clipping by value"):
        opt.step()
    assert not w.any()
    assert not opt.state.get(w)


@pytest.mark.parametrize("place", [0, 1020, 1021, 5104, 5105, 5999])
def test_every_entry_counts_in_a_probe(place: int) -> None:
    grad = randn(6000)
    probe = GradientProbe.of(grad)
    assert probe.holds(grad)
    assert probe.factor(0.3 * grad) == pytest.approx(0.3)
    changed = grad.clone()
    changed[place] *= 1.001
    assert not probe.holds(changed)
    assert not probe.holds_times(1.0, changed)
    changed[place] = 50
    with pytest.raises(RuntimeError, match="were changed"):
        probe.factor(changed)


def test_a_probe_is_as_large_as_its_gradient() -> None:
    """In the mean of many; also of a constant, which signs that alternate would not see."""
    for grad in (randn(200, 1021), torch.ones(200, 1021), randn(200, 1)[:, [0] * 1021]):
        ratio = GradientProbe.of(grad).numbers.norm() / grad.norm()
        assert 0.5 < float(ratio) < 2


def test_gradients_changed_through_data_between_two_parts_are_refused() -> None:
    """A batch that was given up so would leave its squares to the next."""
    with pytest.raises(RuntimeError, match=r"between two parts.*zero_grad"):
        twice(lambda p: cast(Tensor, p.grad).data.zero_())


@pytest.mark.parametrize("make", [exact, microbatched])
def test_what_is_unfrozen_between_two_parts_is_refused(make: Callable[..., PopRiskAdamW]) -> None:
    a, b = parameter(4), parameter(4)
    b.requires_grad_(False)
    opt = make(a, b)

    def part(*params: Tensor) -> None:
        each = torch.stack([losses(p, ROWS) for p in params]).sum(0)
        if make is exact:
            opt.backward(each, weight=0.5)
        else:
            each.mean().div(2).backward()
            opt.microbatch(B)

    part(a)
    b.requires_grad_()
    with pytest.raises(RuntimeError, match="frozen, unfrozen or added between two parts"):
        part(a, b)


@pytest.mark.parametrize("before", ["exact", "ema", "microbatch", "second-moment"])
@pytest.mark.parametrize("after", ["exact", "ema", "microbatch", "second-moment"])
@pytest.mark.parametrize("loaded", [False, True])
def test_another_variance_begins_its_own_average(before: str, after: str, loaded: bool) -> None:
    """As if the gate were new; also where a state is loaded and its setting put back."""

    def step(opt: PopRiskAdamW, t: int) -> None:
        (p,) = opt.param_groups[0]["params"]
        variance = opt.param_groups[0]["variance"]
        rows = randn(B, 4, seed=t)
        opt.zero_grad()
        if variance == "exact":
            opt.backward(losses(p, rows))
        else:
            for part in rows.split(B // 2):
                losses(p, part).sum().div(B).backward()
                if variance == "microbatch":
                    opt.microbatch(B // 2)
        opt.step()

    w = parameter(4)
    opt = exact(w, variance=before)
    for t in range(5):
        step(opt, t)
    fresh = exact(Parameter(w.detach().clone()), variance=after)
    (u,) = fresh.param_groups[0]["params"]
    kept = opt.state_dict() if before == after else torch.optim.AdamW([w]).state_dict()
    if before != after:
        adam = {k: v.clone() for k, v in opt.state[w].items() if k in ("step", *ADAM_KEYS)}
        kept = {**kept, "state": {0: adam}}
    fresh.load_state_dict(kept)
    fresh.param_groups[0].update(lr=0.1, weight_decay=0.01, variance=after)
    if loaded:
        other = exact(w, variance=after)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            other.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt = other
    opt.param_groups[0]["variance"] = after
    for t in range(5, 9):
        step(opt, t)
        step(fresh, t)
        close(w.detach(), u.detach())


@pytest.mark.parametrize("kind", [PopRiskAdamW, PopRiskSOAP])
def test_what_a_batch_does_not_reach_may_hold_a_zero_gradient(kind: type[PopRiskAdamW]) -> None:
    """As ``zero_grad(set_to_none=False)`` leaves it: mean and variance of this batch are zero."""
    w, u = parameter(4, 3), parameter(4, 3)
    opt = kind([w, u], variance="exact", lr=0.1, betas=(0.5, 0.9))
    rows = randn(B, 4, 3)
    opt.backward(losses(w, rows) + losses(u, rows))
    opt.step()
    before = opt.state[u]["grad_mean_var"].sum()
    opt.zero_grad(set_to_none=False)
    opt.backward(losses(w, rows))
    opt.step()
    assert opt.state[u]["step"] == 2
    close(opt.state[u]["grad_mean_var"].sum(), 0.25 * before)


@pytest.mark.parametrize("weight", [0, -0.5, float("inf"), float("nan")])
def test_a_weight_is_positive_and_finite(weight: float) -> None:
    w = parameter(4)
    with pytest.raises(ValueError, match=r"^weight must be positive and finite, but got"):
        exact(w).backward(losses(w, ROWS), weight=weight)
    assert w.grad is None


@pytest.mark.parametrize("weight", [True, "1", None])
def test_a_weight_is_a_number(weight: Any) -> None:
    w = parameter(4)
    with pytest.raises(TypeError, match=r"^weight must be a number, but got"):
        exact(w).backward(losses(w, ROWS), weight=weight)
    assert w.grad is None


@pytest.mark.parametrize("make", [exact, microbatched])
def test_what_is_unfrozen_between_batches_is_measured_from_the_first_part(
    make: Callable[..., PopRiskAdamW],
) -> None:
    def step(opt: PopRiskAdamW, *params: Tensor) -> None:
        for part in ROWS.split(6):
            each = torch.stack([losses(p, part) for p in params]).sum(0)
            if make is exact:
                opt.backward(each, weight=0.5)
            else:
                each.sum().div(B).backward()
                opt.microbatch(6)
        opt.step()
        opt.zero_grad()

    a, b, alone = parameter(4), parameter(4), parameter(4)
    b.requires_grad_(False)
    opt, other = make(a, b), make(alone)
    step(opt, a)
    b.requires_grad_()
    step(opt, a, b)
    step(other, alone)
    torch.testing.assert_close(observed(opt, b), observed(other, alone))


def test_groups_of_other_variances_are_left_to_them() -> None:
    """Losses of ``backward`` are those of the groups that measure within a batch, alone."""
    a, b = parameter(4), parameter(4)
    groups = [{"params": [a]}, {"params": [b], "variance": "ema", "batch_size": 5}]
    opt = PopRiskAdamW(groups, lr=0.01, batch_size=B, variance="exact")
    opt.backward(losses(a, ROWS) + losses(b, ROWS))
    opt.step()
    assert opt.param_groups[1]["variance"] == "ema"
    torch.testing.assert_close(observed(opt, a), brute(ROWS))
