"""The optimizer and the monitor in TRL's trainers, on tiny models from a configuration."""

from __future__ import annotations

import copy
import json
import math
import re
import runpy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("trl", reason="TRL is not installed: pip install 'poprisk[hf]'")

import datasets
import transformers
import trl

import words
from poprisk import PopRiskAdamW, audit
from poprisk.audit import AuditResult, Rate
from poprisk.integrations.transformers import TrainerRiskCallback, poprisk_optimizer
from poprisk.integrations.trl import robust_settings

SCRIPT = Path(__file__).parents[1] / "docs" / "how-to" / "dpo_ultrafeedback.py"
PAGE = (Path(__file__).parents[1] / "docs" / "how-to" / "trl.md").read_text(encoding="utf-8")
DIRECTLY, TWICE, STOPPED, REWARDS = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
N, WORDS, FLIPPED = 48, 16, 0.25
pytestmark = [  # TRL's own settings have names that transformers is about to drop
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
]


def tokenizer() -> Any:
    """The better words are those of the second half."""
    return words.tokenizer(WORDS)


def config() -> Any:
    return words.llama(WORDS)


def preferences(n: int = N) -> Any:
    """Pairs of answers, of which a quarter are the wrong way round."""
    g = torch.Generator().manual_seed(0)
    good, bad = (words.sentences(n, k, k + WORDS // 2, g) for k in (WORDS // 2, 0))
    flipped = (torch.rand(n, generator=g) < FLIPPED).tolist()
    pairs = [(b, a) if wrong else (a, b) for a, b, wrong in zip(good, bad, flipped, strict=True)]
    rows = [{"prompt": "w0 ", "chosen": c, "rejected": r} for c, r in pairs]
    return datasets.Dataset.from_list(rows)


def settings(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 1,
    }


def gated(trainer: Any) -> PopRiskAdamW:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, PopRiskAdamW)
    group = optimizer.param_groups[0]
    assert (group["batch_size"], group["dataset_size"]) == (16, N)
    return optimizer


def test_a_monitor_without_labels_says_so(tmp_path: Path) -> None:
    trainer = trl.RewardTrainer(
        transformers.LlamaForSequenceClassification(config()),
        trl.RewardConfig(**settings(tmp_path, 2)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        callbacks=[TrainerRiskCallback(next_words)],
    )
    with pytest.warns(RuntimeWarning, match="called without an input named 'labels'"):
        trainer.train()


def test_a_reward_model_learns_from_noisy_preferences(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(REWARDS, names)
    args = trl.RewardConfig(**settings(tmp_path, 20))
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config())
    trainer = names["train_reward_model"](model, tokenizer(), preferences(), args)
    stats = gated(trainer).gate_stats(trainer.model)
    assert "score" in stats
    assert any(0 < gate.pass_rate < 1 for gate in stats.values())
    g = torch.Generator().manual_seed(1)
    good, bad = (
        tokenizer()(
            [f"w0 {s} <eos>" for s in words.sentences(N, low, high, g)], return_tensors="pt"
        )
        for low, high in ((WORDS // 2, WORDS), (0, WORDS // 2))
    )
    with torch.no_grad():
        won = rewards(trainer.model, good) > rewards(trainer.model, bad)
    assert float(won.double().mean()) > 0.9


def rewards(model: Any, tokens: Any) -> Tensor:
    return model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits


def test_preferences_are_optimized_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = trl.DPOConfig(**settings(tmp_path, 15))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config())
    before = [p.detach().clone() for p in model.parameters()]
    names: dict[str, Any] = {}
    exec(DIRECTLY, names)
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preferences()))
    reference = copy.deepcopy(model)
    trainer, result, columns = names["train_by_preferences"](model, reference, tokenizer(), args)
    assert trainer.state.log_history[-1]["train_loss"] < 0.69
    assert set(gated(trainer).gate_stats(trainer.model)) >= {"lm_head", "model.embed_tokens"}
    assert any(not torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
    good = [int(row["chosen"].split()[0][1:]) >= WORDS // 2 for row in preferences()]
    ranks = columns["label_rank"][:]
    flipped = [rank for rank, right in zip(ranks, good, strict=True) if not right]
    assert len(flipped) > 5
    assert sum(rank < len(flipped) for rank in flipped) >= 0.8 * len(flipped)
    assert result.recall is not None
    worst = Path("pairs.csv").read_text().splitlines()[1].split(",")[0]
    assert ranks[int(worst)] == 0
    assert json.loads(Path("run.jsonl").read_text().splitlines()[-1])["step"] == 15


def test_a_second_run_is_told_what_the_first_one_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {}
    exec(DIRECTLY, names)
    exec(TWICE, names)
    monkeypatch.chdir(tmp_path)
    rows = list(preferences(400))
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def model() -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config())

    trainer, result = names["train_twice"](model, model(), tokenizer(), settings(tmp_path, 30))
    assert result.flip_rate.valid
    assert result.flip_rate.value == pytest.approx(FLIPPED, abs=0.08)
    assert trainer.args.loss_type == ["robust"]
    assert trainer.args.label_smoothing == result.flip_rate.value
    assert len(trainer.train_dataset) == len(rows)
    assert trainer.state.global_step == 30


def test_a_twin_says_where_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec(STOPPED, names)
    monkeypatch.chdir(tmp_path)
    rows = list(preferences(120))
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config())
    reference = copy.deepcopy(model)
    curve = names["train_and_stop"](model, reference, tokenizer(), settings(tmp_path, 40))
    assert [estimate.valid for estimate in curve.estimates] == [True, True]
    assert all(0 < estimate.value < 1.5 for estimate in curve.estimates)
    assert curve.point.index in (0, 1)


def answers(n: int, seed: int) -> list[dict[str, Any]]:
    """Conversations as UltraFeedback has them, the better answer of words of the second half."""
    g = torch.Generator().manual_seed(seed)
    good, bad = (words.sentences(n, k, k + WORDS // 2, g) for k in (WORDS // 2, 0))
    asked = {"role": "user", "content": "w0"}

    def said(text: str) -> list[dict[str, str]]:
        return [asked, {"role": "assistant", "content": text}]

    return [{"chosen": said(a), "rejected": said(b)} for a, b in zip(good, bad, strict=True)]


@pytest.mark.parametrize("method", ["twice", "adamw"])
def test_the_recipe_for_a_real_model_runs_on_a_tiny_one(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words_of_chat = tokenizer()
    words_of_chat.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}"
        "{% if not add_generation_prompt %}<eos>{% endif %}"
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config()).save_pretrained(tmp_path / "model")
    words_of_chat.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, n in (("train", 400), ("test", 48)):
        lines = [json.dumps(row) + "\n" for row in answers(n, n)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines))
    command = (
        f"{SCRIPT} --model {tmp_path}/model --data {tmp_path}/data --output {tmp_path}/out "
        f"--method {method} --swap 0.3 --batch 4 --accumulate 2 --lr 1e-2 --beta 0.5 --length 14 "
        "--bf16 --checkpointing"
    )
    monkeypatch.setattr("sys.argv", command.split())
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    last = "second" if method == "twice" else "adamw"
    assert found[last]["eval_rewards/accuracies"] > 0.8  # of pairs that were not swapped
    args = torch.load(tmp_path / "out" / last / "training_args.bin", weights_only=False)
    if method == "adamw":
        assert found.keys() == {"adamw"}
        assert args.label_smoothing == 0
        return
    assert args.loss_type == ["robust"]
    assert args.label_smoothing == found["flipped"]
    assert found["interval"][0] < 0.3 < found["interval"][1]
    assert found["swapped among as many of the worst"] > 0.8
    worst = (tmp_path / "out" / "pairs.csv").read_text().splitlines()[1:]
    assert len(worst) == 400
    for name in ("first", "second"):
        rows = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(rows[-1])["step"] == 50


def test_settings_of_a_robust_loss() -> None:
    result = flips(Rate(0.2, 0.01))
    assert robust_settings(result) == {"loss_type": ["robust"], "label_smoothing": 0.2}
    with pytest.warns(RuntimeWarning, match=r"flipped pairs, 0\.25, is hardly known: so it is"):
        assert robust_settings(flips(Rate(0.25, 0.1, False, "so it is")))["label_smoothing"] == 0.25
    with pytest.raises(ValueError, match="the share of flipped pairs is not known: few"):
        robust_settings(flips(Rate(math.nan, math.nan, False, "few")))
    with pytest.raises(ValueError, match="must be of preferences, but is of classes"):
        robust_settings(replace(result, kind="classes", flip_rate=None))
    with pytest.raises(TypeError, match="what Auditor"):
        robust_settings(result.flip_rate)  # pyrefly: ignore


def flips(rate: Rate) -> AuditResult:
    y = torch.ones(60, dtype=torch.long)
    result = audit(torch.linspace(-1, 3, 60), None, y, kind="preferences")
    return replace(result, flip_rate=rate)


def next_words(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    return losses.mean(1)


def test_the_monitor_watches_supervised_fine_tuning(tmp_path: Path) -> None:
    args = trl.SFTConfig(**settings(tmp_path, 4))
    g = torch.Generator().manual_seed(0)
    texts = [{"text": text} for text in words.sentences(N, 0, WORDS, g)]
    path = tmp_path / "run.jsonl"
    torch.manual_seed(0)
    trainer = trl.SFTTrainer(
        transformers.LlamaForCausalLM(config()),
        args,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=poprisk_optimizer(args, N),
        callbacks=[TrainerRiskCallback(next_words, every=3, sinks=[path])],
    )
    trainer.train()
    gated(trainer)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 3]
    assert all(row["loss"] > 0 and -1 < row["signal/share_low"] < 1 for row in rows)


def test_preferences_have_no_loss_of_words(tmp_path: Path) -> None:
    args = trl.DPOConfig(**settings(tmp_path, 2))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config())
    cls, chosen = poprisk_optimizer(args, N)
    callback = TrainerRiskCallback(next_words, every=1)
    trainer = trl.DPOTrainer(
        model,
        copy.deepcopy(model),
        args,
        train_dataset=preferences(),
        processing_class=tokenizer(),
        optimizers=(cls(model, **chosen), None),
        callbacks=[callback],
    )
    with pytest.warns(RuntimeWarning, match="measures no loss and no signal"):
        trainer.train()
    assert callback.monitor is not None
    for _, row in callback.monitor.rows:
        assert math.isnan(row["loss"])
        assert math.isnan(row["signal/snr"])
    assert any(name.startswith("gate/pass_rate") for name in callback.monitor.rows[-1][1])
