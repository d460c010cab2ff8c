"""The optimizer, the audit and the monitor of preferences in TRL's trainers."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'poprisk[hf]'")

import datasets
import transformers
import trl

import words
from gloo import WORLD, joined
from poprisk import Auditor, PopRiskAdamW, gated
from poprisk.integrations.transformers import TrainerRiskCallback
from poprisk.integrations.transformers_audit import TrainerAuditCallback, audited_dataset
from poprisk.integrations.trl import PreferenceCallback, set_optimizer, watch_preferences
from processes import Call, at_once

N, WORDS, FLIPPED = 64, 8, [3, 17, 40]
LONG = [5, 30]
"""Pairs whose prompt is so long that TRL drops them."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


def pairs(*, long: bool = False) -> Any:
    g = torch.Generator().manual_seed(0)
    good, bad = (words.sentences(N, low, low + 4, g) for low in (4, 0))
    for i in FLIPPED:
        good[i], bad[i] = bad[i], good[i]
    prompts = ["w1 " * 12 if long and i in LONG else "w1 " for i in range(N)]
    return datasets.Dataset.from_dict({"prompt": prompts, "chosen": good, "rejected": bad})


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 3e-3,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 12,
        "seed": 1,
        **more,
    }


def policy() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(words.llama(WORDS))


def dpo(folder: Path, data: Any, *, model: Any = None, **more: Any) -> Any:
    extra = {k: more.pop(k) for k in ("peft_config", "optimizers", "eval_dataset") if k in more}
    model = model or policy()
    reference = None if "peft_config" in extra else copy.deepcopy(model)
    args = trl.DPOConfig(**settings(folder, **more))
    return trl.DPOTrainer(
        model, reference, args, train_dataset=data, processing_class=words.tokenizer(WORDS), **extra
    )


def auditor() -> Auditor:
    return Auditor(torch.ones(N, dtype=torch.long), kind="preferences", plant=0.2)


def optimizer_of(trainer: Any) -> PopRiskAdamW:
    found = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(found, PopRiskAdamW)
    return found


def rewarding(folder: Path, *, peft_config: Any = None, **more: Any) -> Any:
    torch.manual_seed(0)
    return trl.RewardTrainer(
        transformers.LlamaForSequenceClassification(words.llama(WORDS)),
        trl.RewardConfig(**settings(folder, **more)),
        train_dataset=pairs(long=True),
        processing_class=words.tokenizer(WORDS),
        peft_config=peft_config,
    )


def desirable(folder: Path, *, peft_config: Any = None, **more: Any) -> Any:
    rows = pairs(long=True)
    data = datasets.Dataset.from_dict(
        {
            "prompt": rows["prompt"],
            "completion": rows["chosen"],
            "label": [i % 2 == 0 for i in range(N)],
        }
    )
    model = policy()
    args = trl.KTOConfig(**settings(folder, train_sampling_strategy="sequential", **more))
    return trl.KTOTrainer(
        model,
        copy.deepcopy(model) if peft_config is None else None,
        args,
        train_dataset=data,
        processing_class=words.tokenizer(WORDS),
        peft_config=peft_config,
    )


def direct(folder: Path, **more: Any) -> Any:
    return dpo(folder, pairs(long=True), **more)


MAKES = {"dpo": direct, "kto": desirable, "reward": rewarding}
SIDES = {"dpo": 2, "kto": 1, "reward": 2}
"""Rows of a batch for each pair or answer."""


class Seen(transformers.TrainerCallback):  # type: ignore[misc]
    """What really goes into each step: examples, learning rates, and whether weights move."""

    def __init__(self, trainer: Any, sides: int) -> None:
        self.examples, self.rates, self.moved = [0], list[float](), set[str]()
        self._trainer, self._sides = trainer, sides
        self._loss, trainer.compute_loss = trainer.compute_loss, self._counted
        self._before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.add_callback(self)

    def _counted(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.examples[-1] += len(inputs["input_ids"]) // self._sides
        return self._loss(model, inputs, *args, **kwargs)

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.examples.append(0)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        now = self._trainer.model.named_parameters()
        self.moved = {name for name, p in now if not torch.equal(p, self._before[name])}


@pytest.mark.parametrize("way", ["plain", "accumulated", "bf16", "checkpointed", "lora"])
@pytest.mark.parametrize("kind", MAKES)
def test_the_optimizer_knows_what_is_trained_on(kind: str, way: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "plain": {},
        "accumulated": {"gradient_accumulation_steps": 4},
        "bf16": {"bf16": True},
        "checkpointed": {"gradient_checkpointing": True},
        "lora": {},
    }[way]
    if way == "lora":
        more["peft_config"] = lora("SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
    trainer = MAKES[kind](tmp_path, max_steps=3, weight_decay=0.25, **more)
    set_optimizer(trainer, z=1.25)
    assert trainer.optimizer is None
    seen = Seen(trainer, SIDES[kind])
    trainer.train()
    optimizer = optimizer_of(trainer)
    groups = optimizer.param_groups
    size = 32 if way == "accumulated" else 8
    assert seen.examples[0] == size
    assert {(g["batch_size"], g["dataset_size"]) for g in groups} == {(size, N - len(LONG))}
    assert {g["weight_decay"] for g in groups} == {0.25, 0.0}  # as the Trainer groups them
    assert {(g["z"], g["betas"]) for g in groups} == {(1.25, (0.9, 0.999))}
    assert seen.rates == pytest.approx([3e-3, 2e-3, 1e-3])  # as the linear schedule has it
    assert {g["initial_lr"] for g in groups} == {3e-3}
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    held = [p for g in groups for p in g["params"] if p.requires_grad]
    assert {id(p) for p in held} == {id(p) for p in trained.values()}
    assert {int(optimizer.state[p]["step"]) for p in held} == {3}
    assert seen.moved
    assert seen.moved <= set(trained)
    assert (way == "lora") == (len(trained) < len(list(trainer.model.parameters())))
    assert all(torch.isfinite(p).all() for p in held)


def test_what_cannot_get_an_optimizer_is_told_so(tmp_path: Path) -> None:
    model = policy()
    trainer = dpo(tmp_path, pairs(), model=model, optimizers=(PopRiskAdamW(model), None))
    with pytest.raises(ValueError, match=r"DPOTrainer has an optimizer already; leave out"):
        set_optimizer(trainer)
    trainer = dpo(tmp_path, pairs())
    with pytest.raises(ValueError, match="z must"):
        set_optimizer(trainer, z=-1.0)
    with pytest.raises(ValueError, match=f"batch_size={N} must be smaller than dataset_size"):
        set_optimizer(trainer, batch_size=N)
    assert trainer.optimizer_cls_and_kwargs is None
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="DPOTrainer has no train_dataset"):
        set_optimizer(trainer)


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


WAYS = ["reference", "precomputed", "accumulated", "evaluated", "bf16", "lora", "prompt"]


@pytest.mark.parametrize("way", WAYS)
def test_rewards_are_those_that_the_trainer_logs(way: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "reference": {},
        "precomputed": {"precompute_ref_log_probs": True},
        "accumulated": {"gradient_accumulation_steps": 2},
        "evaluated": {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": pairs()},
        "bf16": {"bf16": True, "gradient_checkpointing": True},
        "lora": {},
        "prompt": {},
    }[way]
    if way == "lora":
        more["peft_config"] = lora()
    if way == "prompt":
        peft = pytest.importorskip("peft")
        more["peft_config"] = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    trainer = dpo(tmp_path, pairs(), logging_steps=1, max_steps=4, **more)
    set_optimizer(trainer)
    callback = watch_preferences(trainer, every=1)
    trainer.train()
    assert [step for step, _ in callback.rows] == [1, 2, 3, 4]
    for mine, name in (
        ("reward/chosen", "rewards/chosen"),
        ("reward/rejected", "rewards/rejected"),
        ("reward/margin", "rewards/margins"),
        ("reward/accuracy", "rewards/accuracies"),
    ):
        found = [row[mine] for _, row in callback.rows]
        # TRL adds up a text's likelihoods in half precision, we do not.
        assert found == pytest.approx(logged(trainer, name), abs=0.02 if way == "bf16" else 1e-6)
    drifts = [row["reward/drift"] for _, row in callback.rows]
    if way != "prompt":  # tokens put before make another policy than the reference at once
        assert drifts[0] == pytest.approx(0.0, abs=1e-6)
    for (_, row), drift in zip(callback.rows[1:], drifts[1:], strict=True):
        assert drift > 0
        sides = abs(row["reward/chosen"]), abs(row["reward/rejected"])
        assert drift >= sum(sides) / 2 - 1e-6  # |mean| is at most the mean of |r|
        assert math.isnan(row["pairs/suspect"])


def lora(task: str = "CAUSAL_LM") -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task)


def test_adapters_are_trained_and_nothing_else(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, pairs(), max_steps=3, peft_config=lora())
    set_optimizer(trainer)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    held = {id(p) for g in optimizer_of(trainer).param_groups for p in g["params"]}
    for name, p in trainer.model.named_parameters():
        assert (id(p) in held) == p.requires_grad == ("lora" in name)
        assert torch.equal(before[name], p) != ("lora" in name)


def of_the_base(gate: str, model: Any) -> Any:
    """An optimizer that is made before the adapters are."""
    if gate == "gated":
        return gated(torch.optim.SGD(model.parameters(), lr=0.1))
    return PopRiskAdamW(model)


@pytest.mark.parametrize("gate", ["gated", "PopRiskAdamW"])
def test_an_optimizer_of_the_frozen_base_is_told_of_at_its_first_step(
    gate: str, tmp_path: Path
) -> None:
    model = policy()
    optimizer = of_the_base(gate, model)
    trainer = dpo(
        tmp_path,
        pairs(),
        model=model,
        optimizers=(optimizer, None),
        peft_config=lora(),
        max_steps=1,
    )
    with pytest.warns(RuntimeWarning, match="holds frozen parameters only: nothing is being"):
        trainer.train()


@pytest.mark.parametrize("gate", ["gated", "PopRiskAdamW"])
@pytest.mark.parametrize("watcher", ["preferences", "risk"])
def test_an_optimizer_of_the_frozen_base_is_refused(
    gate: str, watcher: str, tmp_path: Path
) -> None:
    model = policy()
    optimizer = of_the_base(gate, model)
    trainer = dpo(tmp_path, pairs(), model=model, optimizers=(optimizer, None), peft_config=lora())
    if watcher == "preferences":
        watch_preferences(trainer)
    else:
        trainer.add_callback(TrainerRiskCallback(lambda outputs, targets: targets))
    with pytest.raises(ValueError, match="holds none of the parameters that are trained"):
        trainer.train()


def audited(folder: Path, found: Auditor, **more: Any) -> tuple[Any, PreferenceCallback]:
    resume = more.pop("resume", None)
    sinks = more.pop("sinks", ())
    data = audited_dataset(pairs(long=more.pop("long", True)), found)
    trainer = dpo(folder, data, num_train_epochs=4, **more)
    set_optimizer(trainer)
    callback = watch_preferences(trainer, found, every=5, sinks=sinks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def test_flipped_pairs_are_found_and_a_resumed_run_finds_the_same(tmp_path: Path) -> None:
    whole = auditor()
    path = tmp_path / "rows.jsonl"
    trainer, callback = audited(
        tmp_path / "a", whole, save_strategy="steps", save_steps=5, sinks=[path]
    )
    result = whole.result()
    assert [look.items for look in result.looks] == [N - len(LONG)] * 4
    assert set(FLIPPED) <= set(np.argsort(np.where(result.rank < 0, N, result.rank))[:6])
    assert (result.rank[LONG] == -1).all()
    more = result.add_to(pairs(long=True))
    assert more["label_suspect"][:] == result.suspect.tolist()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step, _ in callback.rows]
    assert [row["step"] for row in rows if row["pairs/suspect"] is None] == [5]
    assert rows[-1]["step"] == 32  # what was left at the end, when all looks were known
    assert rows[-1]["pairs/suspect"] == result.suspect[result.rank >= 0].mean()
    # Checkpoint 5 lies within the first epoch, of which it holds five batches of eight.
    resumed = auditor()
    again, _ = audited(tmp_path / "a", resumed, resume=str(tmp_path / "a" / "checkpoint-5"))
    assert resumed.looks == whole.looks
    np.testing.assert_array_equal(resumed.result().margin, result.margin)
    for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_labels_of_single_answers_are_not_audited(tmp_path: Path) -> None:
    trainer = desirable(tmp_path, remove_unused_columns=False)
    labels = Auditor(torch.arange(N) % 2, kind="binary")
    trainer.add_callback(TrainerAuditCallback(labels))
    with pytest.raises(ValueError, match="labels of whole answers, as KTOTrainer's, are not aud"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not labels.predictions.seen.any()


@pytest.mark.filterwarnings("ignore:at step .* drifts from its reference:RuntimeWarning")
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
def test_the_share_of_flipped_pairs_is_found_in_one_epoch(rate: float, tmp_path: Path) -> None:
    n, g = 1000, torch.Generator().manual_seed(0)
    good, bad = (words.sentences(n, low, low + 5, g) for low in (3, 0))  # two words mean nothing
    flipped = torch.rand(n, generator=g) < rate
    sides = [(b, a) if wrong else (a, b) for a, b, wrong in zip(good, bad, flipped, strict=True)]
    data = datasets.Dataset.from_list(
        [{"prompt": "w1 ", "chosen": a, "rejected": b} for a, b in sides]
    )
    found = Auditor(torch.ones(n, dtype=torch.long), kind="preferences")
    trainer = dpo(tmp_path, audited_dataset(data, found), lr_scheduler_type="constant", beta=0.5)
    set_optimizer(trainer)
    watch_preferences(trainer, found)
    trainer.train()
    share = found.result().flip_rate
    assert share is not None
    assert share.value == pytest.approx(float(flipped.double().mean()), abs=0.06)
    assert share.valid or rate == 0.4


def test_a_resumed_run_of_adapters_is_the_same(tmp_path: Path) -> None:
    """Weights, moments and the audit, from the middle of the second epoch."""
    whole, resumed = auditor(), auditor()
    more = {"peft_config": lora(), "learning_rate": 3e-2}
    trainer, callback = audited(
        tmp_path, whole, save_strategy="steps", save_steps=11, save_total_limit=None, **more
    )
    last = str(tmp_path / "checkpoint-11")
    again, later = audited(tmp_path, resumed, resume=last, **more)
    assert trainer.state.global_step == again.state.global_step == 32
    assert resumed.looks == whole.looks
    np.testing.assert_array_equal(resumed.result().margin, whole.result().margin)
    assert resumed.result().flip_rate == whole.result().flip_rate
    assert later.rows[-1] == callback.rows[-1]
    named = dict(again.model.named_parameters())
    mine, other = optimizer_of(trainer).state, optimizer_of(again).state
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, named[name])
        for key, value in mine.get(p, {}).items():
            torch.testing.assert_close(other[named[name]][key], value, rtol=0, atol=0)
    assert len(mine) == len(other) > 0


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_conservative_dpo_is_two_losses_of_trl(rate: float, tmp_path: Path) -> None:
    """As the page says; ``label_smoothing`` alone changes nothing."""
    model = policy()
    for p in model.parameters():  # away from the reference
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))

    def loss(**more: Any) -> float:
        trainer = dpo(tmp_path, pairs(), model=copy.deepcopy(model), beta=5.0, **more)
        trainer.ref_model.load_state_dict(policy().state_dict())
        batch = trainer.data_collator(list(trainer.train_dataset.select(range(8))))
        return trainer.compute_loss(trainer.model, batch).item()

    kept, flipped = loss(), loss(loss_type=["robust"], label_smoothing=rate)
    assert loss(label_smoothing=rate) == kept
    flipped = ((1 - rate) * kept - (1 - 2 * rate) * flipped) / rate  # -log σ of minus the margin
    both = {"loss_type": ["sigmoid", "robust"], "loss_weights": [2 * (1 - rate), 2 * rate - 1]}
    found = loss(label_smoothing=rate, **both)
    assert abs(flipped - kept) > 0.1
    assert found == pytest.approx((1 - rate) * kept + rate * flipped, rel=1e-4)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    for process in at_once(*(Call(shared, (rank, tmp_path)) for rank in range(WORLD))):
        assert process.code == 0, process.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    whole = auditor()
    trainer, callback = audited(tmp_path / "one", whole, long=False)
    result = whole.result()
    assert optimizer_of(trainer).param_groups[0]["batch_size"] == 8
    for one in found:
        assert one["batch_size"] == 8
        assert one["looks"] == [N] * 4
        np.testing.assert_allclose(one["margin"], result.margin, atol=1e-3)
        for (step, row), (other, mine) in zip(one["rows"], callback.rows, strict=True):
            assert step == other
            assert row == pytest.approx(mine, abs=1e-3, nan_ok=True)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == len(callback.rows)  # written by one process


def shared(rank: int, folder: Path) -> None:
    """What each of two processes does, with half of every batch."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= where | {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {"WORLD_SIZE": str(WORLD), "ACCELERATE_USE_CPU": "true"}
    with joined(rank, folder):
        found = auditor()
        trainer, callback = audited(
            folder / "two",
            found,
            long=False,
            per_device_train_batch_size=4,
            sinks=[folder / "rows.jsonl"],
        )
        result = found.result()
        whole = {
            "batch_size": optimizer_of(trainer).param_groups[0]["batch_size"],
            "looks": [look.items for look in result.looks],
            "margin": result.margin.tolist(),
            "rows": callback.rows,
        }
        (folder / f"{rank}.json").write_text(json.dumps(whole))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    for process in at_once(*(Call(together, (rank, tmp_path)) for rank in range(WORLD))):
        assert process.code == 0, process.stderr
    mine, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    assert mine.keys() == other.keys() == MAKES.keys()
    for kind, one in mine.items():
        two = other[kind]
        assert one["groups"] == two["groups"] == {(8, N - len(LONG))}
        assert one["examples"][0] + two["examples"][0] == 8
        assert one["moved"]
        for a, b in zip(one["weights"], two["weights"], strict=True):
            assert torch.equal(a, b)


def together(rank: int, folder: Path) -> None:
    """What each of two processes does, with half of every batch."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= where | {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {"WORLD_SIZE": str(WORLD), "ACCELERATE_USE_CPU": "true"}
    found = {}
    with joined(rank, folder):
        for kind, make in MAKES.items():
            trainer = make(folder / kind, max_steps=3, per_device_train_batch_size=4)
            set_optimizer(trainer)
            seen = Seen(trainer, SIDES[kind])
            trainer.train()
            groups = optimizer_of(trainer).param_groups
            found[kind] = {
                "groups": {(g["batch_size"], g["dataset_size"]) for g in groups},
                "examples": seen.examples,
                "moved": len(seen.moved),
                "weights": [p.detach().clone() for p in trainer.model.parameters()],
            }
        torch.save(found, folder / f"{rank}.pt")


def test_conversations_are_swapped_and_watched(tmp_path: Path) -> None:
    def said(row: dict[str, Any]) -> dict[str, Any]:
        asked = {"role": "user", "content": "w1"}
        return {
            side: [asked, {"role": "assistant", "content": row[side]}]
            for side in ("chosen", "rejected")
        }

    plain = pairs().map(said, remove_columns=["prompt"])
    found = auditor()
    data = audited_dataset(plain, found)
    for before, after, target in zip(plain, data, found.targets.tolist(), strict=True):
        sides = ("chosen", "rejected") if target else ("rejected", "chosen")
        assert [after[side] for side in sides] == [before["chosen"], before["rejected"]]
    tokenizer = words.tokenizer(WORDS)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    args = trl.DPOConfig(**settings(tmp_path, num_train_epochs=3))
    model = policy()
    trainer = trl.DPOTrainer(
        model, copy.deepcopy(model), args, train_dataset=data, processing_class=tokenizer
    )
    set_optimizer(trainer)
    watch_preferences(trainer, found)
    trainer.train()
    assert [look.items for look in found.result().looks] == [N] * 3
    assert set(FLIPPED) <= set(np.argsort(found.result().rank)[:8])


def test_an_alarm_is_told_once(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, pairs(), learning_rate=3e-2)
    callback = watch_preferences(trainer, every=2, fall=0.0, drift=1e-3)
    with pytest.warns(RuntimeWarning) as told:
        trainer.train()
    said = [str(w.message) for w in told]
    assert sum("the policy drifts from its reference" in text for text in said) == 1
    drifts = [row["alarm/drift"] for _, row in callback.rows]
    assert drifts == [float(row["reward/drift"] > 1e-3) for _, row in callback.rows]
    assert sum(drifts) > 1
    falls = [row["alarm/chosen"] for _, row in callback.rows]
    assert falls == [float(row["reward/chosen"] < 0) for _, row in callback.rows]
    assert sum("chosen answers lose likelihood" in text for text in said) == any(falls)


def test_what_cannot_be_watched_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    found = auditor()
    trainer = dpo(tmp_path, pairs())
    collator = trainer.data_collator
    for wrong, error, said in (
        (lambda: watch_preferences(rewarding(tmp_path)), TypeError, "must be a DPOTrainer of TRL"),
        (lambda: watch_preferences(trainer, found), ValueError, "no columns 'index' and 'swapped'"),
        (lambda: watch_preferences(desirable(tmp_path)), TypeError, "got KTOTrainer: only pairs"),
        (lambda: watch_preferences(trainer, pairs()), TypeError, "auditor must be"),
        (lambda: watch_preferences(trainer, every=0), ValueError, "every must be"),
        (lambda: watch_preferences(trainer, drift=0.0), ValueError, "drift must lie"),
        (
            lambda: watch_preferences(trainer, Auditor(torch.arange(N) % 2)),
            ValueError,
            "auditor must be of preferences, but is of classes",
        ),
    ):
        with pytest.raises(error, match=said):
            wrong()
    assert trainer.data_collator is collator
    assert trainer.args.remove_unused_columns
    few = Auditor(torch.ones(10, dtype=torch.long), kind="preferences", plant=0)
    with pytest.raises(ValueError, match=f"a pair at position {N - 1}, but the auditor 10 targets"):
        watch_preferences(dpo(tmp_path, audited_dataset(pairs(), found)), few)
    other = Auditor(found.targets * 0 + 1, kind="preferences", plant=0.2, seed=1)
    apart = int((other.targets != found.targets).sum())
    trainer = dpo(tmp_path, audited_dataset(pairs(), found))
    collator = trainer.data_collator
    with pytest.raises(ValueError, match=f"^{apart} pairs .* swapped in planting by another"):
        watch_preferences(trainer, other)
    assert trainer.data_collator is collator
    weighed = dpo(tmp_path, pairs(), ld_alpha=0.5)
    with pytest.raises(ValueError, match=r"ld_alpha=0\.5 weighs tokens"):
        watch_preferences(weighed)
    trainer = dpo(tmp_path, audited_dataset(pairs(), found))
    plain = trainer.data_collator
    watch_preferences(trainer, found)

    def without(rows: list[dict[str, Any]]) -> Any:
        return plain([{k: v for k, v in row.items() if k != "index"} for row in rows])

    trainer.data_collator = without
    with pytest.raises(ValueError, match="a training batch has no 'index'"):
        trainer.train()
