"""The optimizer and the monitor in transformers.Trainer, on a tiny model from a configuration."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from poprisk import PopRiskAdamW, gated  # noqa: E402
from poprisk.integrations.transformers import TrainerRiskCallback, poprisk_optimizer  # noqa: E402

N = 40
pytestmark = pytest.mark.slow


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


def data() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    words = torch.randint(20, (N, 6), generator=g)
    return [{"input_ids": w, "labels": (w[0] > 9).long()} for w in words]


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=20, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=8
    )
    return transformers.DistilBertForSequenceClassification(config)


def train(
    folder: Path, callbacks: list[Any], *, more: dict[str, Any] | None = None, **settings: Any
) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 7,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 1,
        "disable_tqdm": True,
    }
    args = transformers.TrainingArguments(**given | (more or {}))
    trainer = transformers.Trainer(
        model(),
        args,
        train_dataset=data(),
        optimizer_cls_and_kwargs=poprisk_optimizer(args, N, **settings),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def test_the_trainer_trains_with_the_gate(tmp_path: Path) -> None:
    trainer = train(tmp_path, [], z=2.0)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, PopRiskAdamW)
    group = optimizer.param_groups[0]
    assert (group["batch_size"], group["dataset_size"], group["z"]) == (8, N, 2.0)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.01, 0.0}
    assert all(0 <= s.pass_rate <= 1 for s in optimizer.gate_stats().values())


def test_the_monitor_pools_the_parts_of_a_step_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    callback = TrainerRiskCallback(cross_entropy, every=3, sinks=[path])
    watched, alone = train(tmp_path, [callback]), train(tmp_path, [])
    for a, b in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert all(row["loss"] > 0 and -1 < row["signal/share_low"] < 1 for row in rows)
    assert any(name.startswith("gate/pass_rate") for name in rows[-1])
    assert callback.monitor is not None
    assert callback.monitor._statistics.examples == 8


def test_a_remainder_is_a_step_of_its_own(tmp_path: Path) -> None:
    callback = TrainerRiskCallback(cross_entropy, every=1)
    more = {"per_device_train_batch_size": 8, "max_steps": 6}  # 5 batches: 2, 2 and 1 an epoch
    train(tmp_path, [callback], more=more)
    assert callback.monitor is not None
    assert [step for step, _ in callback.monitor.rows] == list(range(6))
    assert callback.monitor._statistics.examples == 8


def test_a_loss_of_the_trainers_own_is_left_out(tmp_path: Path) -> None:
    callback = TrainerRiskCallback(cross_entropy, every=1)
    with pytest.warns(RuntimeWarning, match="measures no loss and no signal"):
        train(tmp_path, [callback], more={"label_smoothing_factor": 0.1})
    assert callback.monitor is not None
    assert all(math.isnan(row["loss"]) for _, row in callback.monitor.rows)


@pytest.mark.parametrize("bad", [{"loss": 3}, {"every": 0}, {"quantities": ["loss"]}, {"sinks": 3}])
def test_bad_settings_are_refused_before_training(bad: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"loss": cross_entropy, **bad}
    with pytest.raises((TypeError, ValueError)):
        TrainerRiskCallback(**settings)


@pytest.mark.parametrize("kind", ["PopRiskAdamW", "gated"])
def test_a_run_resumed_from_a_checkpoint_is_one_that_never_stopped(
    tmp_path: Path, kind: str
) -> None:
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=8,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="steps",
        save_steps=4,
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
    )

    def trainer() -> Any:
        net = model()
        how: dict[str, Any] = {"optimizer_cls_and_kwargs": poprisk_optimizer(args, N)}
        if kind == "gated":
            inner = torch.optim.AdamW(net.parameters(), lr=1e-3)
            how = {"optimizers": (gated(inner, batch_size=8, dataset_size=N), None)}
        return transformers.Trainer(net, args, train_dataset=data(), **how)

    whole, rest = trainer(), trainer()
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_callback_has_its_old_name_for_one_release() -> None:
    module = importlib.import_module("poprisk.integrations.transformers")
    with pytest.warns(DeprecationWarning, match=r"RiskCallback is .*\.TrainerRiskCallback now"):
        assert module.RiskCallback is TrainerRiskCallback
