"""A twin in lockstep with transformers' Trainer and with Lightning: curve, stop, resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hub_models import distilbert
from poprisk import Auditor, RiskEstimate, TwinRisk
from poprisk.risk.lockstep import Lockstep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]
N, C = 48, 3
NONE = 1e-300
"""A perturbation that single precision has no number for."""
LOSS = nn.CrossEntropyLoss(reduction="none")


def labels() -> Tensor:
    return torch.randint(C, (N,), generator=torch.Generator().manual_seed(0))


def estimate(value: float) -> RiskEstimate:
    rest = (0.0, True, "", True, 2.0, value, 0.0, 0.0, 0.0, None, torch.zeros(2))
    return RiskEstimate(value, *rest, torch.full((2,), value))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """Lets twins answer what a test says."""

    def tell(values: Sequence[float]) -> None:
        left = iter(values)

        def told(*_: Any) -> RiskEstimate:
            return estimate(next(left))

        monkeypatch.setattr(TwinRisk, "estimate_batches", told)

    return tell


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def same(lockstep: Lockstep | None) -> bool:
    assert lockstep is not None
    model, twin = (run.model for run in lockstep.twin.replicas)
    return torch.equal(weights(model), weights(twin))


def equal(a: RiskEstimate, b: RiskEstimate) -> bool:
    """Bit for bit."""
    numbers = ("value", "standard_error", "dof", "dof_error", "train_loss", "accuracy", "signs")
    tensors = ("outputs", "losses", "influence")
    return (
        all(getattr(a, name) == getattr(b, name) for name in numbers)
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)
        and a.parts == b.parts
    )


# Transformers


def bert(classes: int = C) -> Any:
    return distilbert(classes)


def sentences(targets: Sequence[Any] | None = None) -> Any:
    datasets = pytest.importorskip("datasets")
    words = [[5 * int(k) + 1, 5 * int(k) + 2, i % 20] for i, k in enumerate(labels())]
    rows = {"input_ids": words, "labels": labels().tolist() if targets is None else targets}
    return datasets.Dataset.from_dict(rows).add_column("index", list(range(N)))


def train(
    folder: Path,
    *,
    callbacks: Sequence[Any] = (),
    resume: str | None = None,
    twin: dict[str, Any] | None = None,
    loss: Any = LOSS,
    data: Any = None,
    model: Any = None,
    **more: Any,
) -> Any:
    import transformers

    from poprisk.integrations.transformers_twin import TrainerTwinCallback

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 4,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    callback = TrainerTwinCallback(loss, **(twin or {}))
    trainer = transformers.Trainer(
        bert() if model is None else model,
        transformers.TrainingArguments(str(folder), **{**settings, **more}),
        train_dataset=sentences() if data is None else data,
        callbacks=[*callbacks, callback],
    )
    for each in callbacks:
        if hasattr(each, "twin"):
            each.twin = callback
            trainer.callback_handler.callbacks.remove(each)
            trainer.add_callback(each)
    trainer.train(resume_from_checkpoint=resume)
    return callback, trainer


def same_after_steps() -> Any:
    """A callback that looks after every step whether the twin is the model."""
    import transformers

    class Same(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.twin: Any = None
            self.found: list[bool] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.found.append(same(self.twin._lockstep))

    return Same()


@pytest.mark.parametrize("bf16", [False, True], ids=["single", "bf16"])
def test_in_the_trainer_a_twin_without_a_push_is_the_model(tmp_path: Path, bf16: bool) -> None:
    pytest.importorskip("transformers")
    look = same_after_steps()
    settings = {"bf16": bf16, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    train(tmp_path, callbacks=[look], twin={"delta": NONE, "every": 1000}, **settings)
    assert look.found == [True] * 9
    look = same_after_steps()
    train(tmp_path, callbacks=[look], num_train_epochs=1, **settings)
    assert look.found == [True, False, False]  # the first step of a warm-up is none


def test_the_trainer_goes_on_with_the_same_curve(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rows: list[Any] = []

    def sink(step: int, row: Any) -> None:
        rows.append((step, row))

    sinks = {"sinks": [sink], "keep_best": True}
    whole, trainer = train(tmp_path / "a", save_strategy="epoch", twin=sinks)
    history = [row for row in trainer.state.log_history if "twin/risk" in row]
    assert [row["step"] for row in history] == [step for step, _ in rows] == [6, 12, 18]
    assert [row["twin/risk"] for row in history] == [e.value for e in whole.curve.estimates]
    assert all(row["twin/standard_error"] > 0 for row in history)
    assert [row["twin/valid"] for row in history] == [e.valid for e in whole.curve.estimates]
    assert not whole._lockstep.twin.doubt
    assert all(e.dof > 0 for e in whole.curve.estimates)
    assert not trainer.model._forward_hooks
    assert not trainer.model._forward_pre_hooks

    checkpoint = tmp_path / "a" / "checkpoint-6"
    resumed, again = train(tmp_path / "a", twin={"keep_best": True}, resume=str(checkpoint))
    assert resumed.curve.steps == [6, 12, 18]
    assert all(map(equal, resumed.curve.estimates, whole.curve.estimates))
    assert torch.equal(weights(trainer.model), weights(again.model))
    (checkpoint / "twin.pt").unlink()
    with pytest.raises(ValueError, match=r"there is no .*twin\.pt of the run that is resumed"):
        train(tmp_path / "a", resume=str(checkpoint))


def test_the_trainer_stops_behind_the_best_moment_and_keeps_it(tmp_path: Path, told: Any) -> None:
    transformers = pytest.importorskip("transformers")
    told([3.0, 1.0, 2.0, 1.5, 1.6, 0.0])
    seen = []

    class Weights(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(weights(kwargs["model"]))

    twin = {"every": 3, "stop": True, "patience": 3, "keep_best": True}
    callback, trainer = train(tmp_path, callbacks=[Weights()], twin=twin)
    assert trainer.state.global_step == 15
    assert callback.curve.steps == [3, 6, 9, 12, 15]
    assert callback.curve.past
    assert torch.equal(weights(trainer.model), seen[5])


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u.squeeze(1) - y).square()


def test_a_regression_beside_an_audit(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from poprisk.integrations.transformers_audit import TrainerAuditCallback

    g = torch.Generator().manual_seed(0)
    y = labels().float() + 0.1 * torch.randn(N, generator=g)
    auditor = Auditor(y, kind="regression", plant=0)
    callback, _ = train(
        tmp_path,
        callbacks=[TrainerAuditCallback(auditor)],
        data=sentences(y.tolist()),
        model=bert(1),
        loss=squared,
    )
    assert len(callback.curve.estimates) == 3
    assert callback.curve.estimates[-1].dof > 0
    assert not callback._lockstep.twin.doubt
    assert {look.items for look in auditor.looks} == {N}


def penalized(u: Tensor, y: Tensor) -> Tensor:
    return 2 * LOSS(u, y) + u.square().sum(1)


def test_what_a_twin_cannot_follow_in_the_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"remove_unused_columns": True}, "set remove_unused_columns=False"),
        ({"data": sentences().remove_columns("index")}, "a training batch has no 'index'"),
        ({"label_smoothing_factor": 0.1}, "leave out what keeps labels from the model"),
        ({"torch_compile": True}, "does not follow training with torch_compile"),
        ({"loss": penalized}, "is not the mean of `loss`"),
    ]
    for settings, message in cases:
        model = bert()
        before = weights(model)
        with pytest.raises(ValueError, match=message):
            train(tmp_path, model=model, **settings)
        assert torch.equal(before, weights(model))


def test_two_who_choose_the_weights_at_the_end_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from poprisk.integrations.transformers_twin import TrainerTwinCallback

    args = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False
    )
    args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="both choose the weights at the end"):
        TrainerTwinCallback(LOSS, keep_best=True)._check(args, bert())


def test_texts_and_pairs_are_refused_by_name(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    import transformers

    import words
    from poprisk.integrations.transformers_twin import TrainerTwinCallback

    callback = TrainerTwinCallback(LOSS)
    settings: Any = {
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "remove_unused_columns": False,
    }
    writer = transformers.LlamaForCausalLM(words.llama(8))
    with pytest.raises(ValueError, match="LlamaForCausalLM with TrainingArguments"):
        callback._check(
            transformers.TrainingArguments(
                str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False
            ),
            writer,
        )
    for config in (trl.DPOConfig, trl.RewardConfig, trl.SFTConfig):
        with pytest.raises(ValueError, match=f"with {config.__name__}: it perturbs one label"):
            callback._check(config(str(tmp_path), **settings), bert())


# Lightning


def trained(
    folder: Path,
    *,
    twin: dict[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    resume: Path | None = None,
    call: str = "forward",
    manual: bool = False,
    columns: int = 3,
    **more: Any,
) -> tuple[Any, Any, Any]:
    lightning = pytest.importorskip("lightning.pytorch")
    from poprisk.integrations.lightning_twin import LightningTwinCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, C))
            self.automatic_optimization = not manual
            self.same: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            me: Any = self if call == "forward" else self.net
            return F.cross_entropy(me(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            me: Any = self
            me(batch[0])

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.same.append(same(callback._lockstep))

        def configure_optimizers(self) -> Any:
            opt = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min(1.0, (t + 1) / 5))
            return {
                "optimizer": opt,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    y = labels()
    g = torch.Generator().manual_seed(1)
    x = torch.cat([F.one_hot(y, C) + torch.randn(N, C, generator=g), torch.ones(N, 1)], 1)
    data = torch.utils.data.TensorDataset(*(x, y, torch.arange(N))[:columns])
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    callback = LightningTwinCallback(LOSS, **(twin or {}))
    module = Module()
    torch.manual_seed(2)
    trainer = lightning.Trainer(
        **{"max_epochs": 3, "logger": False, "enable_checkpointing": False, **more},
        callbacks=[callback, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
    )
    trainer.fit(module, loader, loader, ckpt_path=None if resume is None else str(resume))
    return callback, module, trainer


@pytest.mark.parametrize("clip", [{"gradient_clip_algorithm": "value"}, {}], ids=["value", "norm"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_in_lightning_a_twin_without_a_push_is_the_model(
    tmp_path: Path, precision: Any, clip: Any
) -> None:
    settings = {"precision": precision, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    twin = {"delta": NONE, "every": 1000}
    _, module, _ = trained(tmp_path, twin=twin, **clip, **settings)
    assert module.same == [True] * 18
    _, module, _ = trained(tmp_path, max_epochs=1, **clip, **settings)
    assert module.same == [True, *[False] * 5]


def test_lightning_goes_on_with_the_same_curve(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    rows: list[Any] = []
    checkpoints = lightning.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole, module, trainer = trained(
        tmp_path,
        twin={"sinks": [lambda step, row: rows.append((step, row))], "keep_best": True},
        callbacks=[checkpoints, seeded()],
        enable_checkpointing=True,
    )
    assert [step for step, _ in rows] == whole.curve.steps == [6, 12, 18]
    assert [row["twin/risk"] for _, row in rows] == [e.value for e in whole.curve.estimates]
    assert float(trainer.callback_metrics["twin/risk"]) == pytest.approx(rows[-1][1]["twin/risk"])
    assert all(e.valid and e.dof > 0 for e in whole.curve.estimates)
    assert not module._forward_hooks
    resumed, again, _ = trained(
        tmp_path, twin={"keep_best": True}, callbacks=[seeded()], resume=tmp_path / "epoch=0.ckpt"
    )
    assert resumed.curve.steps == [6, 12, 18]
    assert all(map(equal, resumed.curve.estimates, whole.curve.estimates))
    assert torch.equal(weights(module), weights(again))


def seeded() -> Any:
    """A callback that draws every step anew: a checkpoint of Lightning has no random numbers."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Seeded(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            torch.manual_seed(trainer.global_step)

    return Seeded()


def test_lightning_stops_behind_the_best_moment_and_keeps_it(tmp_path: Path, told: Any) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    told([3.0, 1.0, 2.0, 1.5, 1.6, 0.0])
    seen = []

    class Weights(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(weights(pl_module))

    twin = {"every": 2, "stop": True, "patience": 2, "keep_best": True}
    callback, module, trainer = trained(
        tmp_path, twin=twin, callbacks=[Weights()], accumulate_grad_batches=2
    )
    assert callback.curve.steps == [2, 4, 6, 8]
    assert trainer.global_step == 8
    assert callback.curve.past
    assert torch.equal(weights(module), seen[7])


def test_in_lightning_a_twin_is_trained_without_examples(tmp_path: Path) -> None:
    callback, module, _ = trained(tmp_path, twin={"leave_out": 0.5})
    assert module.same == [False] * 18
    last = callback.curve.estimates[-1]
    assert last.value > last.train_loss
    assert int((last.losses != 0).sum()) == N
    assert math.isnan(last.dof)


def test_what_a_twin_cannot_follow_in_lightning(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"call": "part"}, "is a part of it called instead"),
        ({"manual": True}, "automatic optimization with one optimizer"),
        ({"columns": 2}, "a batch must hold inputs, targets and positions"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            trained(tmp_path, **settings)
