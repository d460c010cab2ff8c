"""The monitor in Lightning, beside the optimizer."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

lightning = pytest.importorskip("lightning.pytorch")

from poprisk import PopRiskAdamW, gated  # noqa: E402
from poprisk.integrations.lightning import LightningRiskCallback  # noqa: E402

N = 24
pytestmark = [  # Lightning asks PyTorch's trees in the old way
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().mean(1)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Any:
        return squared(self.net(batch[0]), batch[1]).mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return PopRiskAdamW(self, lr=1e-2, batch_size=8, dataset_size=N)


def train(callbacks: list[Any], folder: Path, module: Any = None, **settings: Any) -> Any:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 3, generator=g), torch.randn(N, 1, generator=g)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    torch.manual_seed(1)
    trainer = lightning.Trainer(
        **{"max_epochs": 2, "accumulate_grad_batches": 2, **settings},
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
    )
    module = Module() if module is None else module
    trainer.fit(module, loader, loader)
    return module


def test_the_monitor_pools_the_parts_of_a_step_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    callback = LightningRiskCallback(squared, every=2, sinks=[path], log=True)
    watched, alone = train([callback], tmp_path), train([], tmp_path)
    for a, b in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(row["loss"] > 0 and -1 < row["signal/share_low"] < 1 for row in rows)
    assert any(name.startswith("gate/pass_rate") for name in rows[-1])
    assert callback.monitor is not None
    assert callback.monitor._statistics.examples == 8


def test_a_remainder_is_a_step_of_its_own(tmp_path: Path) -> None:
    callback = LightningRiskCallback(squared, every=1)
    train([callback], tmp_path, accumulate_grad_batches=4)  # 6 batches: 4 and 2 an epoch
    assert callback.monitor is not None
    assert [step for step, _ in callback.monitor.rows] == [0, 1, 2, 3]
    assert callback.monitor._statistics.examples == 8


class Alternating(Module):
    """Two optimizers that its own loop steps; the first one every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(squared(self.net(batch[0]), batch[1]).mean())
        if index % 2:
            first.step()
            first.zero_grad()
        second.step()
        second.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=1e-2) for i in (0, 2)]


def test_of_several_optimizers_one_is_watched(tmp_path: Path) -> None:
    callback = LightningRiskCallback(squared, every=1)
    train([callback], tmp_path, Alternating(), accumulate_grad_batches=1)
    assert callback.monitor is not None
    assert callback.monitor.optimizer is callback._watched
    assert [step for step, _ in callback.monitor.rows] == list(range(12))


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    first, second = LightningRiskCallback(squared, every=2), LightningRiskCallback(squared, every=2)
    train([first], tmp_path)
    second.load_state_dict(first.state_dict())
    train([second], tmp_path)
    assert second.monitor is not None
    assert [step for step, _ in second.monitor.rows] == [6, 8, 10]


def test_what_goes_wrong_in_a_callback_ends_nothing(tmp_path: Path) -> None:
    callback = LightningRiskCallback(squared, every=1, split=lambda batch: batch[7])
    with pytest.warns(RuntimeWarning, match="cannot measure loss and signal"):
        train([callback], tmp_path)


def quiet(folder: Path, **settings: Any) -> Any:
    return lightning.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
        **settings,
    )


def loader() -> Any:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 3, generator=g), torch.randn(N, 1, generator=g)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "PopRiskAdamW": lambda m: PopRiskAdamW(m, lr=1e-2, batch_size=4, dataset_size=N),
    "exact": lambda m: PopRiskAdamW(m, lr=1e-2, batch_size=4, variance="exact"),
    "gated": lambda m: gated(torch.optim.SGD(m.parameters(), lr=0.1), batch_size=4),
}


def nets() -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [nn.Linear(3, 1), nn.Linear(3, 1)]


def one_step(opt: Any, net: nn.Module, batch: Any, kind: str, backward: Any) -> None:
    opt.zero_grad()
    losses = squared(net(batch[0]), batch[1])
    if kind == "exact":
        opt.backward(losses)
    else:
        backward(losses.mean())
    opt.step()


class Manual(lightning.LightningModule):
    """Two optimizers that take turns, as in a GAN."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.kind, self.nets = kind, nn.ModuleList(nets())

    def training_step(self, batch: Any, index: int) -> None:
        for opt, net in zip(self.optimizers(), self.nets, strict=True):
            one_step(opt, net, batch, self.kind, self.manual_backward)

    def configure_optimizers(self) -> list[Any]:
        return [MAKERS[self.kind](net) for net in self.nets]


@pytest.mark.parametrize("kind", MAKERS)
def test_manual_optimization_of_two_is_a_loop_written_by_hand(tmp_path: Path, kind: str) -> None:
    """Lightning's wrapper imitates the optimizer, whose parts of a batch it must share."""
    module = Manual(kind)
    quiet(tmp_path, max_epochs=2).fit(module, loader())
    plain = nets()
    opts = [MAKERS[kind](net) for net in plain]
    for batch in [*loader(), *loader()]:
        for opt, net in zip(opts, plain, strict=True):
            one_step(opt, net, batch, kind, Tensor.backward)
    for a, b in zip(
        module.nets.parameters(), (p for n in plain for p in n.parameters()), strict=True
    ):
        assert torch.equal(a, b)


class Thaw(lightning.callbacks.BaseFinetuning):
    """Trains the second layer alone for an epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=5e-3)


@pytest.mark.parametrize("kind", ["named", "unnamed", "gated"])
def test_a_finetuning_callback_adds_its_group(tmp_path: Path, kind: str) -> None:
    class Frozen(Module):
        def configure_optimizers(self) -> Any:
            named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
            params = [p for _, p in named]
            if kind == "gated":
                return gated(torch.optim.SGD(params, lr=0.1), batch_size=4)
            return PopRiskAdamW(named if kind == "named" else params, lr=1e-2, batch_size=4)

    module = Frozen()
    thawed: Any = module.net[0]
    first = thawed.weight.detach().clone()
    trainer = quiet(tmp_path, max_epochs=3, callbacks=[Thaw()])
    trainer.fit(module, loader(), loader())
    (opt,) = trainer.optimizers
    assert [g["lr"] for g in opt.param_groups][1] == 5e-3
    assert len(opt.param_groups) == 2
    assert not torch.equal(thawed.weight, first)


@pytest.mark.parametrize("kind", ["PopRiskAdamW", "gated"])
def test_a_run_resumed_from_a_checkpoint_is_one_that_never_stopped(
    tmp_path: Path, kind: str
) -> None:
    class Resumed(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = nn.Identity()

        def configure_optimizers(self) -> Any:
            return MAKERS[kind](self)

    whole, half, rest = Resumed(), Resumed(), Resumed()
    quiet(tmp_path, max_epochs=4).fit(whole, loader(), loader())
    first = quiet(tmp_path, max_epochs=2)
    first.fit(half, loader(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    quiet(tmp_path, max_epochs=4).fit(rest, loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
    for a, b in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_callback_has_its_old_name_for_one_release() -> None:
    module = importlib.import_module("poprisk.integrations.lightning")
    with pytest.warns(DeprecationWarning, match=r"RiskCallback is .*\.LightningRiskCallback now"):
        assert module.RiskCallback is LightningRiskCallback
