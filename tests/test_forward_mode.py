"""Models whose fast kernels cannot be differentiated are followed with plain ones, or by rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk import loo_risk, path_operators, record, trace_cells
from poprisk.forward_mode import plain_kernels
from poprisk.path import NotAnalysable, Run
from poprisk.path.jacobian import FlatJacobian
from poprisk.path.problem import Problem
from samplers import randn

N, M = 8, 3
F64 = torch.float64


class Net(nn.Module):
    """A body on inputs (b, 6, 4), and a linear layer on what it makes of them."""

    def __init__(self, body: nn.Module, read: Callable[[Any], Tensor], width: int) -> None:
        super().__init__()
        self.body, self.read, self.head = body, read, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.body(x)))


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Padded(nn.Module):
    """An encoder that hides the last position, which torch makes nested tensors of."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder(nested=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
        hidden[:, -1] = True
        return self.encoder(x, src_key_padding_mask=hidden)[:, :5]


class Function(nn.Module):
    """A linear layer and a function of torch."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.of = nn.Linear(4, 4), of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.linear(x))


class Cubed(torch.autograd.Function):
    """An operation of the user's own, in the form that torch.func cannot take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grads[0]


class Force(nn.Module):
    """Differentiates an energy by its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def encoder(*, nested: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)


def mean(x: Tensor) -> Tensor:
    return x.mean(1)


def last(found: tuple[Tensor, Any]) -> Tensor:
    return found[0][:, -1]


def by_grid(x: Tensor) -> Tensor:
    where = x[:, :, None, :2].tanh()
    return F.grid_sample(x[:, None], where, "bicubic", align_corners=False).flatten(1)


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: Net(encoder(nested=False), mean, 4),
    "encoder with padding": lambda: Net(Padded(), mean, 4),
    "attention": lambda: Net(Attended(), mean, 4),
    "fused product": lambda: Net(
        Function(lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])),
        lambda x: x.mean((1, 2)),
        4,
    ),
    "LSTM": lambda: Net(nn.LSTM(4, 5, batch_first=True), last, 5),
    "GRU": lambda: Net(nn.GRU(4, 5, batch_first=True), last, 5),
    "convolution": lambda: Net(nn.Conv1d(6, 3, 2), lambda x: x.flatten(1).tanh(), 9),
}
"""Models that have forward mode once no fused kernel is used."""

BY_ROWS: dict[str, Callable[[], nn.Module]] = {
    "distances": lambda: Net(Function(lambda x: torch.cdist(x, x + 1)), mean, 6),
    "grid": lambda: Net(Function(by_grid), lambda x: x, 6),
    "own function": lambda: Net(Function(Cubed.apply), mean, 4),
    "forces": lambda: Net(Force(), mean, 4),
}
"""Models without forward mode."""


def made(name: str, dtype: torch.dtype = F64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {**PLAIN, **BY_ROWS}[name]().to(dtype).eval()


def problem_of(name: str, dtype: torch.dtype = F64) -> Problem:
    x = randn(N, 6, 4).to(dtype)
    names = tuple(k for k, _ in made(name).named_parameters())
    y = torch.zeros(N, 2, dtype=dtype)
    return Problem(made(name, dtype), lambda u, y: (u - y).sum(1), (x, y), (x, None), names, (2,))


def recorded(name: str, **settings: Any) -> Run:
    net, x, y = made(name), randn(N + M, 6, 4, seed=1), randn(N + M, 2, seed=2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    drawn = list(torch.arange(N).repeat(2).split(4))
    query = (x[N:], y[N:])
    return record(net, "squared_error", sgd, drawn, query, train=(x[:N], y[:N]), **settings)


def naive_jacobian(problem: Problem, w: Tensor, x: Tensor) -> Tensor:
    """Row by row, by reverse mode of the model as it is."""
    z = w.detach().requires_grad_()
    u = problem.J.outputs(z, x).flatten()
    return torch.stack([torch.autograd.grad(v, z, retain_graph=True)[0] for v in u])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PLAIN)
def test_forward_mode_is_the_transpose_of_reverse_mode(name: str, dtype: torch.dtype) -> None:
    problem = problem_of(name, dtype)
    w = torch.cat([p.detach().flatten() for p in problem.parameters])
    v, x = randn(len(w), 3, seed=3).to(dtype), problem.train[0]
    assert problem.J.no_forward_mode == ""
    expected = (naive_jacobian(problem, w, x) @ v).view(N, 2, 3)
    tolerance = 1e-10 if dtype == F64 else 1e-4
    torch.testing.assert_close(problem.J.jvp(w, x, v), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BY_ROWS)
@pytest.mark.filterwarnings("ignore:the model cannot be vectorized")
def test_without_forward_mode_the_product_is_formed_and_the_operation_named(name: str) -> None:
    problem = problem_of(name)
    w = torch.cat([p.detach().flatten() for p in problem.parameters])
    v, x = randn(len(w), 3, seed=3), problem.train[0]
    expected = (naive_jacobian(problem, w, x) @ v).view(N, 2, 3)
    with pytest.warns(RuntimeWarning, match=r"no forward-mode derivative \(.+\); Jacobians"):
        torch.testing.assert_close(problem.J.jvp(w, x, v), expected, rtol=1e-10, atol=1e-10)
    named = {"distances": "_cdist_forward", "grid": "grid_sampler_2d", "own function": "Function"}
    assert named.get(name, "") in problem.J.no_forward_mode


@pytest.mark.parametrize("name", PLAIN)
def test_a_run_in_evaluation_mode_is_followed_exactly(name: str) -> None:
    run = recorded(name)
    trace = trace_cells(run, run.problem.train[1], every=1, quadrature="gauss3")
    assert trace.closure.worst < 1e-2
    assert loo_risk(run).valid
    assert loo_risk(run, form="hessian").valid


@pytest.mark.parametrize("name", BY_ROWS)
@pytest.mark.filterwarnings("ignore:the model has no forward-mode:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:the model cannot be vectorized:RuntimeWarning")
def test_a_run_is_followed_by_rows(name: str) -> None:
    run = recorded(name)
    trace = trace_cells(run, run.problem.train[1], every=1, quadrature="gauss3")
    assert trace.closure.worst < 1e-2
    assert path_operators(run).closure.worst < 1e-2
    assert loo_risk(run).valid
    with pytest.raises(NotAnalysable, match=r"no forward-mode .+ choose form=\"gauss-newton\""):
        loo_risk(run, form="hessian")


@pytest.mark.filterwarnings("ignore:the model has no forward-mode:RuntimeWarning")
def test_deletions_by_rows_are_those_by_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = loo_risk(recorded("attention"))
    monkeypatch.setattr(FlatJacobian, "no_forward_mode", "the model has no forward-mode (said so)")
    found = loo_risk(recorded("attention"))
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-10, atol=1e-10)
    assert found.dof == pytest.approx(expected.dof)


@pytest.mark.parametrize("fails", [False, True])
def test_switches_of_torch_are_put_back(fails: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    try:
        with plain_kernels(nn.LSTM(2, 2)):
            assert not torch.backends.mha.get_fastpath_enabled()
            assert not torch._C._get_mkldnn_enabled()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert before == (torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled())
    with plain_kernels(nn.Linear(2, 2)):
        assert torch._C._get_mkldnn_enabled() == before[1]


class _Silent(torch.autograd.Function):
    """A function whose forward-mode derivative is refused without a word."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:
        return 2 * args[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _Silent.apply(super().forward(input))


def test_a_derivative_refused_without_a_word_is_reported_by_its_kind() -> None:
    model, x, y = _Doubled(2, 1), torch.randn(4, 2), torch.randn(4, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    run = record(model, "squared_error", sgd, [torch.arange(4)], train=(x, y))
    assert run.problem.J.no_forward_mode.endswith("derivative (NotImplementedError)")
