"""What can be recorded is, without a trace; what cannot is refused before anything moves."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from poprisk import path as paths
from poprisk.path import NotAnalysable, Recorder, integrate, record, trace_cells
from runs import batches, data, network

Make = Callable[[], nn.Module]


class Around(nn.Module):
    """The small network, and something around it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()


class Bookkeeping(Around):
    """State of every kind that outputs do not depend on."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.calls, self.log, self.last = 0, list[float](), torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.calls += 1
        self.log.append(float(self.calls))
        self.last = self.net(x)
        return self.last


class Running(Around):
    """Outputs over their running size, which drifts too slowly to show in two calls."""

    scale: Tensor

    def __init__(self, momentum: float = 1e-13) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        self.scale.lerp_(h.detach().abs().mean(), self.momentum)
        return h / self.scale


class StepCounts(Around):
    """Changes its mind after some calls, counted in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) * (1 if self.calls < 50 else 2)


class FirstBatch(Around):
    """Takes its scale from the first batch."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        if not bool(self.scale):
            self.scale += h.detach().std()
        return h / self.scale


class Force(nn.Module):
    """The negative gradient of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return -slope[:, :2]


class Checkpointed(Around):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2).double()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant:
            x = x.detach().requires_grad_()
        return self.head(checkpoint(self.net, x, use_reentrant=self.use_reentrant))


class Words(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4, **settings).double()
        self.head = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words((3 * x[:, 0].abs()).long().clamp(max=8)).tanh())


class After(Around):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


class Hoarding(Around):
    """Reads its weights from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = list(self.net.parameters())

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.weights
        return F.linear(F.linear(x, a, b).tanh(), c, d)


def changed(change: Callable[[Any], Any]) -> nn.Module:
    net = network()
    change(net)
    return net


def tied(net: Any) -> None:
    net.append(nn.Tanh())
    net.append(nn.Linear(2, 2).double())
    net.append(nn.Linear(2, 2).double())
    net[5].weight = net[4].weight


def normalized(net: Any) -> None:
    net[0] = nn.utils.parametrizations.spectral_norm(net[0])


def with_hook(net: Any) -> None:
    net[0].weight.register_hook(torch.neg)


def with_late_hook(net: Any) -> None:
    net[0].weight.register_post_accumulate_grad_hook(id)


def compiled() -> nn.Module:
    return torch.compile(network(), backend="aot_eager")  # type: ignore[return-value]


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().sum(1).mean() / 2


def trained_alone(net: nn.Module, steps: int) -> nn.Module:
    """The model after the same loop without a recorder."""
    (x, y), _, _ = data()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    for batch in batches(steps):
        sgd.zero_grad()
        squared(net(x[batch]), y[batch]).backward()
        sgd.step()
    return net


def everything(net: nn.Module) -> dict[str, Any]:
    """Tensors and plain attributes."""
    found: dict[str, Any] = {k: v.tolist() for k, v in net.state_dict().items()}
    for name, module in net.named_modules():
        for key, value in vars(module).items():
            if key.startswith("_torchdynamo"):
                continue
            if isinstance(value, (int, float, list)):
                found[f"{name} {key}"] = copy.copy(value)
            elif isinstance(value, Tensor):
                found[f"{name} {key}"] = value.tolist()
    return found


RIGHT: dict[str, Make] = {
    "plain": network,
    "state that is not read": Bookkeeping,
    "forces": Force,
    "checkpoints": lambda: Checkpointed(use_reentrant=False),
    "sparse gradients": lambda: Words(sparse=True),
    "tied weights": lambda: changed(tied),
    "spectral norm in eval mode": lambda: changed(normalized).eval(),
    "compiled": compiled,
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_record_is_exact_and_leaves_no_trace(kind: str) -> None:
    train, query, clean = data()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = RIGHT[kind]()
    alone = trained_alone(copy.deepcopy(net), 4)
    torch.manual_seed(5)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    run = record(net, "squared_error", sgd, batches(4), query, train=train)
    assert torch.equal(torch.rand(()), torch.rand((), generator=torch.Generator().manual_seed(5)))
    assert everything(net) == everything(alone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that it is slow, row by row
        assert integrate(run).closure.worst < 1e-9
        assert trace_cells(run, clean, every=1, quadrature="gauss3").closure.worst < 1e-9
    assert everything(net) == everything(alone)


REFUSED: dict[str, tuple[Make, str]] = {
    "running state": (Running, "'scale', which outputs depend on"),
    "fast running state": (lambda: Running(0.1), "writes to what it reads, 'scale'"),
    "a counter that is read": (StepCounts, "'calls', which outputs depend on"),
    "first batch": (FirstBatch, "first forward pass writes to 'scale'.*call the model once"),
    "spectral norm": (lambda: changed(normalized), r"'0\.parametrizations\.weight"),
    "re-entrant": (lambda: Checkpointed(use_reentrant=True), "pass use_reentrant=False"),
    "max_norm": (lambda: Words(max_norm=100.0), r"'words\.weight' \(nn\.Embedding\(max_norm"),
    "a tuple": (lambda: After(lambda u: (u, u)), "a row per example.*returned tuple"),
    "examples last": (lambda: After(lambda u: u.mT), r"8 examples it returned \(2, 8\)"),
    "a square": (lambda: After(lambda u: u @ u.mT), "examples first"),
    "a sort": (lambda: After(lambda u: u.sort(0)[0]), "depend on the other examples"),
    "complex": (lambda: After(lambda u: 1j * u), "must be real"),
    "NaN": (lambda: After(lambda u: u * torch.nan), "NaN or infinite before any step"),
    "no weights": (lambda: After(Tensor.detach), "they do not depend on them"),
    "a list of weights": (Hoarding, "reads them from elsewhere"),
    "a hook": (lambda: changed(with_hook), r"hooks are registered on gradients of '0\.weight'"),
    "a late hook": (lambda: changed(with_late_hook), r"hooks are .* of '0\.weight'"),
    "no shape": (lambda: nn.LazyLinear(2), "no shape yet: 'weight', 'bias'"),
    "DataParallel": (lambda: nn.DataParallel(network()), "wrapped in DataParallel"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_is_refused_before_anything_moves(kind: str) -> None:
    make, message = REFUSED[kind]
    train, query, _ = data()
    net = make()
    lazy = kind == "no shape"
    before = None if lazy else everything(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    with pytest.raises(NotAnalysable, match=f"(?s){message}"):
        record(net, "squared_error", sgd, batches(4), query, train=train)
    assert lazy or everything(net) == before
    assert all(p.grad is None for p in net.parameters())


def multi_margin(u: Tensor, y: Tensor) -> Tensor:
    return F.multi_margin_loss(u, (y[:, 0] > 0).long(), reduction="none")


LOSSES: dict[str, tuple[Any, str]] = {
    "no second derivative": (multi_margin, "loss has no second derivative"),
    "no derivative": (lambda u, y: (u.argmax(1) != 0).double(), "differentiable in the outputs"),
    "a mean": (lambda u, y: (u - y).square().mean(), r"shape \(8,\) for 8 examples, but gave \(\)"),
    "per output": (lambda u, y: (u - y).square(), "one value per example"),
    "across the batch": (lambda u, y: (u - u.mean(0)).square().sum(1), "the others of its batch"),
    "out of range": (
        # only of an example behind the first eight
        lambda u, y: F.cross_entropy(u, 5 * (y[:, 0] == y[:, 0].max()).long(), reduction="none"),
        "loss fails on the targets of the training set.*out of bounds",
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_refused_before_anything_moves(kind: str) -> None:
    loss, message = LOSSES[kind]
    train, query, _ = data()
    train = (train[0], train[1].sort(0)[0])
    net = network()
    before = everything(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        record(net, loss, sgd, batches(4), query, train=train)
    assert everything(net) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_whatever_mode_is_on(mode: Any) -> None:
    train, query, _ = data()
    net, alone = network(), trained_alone(network(), 6)
    with mode():
        inputs = (train[0] * 1, train[1] * 1)
        sgd = torch.optim.SGD(net.parameters(), lr=0.05)
        run = record(net, "squared_error", sgd, batches(6), query, train=inputs)
        assert integrate(run).closure.worst < 1e-9
    assert everything(net) == everything(alone)


def test_a_model_of_inference_mode_is_refused() -> None:
    train, _, _ = data()
    with torch.inference_mode():
        net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    with pytest.raises(NotAnalysable, match=r"made under torch.inference_mode\(\): '0.weight'"):
        Recorder(net, "squared_error", sgd, train=train)


def test_autocast_is_refused() -> None:
    train, _, _ = data()
    net = network().float()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    single = (train[0].float(), train[1].float())
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(NotAnalysable, match="autocast is on"),
    ):
        Recorder(net, "squared_error", sgd, train=single)


def test_a_model_of_one_precision_is_told_at_the_start() -> None:
    (x, y), _, clean = data()
    train, net = (x.float(), y.float()), After(lambda u: u).float()
    net.change = lambda u: u @ torch.eye(2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    with pytest.warns(RuntimeWarning, match="does not run in torch.float64"):
        run = record(net, "squared_error", sgd, batches(4), train=train)
    assert trace_cells(run, clean.float(), every=1).closure.worst < 1e-2
    with pytest.raises(NotAnalysable, match=r"does not run in torch\.float64"):
        integrate(run)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ((torch.zeros(3, 3).double(), torch.zeros(2, 2).double()), "3 inputs and 2 targets"),
        (torch.zeros(0, 3).double(), "0 inputs"),
    ],
)
def test_query_points_are_tried(query: Any, message: str) -> None:
    train, _, _ = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    with pytest.raises(ValueError, match=message):
        record(net, "squared_error", sgd, batches(4), query, train=train)


@pytest.mark.parametrize("which", ["inputs", "targets", "query"])
def test_data_that_is_written_to_later_is_noticed(which: str) -> None:
    train, query, clean = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    run = record(net, "squared_error", sgd, batches(4), query, train=train)
    {"inputs": train[0], "targets": train[1], "query": query[0]}[which][0] += 1e-3
    message = "changed in place since the run was recorded"
    with pytest.raises(NotAnalysable, match=message):
        integrate(run)
    with pytest.raises(NotAnalysable, match=message):
        trace_cells(run, clean)


def test_the_context_of_a_step_has_its_old_name_for_one_release() -> None:
    with pytest.warns(
        DeprecationWarning, match=r"poprisk.path.Facts is poprisk.path.StepContext now"
    ):
        assert paths.Facts is paths.StepContext
    with pytest.raises(AttributeError, match="has no attribute 'Fact'"):
        _ = paths.Fact
