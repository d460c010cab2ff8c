"""The audit in Lightning, transformers and TRL, and its results in cleanlab and datasets."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import words
from hub_models import distilbert
from poprisk import Auditor, AuditResult, audit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
]
N, C = 60, 3
WRONG = [4, 31]


def labels() -> tuple[Tensor, Tensor]:
    """Given and true ones."""
    true = torch.arange(N) % C
    given = true.clone()
    given[WRONG] = (given[WRONG] + 1) % C
    return given, true


def found() -> AuditResult:
    given, true = labels()
    g = torch.Generator().manual_seed(0)
    return audit(3 * F.one_hot(true, C) + torch.randn(N, C, generator=g), None, given)


def test_cleanlab_runs_on_the_result() -> None:
    pytest.importorskip("cleanlab")
    from cleanlab.count import compute_confident_joint, estimate_latent
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    result = found()
    issues = find_label_issues(
        result.labels, result.pred_probs, return_indices_ranked_by="normalized_margin", n_jobs=1
    )
    assert set(WRONG) <= set(issues.tolist())
    scores = get_label_quality_scores(result.labels, result.pred_probs, method="normalized_margin")
    plain = audit(torch.log(torch.as_tensor(result.pred_probs)), None, labels()[0], structure=False)
    np.testing.assert_allclose(scores, plain.quality, atol=1e-5)
    joint = compute_confident_joint(result.labels, result.pred_probs)
    prior, noise, _ = estimate_latent(joint, result.labels)
    assert prior.shape == (C,)
    assert noise.shape == (C, C)


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # of pandas, in cleanlab 2.9
def test_datalab_runs_on_the_result() -> None:
    pytest.importorskip("cleanlab")
    pytest.importorskip("datasets")
    from cleanlab import Datalab

    result = found()
    lab = Datalab(data={"label": result.labels}, label_name="label", verbosity=0)
    lab.find_issues(pred_probs=result.pred_probs, issue_types={"label": {}})
    issues = lab.get_issues("label")
    assert set(WRONG) <= set(np.flatnonzero(issues["is_label_issue"]))


def test_columns_of_a_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    result = found()
    data = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(N)]})
    more = result.add_to(data)
    added = "suggested quality margin rank suspect confidence".split()
    assert more.column_names == ["text", *(f"label_{name}" for name in added)]
    assert set(WRONG) <= {i for i, row in enumerate(more) if row["label_suspect"]}
    with pytest.raises(ValueError, match="dataset has 10 examples, but the audit 60"):
        result.add_to(data.select(range(10)))


def trained(lightning: Any, auditor: Auditor, x: Tensor, folder: Path, **settings: Any) -> Any:
    returned, data = settings.pop("returned", False), torch.utils.data.TensorDataset

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Any:
            me: Any = self
            u = self.net(batch[0]) if returned else me(batch[0])
            loss = F.cross_entropy(u, batch[1])
            return {"loss": loss, "outputs": u.detach()} if returned == "dict" else loss

        def validation_step(self, batch: Any, index: int) -> None:
            me: Any = self
            me(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    from poprisk.integrations.lightning_audit import LightningAuditCallback

    set_ = auditor.dataset(data(x, labels()[0]))
    loader = torch.utils.data.DataLoader(set_, batch_size=20, shuffle=True)
    held = torch.utils.data.DataLoader(data(x), batch_size=20)
    torch.manual_seed(1)
    trainer = lightning.Trainer(
        max_epochs=settings.pop("epochs", 6),
        callbacks=[LightningAuditCallback(auditor)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
    )
    trainer.fit(Module(), loader, held, **settings)
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    x = F.one_hot(labels()[1], C) + 0.1 * torch.randn(N, C)
    whole, dicts = (Auditor(labels()[0], plant=0.1) for _ in range(2))
    trained(lightning, whole, x, tmp_path)
    trained(lightning, dicts, x, tmp_path, returned="dict")
    result = whole.result()
    assert len(result.looks) == 6
    assert {look.items for look in result.looks} == {N}
    assert set(WRONG) <= set(result.suspects())
    np.testing.assert_allclose(dicts.result().margin, result.margin, atol=1e-5)

    half = Auditor(labels()[0], plant=0.1)
    trained(lightning, half, x, tmp_path, epochs=3).save_checkpoint(tmp_path / "half.ckpt")
    resumed = Auditor(labels()[0], plant=0.1)
    trained(lightning, resumed, x, tmp_path, ckpt_path=tmp_path / "half.ckpt")
    assert len(resumed.looks) == 6
    assert resumed.looks[:3] == half.looks
    with pytest.raises(ValueError, match="training_step called no forward"):
        trained(lightning, Auditor(labels()[0]), x, tmp_path, returned="nothing")


def bert() -> Any:
    return distilbert(C)


def train(folder: Path, auditor: Auditor, data: Any, *, epochs: int, **more: Any) -> Any:
    import transformers

    from poprisk.integrations.transformers_audit import TrainerAuditCallback

    resume = more.pop("resume", None)
    args = transformers.TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 10,
            "num_train_epochs": epochs,
            "learning_rate": 1e-2,
            "report_to": [],
            "save_strategy": "epoch",
            "eval_strategy": "epoch",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            **more,
        },
    )
    trainer = transformers.Trainer(
        bert(),
        args,
        train_dataset=data,
        eval_dataset=data.remove_columns("index") if "index" in data.column_names else data,
        callbacks=[TrainerAuditCallback(auditor)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_trainer(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("transformers")
    from poprisk.integrations.transformers_audit import audited_dataset

    given, true = labels()
    auditor = Auditor(given, plant=0.1)
    words = [[5 * int(k) + 1, 5 * int(k) + 2, i % 20] for i, k in enumerate(true)]
    plain = datasets.Dataset.from_dict({"input_ids": words, "labels": given.tolist()})
    data = audited_dataset(plain, auditor)
    assert data["index"][:] == list(range(N))
    assert data["labels"][:] == auditor.targets.tolist()
    train(tmp_path / "a", auditor, data, epochs=8)
    result = auditor.result()
    assert len(result.looks) == 8
    assert {look.items for look in result.looks} == {N}
    assert result.rank[WRONG].max() < 6

    resumed = Auditor(given, plant=0.1)
    checkpoint = tmp_path / "a" / "checkpoint-18"
    train(tmp_path / "a", resumed, data, epochs=8, resume=str(checkpoint))
    assert resumed.looks[:3] == auditor.looks[:3]
    np.testing.assert_allclose(resumed.result().margin, result.margin, atol=1e-5)
    (checkpoint / "auditor-0.pt").unlink()
    with pytest.warns(RuntimeWarning, match="the audit begins anew"):
        train(tmp_path / "a", Auditor(given, plant=0.1), data, epochs=4, resume=str(checkpoint))
    with pytest.raises(ValueError, match="set remove_unused_columns=False"):
        train(tmp_path / "b", auditor, data, epochs=1, remove_unused_columns=True)
    with pytest.raises(ValueError, match="a training batch has no 'index'"):
        train(tmp_path / "b", auditor, plain, epochs=1)
    with pytest.raises(ValueError, match="dataset has 10 examples, but the auditor 60 targets"):
        audited_dataset(plain.select(range(10)), auditor)


def test_a_reward_model_of_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import datasets
    import transformers
    import trl

    from poprisk.integrations.transformers_audit import (
        TrainerAuditCallback,
        audited_dataset,
        with_index,
    )

    n, flipped = 80, [3, 17, 40]
    g = torch.Generator().manual_seed(0)
    good, bad = (words.sentences(n, low, low + 4, g) for low in (0, 4))
    for i in flipped:
        good[i], bad[i] = bad[i], good[i]
    pairs = datasets.Dataset.from_dict({"prompt": ["w1"] * n, "chosen": good, "rejected": bad})
    auditor = Auditor(torch.ones(n, dtype=torch.long), kind="preferences", plant=0.2)
    data = audited_dataset(pairs, auditor)
    swapped = [a != b for a, b in zip(data["chosen"], pairs["chosen"], strict=True)]
    assert swapped == (auditor.targets == 0).tolist()

    torch.manual_seed(0)
    args = trl.RewardConfig(
        str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=4,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = trl.RewardTrainer(
        transformers.LlamaForSequenceClassification(words.llama(8)),
        args,
        train_dataset=data,
        processing_class=words.tokenizer(8),
        callbacks=[TrainerAuditCallback(auditor)],
    )
    trainer.data_collator = with_index(trainer.data_collator)
    trainer.train()
    result = auditor.result()
    assert {look.items for look in result.looks} == {n}
    assert set(flipped) <= set(result.suspects()[:6])
    assert result.suggested[flipped].tolist() == [0, 0, 0]


def test_direct_preference_optimization_is_refused_before_anything_moves(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import datasets
    import transformers
    import trl

    from poprisk.integrations.transformers_audit import (
        TrainerAuditCallback,
        audited_dataset,
        with_index,
    )

    n = 40
    g = torch.Generator().manual_seed(0)
    good, bad = (words.sentences(n, low, low + 4, g) for low in (0, 4))
    pairs = datasets.Dataset.from_dict({"prompt": ["w1"] * n, "chosen": good, "rejected": bad})
    auditor = Auditor(torch.ones(n, dtype=torch.long), kind="preferences", plant=0.2)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(words.llama(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = trl.DPOConfig(
        str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = trl.DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=args,
        train_dataset=audited_dataset(pairs, auditor),
        processing_class=words.tokenizer(8),
        callbacks=[TrainerAuditCallback(auditor)],
    )
    trainer.data_collator = with_index(trainer.data_collator)
    with pytest.raises(ValueError, match="LlamaForCausalLM writes texts, as models of DPOTrainer"):
        trainer.train()
    assert not auditor.predictions.seen.any()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
