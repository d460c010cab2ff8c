r"""DPO on pairs of which a share is swapped on purpose: two runs, of which the second knows more.

    python dpo_ultrafeedback.py --model Qwen/Qwen2.5-0.5B-Instruct \
        --data trl-lib/ultrafeedback_binarized --swap 0.3 --bf16 --checkpointing --output qwen

The first run finds swapped pairs and their share, the second trains anew on TRL's robust loss at
that rate. Neither is told what was swapped. Data: ``chosen`` and ``rejected`` conversations, by the
name of a data set with splits train and test, or a folder with train.jsonl and test.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from poprisk import Auditor
from poprisk.integrations.transformers_audit import audited_dataset
from poprisk.integrations.trl import robust_settings, set_optimizer, watch_preferences

SIDES = ["chosen", "rejected"]


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", choices=["twice", "gate", "adamw"], default="twice")
    parser.add_argument("--swap", type=float, default=0.3)
    parser.add_argument("--pairs", type=int, help="the first ones only")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=4, help="pairs of a device at a time")
    parser.add_argument("--accumulate", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--length", type=int, default=1024, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    return parser.parse_args()


def load(data: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out pairs."""
    folder = Path(data)
    if folder.is_dir():
        files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
        found = datasets.load_dataset("json", data_files=files)
    else:
        found = datasets.load_dataset(data)
    return found["train"].select_columns(SIDES), found["test"].select_columns(SIDES)


def swapped(pairs: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, set[int]]:
    """Pairs of which a share is the wrong way round, and which they are."""
    wrong = set(random.Random(seed).sample(range(len(pairs)), round(share * len(pairs))))

    def swap(row: dict, i: int) -> dict:
        a, b = SIDES[::-1] if i in wrong else SIDES
        return {"chosen": row[a], "rejected": row[b]}

    return pairs.map(swap, with_indices=True), wrong


def main() -> None:
    """Train as the command line says, and print what came of it."""
    a = arguments()
    train, test = load(a.data)
    train = train.select(range(a.pairs)) if a.pairs else train
    train, wrong = swapped(train, a.swap, a.seed)
    tokenizer = AutoTokenizer.from_pretrained(a.model)

    def model() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)

    def run(name: str, pairs: datasets.Dataset, auditor: Auditor | None, **loss: object) -> dict:
        args = DPOConfig(
            output_dir=str(a.output / name),
            per_device_train_batch_size=a.batch,
            per_device_eval_batch_size=a.batch,
            gradient_accumulation_steps=a.accumulate,
            num_train_epochs=a.epochs,
            learning_rate=a.lr,
            warmup_steps=0.1,
            beta=a.beta,
            max_length=a.length,
            use_cpu=not torch.accelerator.is_available(),
            bf16=a.bf16,
            gradient_checkpointing=a.checkpointing,
            save_strategy="no",
            report_to=[],
            seed=a.seed,
            **loss,
        )
        trainer = DPOTrainer(
            model(),
            model(),
            args,
            train_dataset=pairs if auditor is None else audited_dataset(pairs, auditor),
            eval_dataset=test,
            processing_class=tokenizer,
        )
        if a.method != "adamw":
            set_optimizer(trainer)
        watch_preferences(trainer, auditor, sinks=[str(a.output / f"{name}.jsonl")])
        trainer.train()
        trainer.save_model()
        found = trainer.evaluate()
        return {key: value for key, value in found.items() if key.startswith("eval_rewards/")}

    a.output.mkdir(parents=True, exist_ok=True)
    found = dict[str, object]()
    if a.method == "twice":
        ones = torch.ones(len(train), dtype=torch.long)
        auditor = Auditor(ones, kind="preferences", seed=a.seed)
        found["first"] = run("first", train, auditor)
        result = auditor.result()
        result.to_csv(a.output / "pairs.csv")
        rate, suspects = result.flip_rate, set(result.suspects().tolist())
        worst = set(result.rank.argsort()[(result.rank < 0).sum() :][: len(wrong)].tolist())
        found |= {
            "flipped": rate.value,
            "interval": rate.interval,
            "believed": rate.valid,
            "suspects that were swapped": len(suspects & wrong) / max(len(suspects), 1),
            "swapped among as many of the worst": len(worst & wrong) / max(len(wrong), 1),
        }
        found["second"] = run("second", train, None, **robust_settings(result))
    else:
        found[a.method] = run(a.method, train, None)
    text = json.dumps(found, indent=2)
    (a.output / "found.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
