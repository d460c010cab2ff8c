"""The cells in lockstep with transformers' Trainer and with Lightning, against those of a loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hub_models import distilbert
from poprisk.path import CellTrace, CellTracer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]
N, C = 24, 3
EXACT: dict[str, Any] = {"every": 1, "quadrature": "gauss3"}


def targets() -> tuple[Tensor, Tensor]:
    """Noisy labels, and clean ones."""
    clean = torch.randint(C, (N,), generator=torch.Generator().manual_seed(0))
    noisy = clean.clone()
    noisy[:6] = (noisy[:6] + 1) % C
    return noisy, clean


def same(found: CellTrace, expected: CellTrace, rtol: float) -> None:
    assert found.parts[-1].step == expected.parts[-1].step
    for name in ("signal", "noise", "affine", "outputs"):
        a, b = (getattr(trace.parts[-1], name) for trace in (found, expected))
        assert float((a - b).norm()) <= rtol * float(b.norm())
    assert float(expected.parts[-1].noise.norm()) > 1e-2
    assert found.closure.worst < rtol


# Transformers


def bert(dropout: float = 0.0) -> Any:
    return distilbert(C, dropout=dropout, attention_dropout=0.0, seq_classif_dropout=0.0)


def texts() -> Tensor:
    rows = [[5 * int(k) + 1, 5 * int(k) + 2, i % 20] for i, k in enumerate(targets()[1])]
    return torch.tensor(rows)


def trainer_of(
    folder: Path, *callbacks: Any, model: Any = None, index: bool = True, **more: Any
) -> Any:
    transformers, datasets = (pytest.importorskip(name) for name in ("transformers", "datasets"))
    rows = {"input_ids": texts().tolist(), "labels": targets()[0].tolist()}
    data = datasets.Dataset.from_dict(rows)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 12,
        "num_train_epochs": 2,
        "learning_rate": 0.3,
        "weight_decay": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **more,
    }
    return transformers.Trainer(
        bert() if model is None else model,
        transformers.TrainingArguments(str(folder), **settings),
        train_dataset=data.add_column("index", list(range(N))) if index else data,
        callbacks=list(callbacks),
    )


def trainer_cells(**settings: Any) -> Any:
    from poprisk.integrations.transformers_cells import TrainerCellCallback

    noisy, clean = targets()
    return TrainerCellCallback(
        "cross_entropy", train=(texts(), noisy), clean_targets=clean, query=texts()[:5], **settings
    )


def test_in_the_trainer_the_cells_are_those_of_a_loop(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    callback, seen, rates = trainer_cells(**EXACT), list[list[Tensor]](), list[float]()

    class Spy(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append(list(callback._told))
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    trainer = trainer_of(tmp_path, callback, Spy())
    groups = [g["weight_decay"] for g in trainer.create_optimizer().param_groups]
    trainer.train()
    alone = trainer_of(tmp_path)
    alone.train()
    for a, b in zip(trainer.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not trainer.model._forward_pre_hooks
    assert callback.cost > 0

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = bert()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(input_ids=x).logits

    net, (noisy, clean) = Logits(), targets()
    kept = trainer.create_optimizer().param_groups
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    own = dict(net.model.named_parameters())
    opt = torch.optim.SGD(
        [
            {"params": [own[names[id(p)]] for p in g["params"]], "weight_decay": decay}
            for g, decay in zip(kept, groups, strict=True)
        ],
        lr=0.3,
    )
    tracer = CellTracer(
        net, "cross_entropy", opt, train=(texts(), noisy), clean_targets=clean, query=texts()[:5],
        **EXACT,
    )  # fmt: skip
    with tracer:
        for told, lr in zip(seen, rates, strict=True):
            for group in opt.param_groups:
                group["lr"] = lr
            batch = torch.cat(told)
            opt.zero_grad()
            F.cross_entropy(net(texts()[batch]), noisy[batch]).backward()
            opt.step()
            tracer.step(batch)
    same(callback.trace(), tracer.trace(), 1e-3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_grad_norm": 1.0}, "cannot be traced with max_grad_norm=1.0"),
        ({"remove_unused_columns": True}, "set remove_unused_columns=False"),
        ({"index": False}, "has no 'index'"),
        ({"dropout": 0.3}, "other outputs when the same inputs are repeated .dropout"),
    ],
)
def test_what_cannot_be_traced_in_the_trainer(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    model = bert(changes.pop("dropout", 0.0))
    with pytest.raises(ValueError, match=expected):
        trainer_of(tmp_path, trainer_cells(), model=model, **changes).train()


# Lightning


def fitted(folder: Path, callbacks: list[Any], manual: bool = False, **more: Any) -> Any:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, C))
            self.automatic_optimization = not manual

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            me: Any = self
            return F.cross_entropy(me(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

    module = Module()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(points(), targets()[0], torch.arange(N)), batch_size=6
    )
    settings: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, **more}
    trainer = lightning.Trainer(
        **settings,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
    )
    trainer.fit(module, loader)
    return module


def points() -> Tensor:
    noise = torch.randn(N, C, generator=torch.Generator().manual_seed(1))
    return torch.cat([F.one_hot(targets()[1], C) + noise, torch.ones(N, 1)], 1)


def lightning_cells(**settings: Any) -> Any:
    pytest.importorskip("lightning.pytorch")
    from poprisk.integrations.lightning_cells import LightningCellCallback

    noisy, clean = targets()
    query = (points()[:5], clean[:5])
    return LightningCellCallback(
        "cross_entropy", train=(points(), noisy), clean_targets=clean, query=query, **settings
    )


def test_in_lightning_the_cells_are_those_of_a_loop(tmp_path: Path) -> None:
    callback = lightning_cells(**EXACT)
    with pytest.raises(ValueError, match="nothing was followed yet"):
        callback.trace()
    assert callback.cost != callback.cost
    module, alone = fitted(tmp_path, [callback]), fitted(tmp_path, [])
    for a, b in zip(module.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, C))
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    x, (noisy, clean) = points(), targets()
    tracer = CellTracer(
        net, "cross_entropy", opt, train=(x, noisy), clean_targets=clean, query=x[:5], **EXACT
    )
    with tracer:
        for batch in 2 * torch.arange(N).split(12):
            opt.zero_grad()
            F.cross_entropy(net(x[batch]), noisy[batch]).backward()
            opt.step()
            tracer.step(batch)
    same(callback.trace(), tracer.trace(), 1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gradient_clip_val": 1.0}, "cannot be traced with gradient_clip_val"),
        ({"precision": "bf16-mixed"}, "cannot be traced with precision='bf16-mixed'"),
        ({"manual": True, "accumulate_grad_batches": 1}, "train a CellTracer in a loop"),
    ],
)
def test_what_cannot_be_traced_in_lightning(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        fitted(tmp_path, [lightning_cells()], **changes)


def test_an_error_in_lightning_leaves_no_hook(tmp_path: Path) -> None:
    def wrong(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y, index = batch
        return x, y, (index + 1) % N

    callback = lightning_cells(split=wrong)
    with pytest.raises(ValueError, match="gradient of step 1 is not"):
        fitted(tmp_path, [callback])
    assert not callback._tracer._reader.optimizer._optimizer_step_post_hooks
