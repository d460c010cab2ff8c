"""What the trials do: pre-training, pairs, runs, the two-run recipe, cross-fitting."""

from __future__ import annotations

import math
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from poprisk import Auditor
from poprisk.audit import AuditResult
from poprisk.randomness import generator_of
from poprisk_lab.checkpoint import Workspace, load_checkpoint
from poprisk_lab.controls import UpdateTrace
from poprisk_lab.results import Metrics
from poprisk_lab.studies.dpo.measures import (
    Drawn,
    Model,
    at_the_end,
    found_by,
    likelihoods,
    load_model,
    margins_given,
)
from poprisk_lab.studies.dpo.reference import pretrain
from poprisk_lab.studies.dpo.stopping import stop_by_twin
from poprisk_lab.studies.dpo.training import PolicyRun, Way, train
from poprisk_lab.tasks.preferences import draw_pairs, flipped, tokenizer_of

PRETRAINED = "pretrained"
"""The trial that all others come after."""
PLANT = 0.05
"""Share of the pairs that the first run of the recipe swaps on purpose."""
VERSIONS = ("transformers", "trl", "tokenizers")
"""Packages whose versions are put on record."""
MOST = 0.45
"""The largest rate that the recipe tells ``robust``, which divides by 1 - 2·rate."""


def pretrained(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Train the tokenizer and the reference."""
    found = pretrain(settings["width"], settings["layers"], settings["steps"], workspace)
    return {**found, "versions": {name: metadata.version(name) for name in VERSIONS}}


def pairs(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Draw the pairs of a seed, and the reference's likelihood of every answer."""
    model = load_model(settings, workspace.given[PRETRAINED])
    reference = model.fresh().eval()
    words = tokenizer_of(model.tokenizer)
    sizes = [settings[key] for key in ("training", "held_out", "noisy")]
    found = draw_pairs(
        reference, words, model.tokens, settings["reward"], sum(sizes), seed=settings["seed"]
    )
    rows = [
        [
            words(p + a + words.eos_token)["input_ids"]
            for p, a in zip(found.prompts, side, strict=True)
        ]
        for side in (found.better, found.worse)
    ]
    ids = torch.tensor(rows)
    workspace.keep(
        {
            "prompts": found.prompts,
            "better": found.better,
            "worse": found.worse,
            "ids": ids,
            "reference": torch.stack([likelihoods(reference, side) for side in ids]),
            "training": sizes[0],
            "held_out": sizes[1],
        }
    )
    better, worse = found.rewards.T
    return {"better": float(better.mean()), "worse": float(worse.mean())}


def given(settings: dict[str, Any], workspace: Workspace) -> tuple[Model, Drawn, Tensor]:
    """The reference, the pairs, and which of those for training are flipped."""
    model = load_model(settings, workspace.given[PRETRAINED])
    (name,) = (name for name in workspace.given if name != PRETRAINED)
    drawn = Drawn(**load_checkpoint(workspace.given[name]))
    wrong = flipped(drawn.training, settings["rate"], seed=settings["seed"])
    return model, drawn, wrong


def one(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """A run, and AdamW at the sizes of its updates if the settings ask for it."""
    model, drawn, wrong = given(settings, workspace)
    way = Way(**{key: settings[key] for key in ("arm", "lr", "loss", "adapters")})
    if way.loss == "robust":
        way = way._replace(rate=settings["rate"])
    end = partial(_ended, settings, model, drawn, wrong)
    trace = UpdateTrace() if settings["matched"] else None
    run = train(model, drawn, way, wrong, seed=settings["seed"], trace=trace)
    found = {"run": end(run)}
    if trace is not None:
        again = train(model, drawn, way, wrong, seed=settings["seed"], trace=trace, matched=True)
        found["matched"] = end(again)
    return found


def _ended(
    settings: dict[str, Any], model: Model, drawn: Drawn, wrong: Tensor, run: PolicyRun
) -> Metrics:
    reward, rate, seed = (settings[key] for key in ("reward", "rate", "seed"))
    found = at_the_end(run.policy, model, drawn, reward, wrong, rate, seed=seed)
    along = run.metrics
    last = {"final": along["accuracies"][-1], "best": max(along["accuracies"])}
    estimate = {"estimate": run.estimate} if run.estimate is not None else {}
    return {**along, **last, "drift": along["drifts"][-1], **found, **estimate}


def recipe(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """A gated run that is audited, a second one told its rate, and one without its suspects."""
    model, drawn, wrong = given(settings, workspace)
    seed, end = settings["seed"], partial(_ended, settings, model, drawn, wrong)
    way = Way(settings["arm"], settings["lr"])
    done: Metrics = workspace.load() or {}
    if "first" not in done:
        auditor = Auditor(
            torch.ones(drawn.training, dtype=torch.long),
            kind="preferences",
            plant=PLANT,
            seed=seed,
        )
        run = train(model, drawn, way, wrong, seed=seed, auditor=auditor)
        audit = auditor.result()
        done |= {"first": end(run), "audit": _audited(audit, wrong)}
        done["suspect"] = [int(i) for i in audit.suspect.nonzero()[0]]
        workspace.save(lambda: done)
    if "robust" not in done:
        second = way._replace(loss="robust", rate=told(done["audit"]["share"]))
        done["robust"] = end(train(model, drawn, second, wrong, seed=seed))
        workspace.save(lambda: done)
    left = torch.ones(drawn.training, dtype=torch.bool)
    left[done["suspect"]] = False
    keep = left.nonzero()[:, 0]
    done["without"] = end(train(model, drawn, way, wrong, seed=seed, keep=keep))
    return {key: value for key, value in done.items() if key != "suspect"}


def told(share: float | None) -> float:
    """The rate that ``robust`` is told; 0, which is DPO's own loss, where none was estimated.

    Example:
        >>> told(0.2), told(0.5), told(None)
        (0.2, 0.45, 0.0)
    """
    return 0.0 if share is None else min(MOST, share)


def _audited(audit: AuditResult, wrong: Tensor) -> Metrics:
    """How well an audit found the flipped pairs, and what it says of itself."""
    said, true = torch.from_numpy(audit.suspect), int(wrong.sum())
    hits, rate = int((said & wrong).sum()), audit.flip_rate
    if rate is None:
        raise ValueError(f"an audit of preferences estimates a share, but this is of {audit.kind}.")
    return {
        **found_by(torch.from_numpy(-audit.margin), wrong),
        "precision": hits / int(said.sum()) if said.any() else None,
        "recall": hits / true if true else None,
        "share": rate.value if math.isfinite(rate.value) else None,
        "standard_error": rate.standard_error if math.isfinite(rate.value) else None,
        "share_valid": rate.valid,
        "valid": audit.valid,
        "suspects": int(said.sum()),
    }


def folds(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Margins of each fifth under a policy that was trained on the others."""
    model, drawn, wrong = given(settings, workspace)
    seed, count = settings["seed"], settings["folds"]
    way = Way(settings["arm"], settings["lr"])
    order = torch.randperm(drawn.training, generator=generator_of(seed, "folds"))
    done: Metrics = workspace.load() or {"margins": []}
    parts = order.chunk(count)
    for part in parts[len(done["margins"]) :]:
        keep = torch.tensor(sorted({*range(drawn.training)} - {*part.tolist()}))
        run = train(model, drawn, way, wrong, seed=seed, keep=keep, look=False)
        margins = margins_given(run.policy, drawn, wrong)
        done["margins"].append([float(m) for m in margins[part]])
        workspace.save(lambda: done)
    margins = torch.empty(drawn.training)
    margins[torch.cat(parts)] = torch.tensor([m for some in done["margins"] for m in some])
    return found_by(-margins, wrong)


def stopping(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """A run beside its twin, which says where to stop."""
    model, drawn, wrong = given(settings, workspace)
    lr, seed = settings["lr"], settings["seed"]
    return stop_by_twin(model, drawn, wrong, settings["rate"], lr=lr, seed=seed)
