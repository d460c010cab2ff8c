"""The monitor in Lightning, beside the optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

lightning = pytest.importorskip("lightning.pytorch")

from poprisk import PopRiskAdamW  # noqa: E402
from poprisk.integrations.lightning import RiskCallback  # noqa: E402

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
    callback = RiskCallback(squared, every=2, sinks=[path], log=True)
    watched, alone = train([callback], tmp_path), train([], tmp_path)
    for a, b in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(row["loss"] > 0 and -1 < row["signal/share"] < 1 for row in rows)
    assert any(name.startswith("gate/pass_rate") for name in rows[-1])
    assert callback.monitor is not None
    assert callback.monitor._statistics.examples == 8


def test_a_remainder_is_a_step_of_its_own(tmp_path: Path) -> None:
    callback = RiskCallback(squared, every=1)
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
    callback = RiskCallback(squared, every=1)
    train([callback], tmp_path, Alternating(), accumulate_grad_batches=1)
    assert callback.monitor is not None
    assert callback.monitor.optimizer is callback._watched
    assert [step for step, _ in callback.monitor.rows] == list(range(12))


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    first, second = RiskCallback(squared, every=2), RiskCallback(squared, every=2)
    train([first], tmp_path)
    second.load_state_dict(first.state_dict())
    train([second], tmp_path)
    assert second.monitor is not None
    assert [step for step, _ in second.monitor.rows] == [6, 8, 10]


def test_what_goes_wrong_in_a_callback_ends_nothing(tmp_path: Path) -> None:
    callback = RiskCallback(squared, every=1, split=lambda batch: batch[7])
    with pytest.warns(RuntimeWarning, match="cannot measure loss and signal"):
        train([callback], tmp_path)
