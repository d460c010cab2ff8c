"""A twin in lockstep with TRL's DPOTrainer, and with a Trainer of a language model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("trl", reason="TRL is not installed: pip install 'poprisk[hf]'")

import datasets
import transformers
import trl

import words
from poprisk import Auditor, RiskEstimate, TwinRisk
from poprisk.integrations.transformers_audit import audited_dataset
from poprisk.integrations.transformers_twin import TrainerTwinCallback
from poprisk.integrations.trl import watch_preferences
from poprisk.integrations.trl_twin import follow_preferences
from poprisk.losses import direct_preference, next_token
from poprisk.risk.left_out import Without

N, WORDS, BATCH = 120, 8, 12
LONG = [5, 30]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]


def pairs(*, long: bool = False) -> Any:
    g = torch.Generator().manual_seed(0)
    good, bad = (words.sentences(N, low, low + 6, g) for low in (2, 0))
    prompts = ["w1 " * 12 if long and i in LONG else "w1 " for i in range(N)]
    return datasets.Dataset.from_dict({"prompt": prompts, "chosen": good, "rejected": bad})


def policy() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(words.llama(WORDS))


def direct(folder: Path, *, data: Any = None, peft_config: Any = None, **more: Any) -> Any:
    args = trl.DPOConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "precompute_ref_log_probs": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "max_length": 12,
            "seed": 1,
            **more,
        }
    )
    return trl.DPOTrainer(
        policy(),
        policy() if peft_config is None else None,
        args,
        train_dataset=pairs() if data is None else data,
        processing_class=words.tokenizer(WORDS),
        peft_config=peft_config,
    )


def lora() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class Same(transformers.TrainerCallback):  # type: ignore[misc]
    """Whether the twin is the model after each step."""

    def __init__(self, twin: Any) -> None:
        self.twin, self.found = twin, list[bool]()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        model, twin = (weights(run.model) for run in self.twin._lockstep.twin.replicas)
        self.found.append(torch.equal(model, twin))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"bf16": True},
    "checkpointed": {"gradient_checkpointing": True},
    "accumulated, clipped": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05},
}


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "LoRA"])
@pytest.mark.parametrize("case", CASES)
def test_a_twin_of_all_pairs_is_the_model(
    tmp_path: Path, case: str, adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> list[bool]:
        trainer = direct(tmp_path, peft_config=lora() if adapters else None, **CASES[case])
        look = Same(follow_preferences(trainer, every=1000))
        trainer.add_callback(look)
        trainer.train()
        return look.found

    assert trained()[:3] == [True, False, False]  # the first step of a warm-up is none

    def ones(_: Without, index: Tensor) -> Tensor:
        return torch.ones(len(index)).double()

    monkeypatch.setattr(Without, "weights", ones)
    found = trained()
    assert found == [True] * len(found)


def test_the_trainer_trains_as_it_would_alone(tmp_path: Path) -> None:
    alone, with_it = direct(tmp_path), direct(tmp_path)
    follow_preferences(with_it, every=3)
    for trainer in (alone, with_it):
        trainer.train()
    assert torch.equal(weights(alone.model), weights(with_it.model))
    assert not with_it.model._forward_hooks
    assert not with_it.model._forward_pre_hooks
    assert with_it.compute_loss.__name__ == "compute_loss"


class Weighted(trl.DPOTrainer):  # type: ignore[misc]
    """A trainer of its own, of a weighted mean of the losses of pairs."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        index = inputs.pop("index")
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        said = -next_token(logits, labels, reduction="sum")
        chosen, rejected = said.chunk(2)
        reference = inputs["ref_chosen_logps"] - inputs["ref_rejected_logps"]
        lost = direct_preference(chosen - rejected, reference, beta=self.beta)
        return (self.weights[index].to(lost) * lost).mean()


def test_the_twin_is_trained_as_by_a_trainer_without_its_pairs(tmp_path: Path) -> None:
    trainer = direct(tmp_path)
    callback = follow_preferences(trainer)
    trainer.train()
    assert callback._lockstep is not None
    twin = callback._lockstep.twin
    assert not twin.doubt
    part = twin.without[0]
    assert int(part.out.sum()) == 24

    other = direct(tmp_path)
    other.__class__ = Weighted
    other.weights = part.weights(torch.arange(N))
    other.train_dataset = trainer.train_dataset
    other.args.remove_unused_columns = False
    other.data_collator = trainer.data_collator
    other.train()
    torch.testing.assert_close(
        weights(twin.replicas[1].model), weights(other.model), rtol=1e-3, atol=1e-4
    )
    assert float((weights(twin.model) - weights(other.model)).abs().max()) > 1e-3


def one_at_a_time(trainer: Any, trained: nn.Module) -> Tensor:
    """DPO's losses of the training pairs, one pair after the other, from logits."""
    model = policy().eval()  # a copy of one with TRL's head has the other's logits
    model.load_state_dict(trained.state_dict())
    found = list[Tensor]()
    for row in trainer.train_dataset:
        sides = list[Tensor]()
        for side in ("chosen", "rejected"):
            ids = torch.tensor([[*row["prompt_ids"], *row[f"{side}_ids"]]])
            labels = ids.clone()
            labels[:, : len(row["prompt_ids"])] = -100
            with torch.no_grad():
                sides.append(-next_token(model(ids).logits, labels, reduction="sum"))
        reference = row["ref_chosen_logps"] - row["ref_rejected_logps"]
        found.append(
            direct_preference(sides[0] - sides[1], torch.tensor([reference]), beta=trainer.beta)
        )
    return torch.cat(found)


def test_an_estimate_is_of_losses_of_pairs_one_at_a_time(tmp_path: Path) -> None:
    trainer = direct(tmp_path)
    callback = follow_preferences(trainer, leave_out=0.3)
    trainer.train()
    assert callback._lockstep is not None
    twin = callback._lockstep.twin
    mine, its = (one_at_a_time(trainer, run.model) for run in twin.replicas)
    found = callback.curve.estimates[-1]
    part = twin.without[0]
    assert found.train_loss == pytest.approx(float(mine.mean()), rel=1e-4)
    slope = torch.stack([its[part.out], mine[part.out]]).cov()
    b = float(slope[0, 1] / slope[1, 1])
    value = its[part.out].mean() + b * (mine.mean() - mine[part.out].mean())
    assert found.value == pytest.approx(float(value), rel=1e-3)
    assert found.value > found.train_loss


def equal(a: RiskEstimate, b: RiskEstimate) -> bool:
    return a.value == b.value and torch.equal(a.losses, b.losses)


def test_a_resumed_run_goes_on_with_the_same_curve(tmp_path: Path) -> None:
    rows = list[int]()

    def sink(step: int, _: Any) -> None:
        rows.append(step)

    trainer = direct(tmp_path, save_strategy="epoch")
    whole = follow_preferences(trainer, sinks=[sink])
    trainer.train()
    assert rows == whole.curve.steps == [10, 20]
    logged = [row["twin/risk"] for row in trainer.state.log_history if "twin/risk" in row]
    assert logged == [e.value for e in whole.curve.estimates]
    again = direct(tmp_path)
    resumed = follow_preferences(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert all(map(equal, resumed.curve.estimates, whole.curve.estimates))
    assert torch.equal(weights(trainer.model), weights(again.model))
    (tmp_path / "checkpoint-10" / "twin.pt").unlink()
    anew = direct(tmp_path)
    follow_preferences(anew)
    with pytest.raises(ValueError, match=r"there is no .*twin\.pt of the run that is resumed"):
        anew.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_it_stops_behind_the_best_moment_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([3.0, 1.0, 2.0, 1.5, 1.6, 0.0])

    def told(*_: Any) -> RiskEstimate:
        value = next(left)
        rest = (0.0, True, "", True, 2.0, value, 0.0, 0.0, 0.0, None, torch.zeros(2))
        return RiskEstimate(value, *rest, torch.full((2,), value))

    monkeypatch.setattr(TwinRisk, "estimate_batches", told)
    seen = list[Tensor]()

    class Weights(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            seen.append(weights(kwargs["model"]))

    trainer = direct(tmp_path)
    trainer.add_callback(Weights())
    callback = follow_preferences(trainer, every=3, stop=True, patience=3, keep_best=True)
    trainer.train()
    assert trainer.state.global_step == 15
    assert callback.curve.steps == [3, 6, 9, 12, 15]
    assert torch.equal(weights(trainer.model), seen[5])


@pytest.mark.parametrize("first", ["audit", "twin"])
def test_beside_an_audit_and_with_dropped_pairs(tmp_path: Path, first: str) -> None:
    auditor = Auditor(torch.ones(N, dtype=torch.long), kind="preferences", plant=0.2)
    trainer = direct(tmp_path, data=audited_dataset(pairs(long=True), auditor))
    assert len(trainer.train_dataset) == N - len(LONG)
    if first == "audit":
        watch_preferences(trainer, auditor)
        callback = follow_preferences(trainer)
    else:
        callback = follow_preferences(trainer)
        watch_preferences(trainer, auditor)
    trainer.train()
    assert len(callback.curve.estimates) == 2
    assert len(callback.curve.estimates[-1].losses) == N - len(LONG)
    assert [look.items for look in auditor.looks] == [N - len(LONG)] * 2


def test_what_a_twin_of_pairs_cannot_follow(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"precompute_ref_log_probs": False}, "set precompute_ref_log_probs=True"),
        ({"loss_type": ["hinge"]}, r"here is loss_type=\['hinge'\]"),
        ({"loss_type": ["sigmoid", "hinge"]}, "follows DPO's own loss"),
        ({"f_divergence_type": "js_divergence"}, "here is f_divergence_type='js_divergence'"),
        ({"use_weighting": True}, "here is use_weighting"),
        ({"ld_alpha": 0.5}, "weighs tokens by their place"),
    ]
    for settings, message in cases:
        trainer = direct(tmp_path, **settings)
        before = trainer.data_collator, list(trainer.callback_handler.callbacks)
        with pytest.raises(ValueError, match=message):
            follow_preferences(trainer)
        assert (trainer.data_collator, list(trainer.callback_handler.callbacks)) == before
        assert "index" not in trainer.train_dataset.column_names
    with pytest.raises(ValueError, match=r"leave_out=0\.1 of 120 examples are 12"):
        follow_preferences(direct(tmp_path), leave_out=0.1)
    with pytest.raises(TypeError, match="must be a DPOTrainer of TRL, but got Trainer"):
        follow_preferences(
            transformers.Trainer(
                policy(), transformers.TrainingArguments(str(tmp_path), use_cpu=True)
            )
        )


def test_a_callback_that_perturbs_labels_names_the_way(tmp_path: Path) -> None:
    trainer = direct(tmp_path, remove_unused_columns=False)
    callback = TrainerTwinCallback(nn.CrossEntropyLoss(reduction="none"), leave_out=0.3)
    with pytest.raises(ValueError, match=r"for DPOTrainer use poprisk\.integrations\.trl_twin"):
        callback._check(trainer.args, trainer.model)
    callback = TrainerTwinCallback(nn.CrossEntropyLoss(reduction="none"))
    args = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False
    )
    with pytest.raises(ValueError, match="for a language model in a plain Trainer leave_out"):
        callback._check(args, policy())


def texts(lengths: Sequence[int]) -> Any:
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(WORDS, (k,), generator=g).tolist() for k in lengths]
    data = datasets.Dataset.from_dict({"input_ids": rows})
    return data.add_column("index", list(range(len(rows))))


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": pad(ids, padding_value=WORDS + 1),
        "attention_mask": pad([torch.ones_like(i) for i in ids]),
        "labels": pad(ids, padding_value=-100),
        "index": torch.tensor([row["index"] for row in rows]),
    }


def test_a_language_model_in_the_trainer(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2,
        num_train_epochs=25,
        learning_rate=2e-2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    loss = partial(next_token, reduction="sum")
    callback = TrainerTwinCallback(loss, leave_out=0.3)
    data = texts([4 + i % 7 for i in range(N)])
    trainer = transformers.Trainer(
        policy(), args, train_dataset=data, data_collator=collate, callbacks=[callback]
    )
    trainer.train()
    last = callback.curve.estimates[-1]
    assert last.valid
    assert len(callback.curve.estimates) == 25
    batch = collate(list(data))
    inputs = {k: v for k, v in batch.items() if k not in ("index", "labels")}
    with torch.no_grad():
        logits = copy.deepcopy(trainer.model).eval()(**inputs).logits
    expected = loss(logits, batch["labels"])
    assert last.train_loss == pytest.approx(float(expected.mean()), rel=1e-4)
    chance = float((batch["labels"][:, 1:] != -100).sum(1).double().mean()) * 2.0794  # log 8
    assert last.train_loss < 0.95 * chance < last.value
