"""The reference of the claim on flipped preferences: trained on the spot, and kept."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from poprisk_lab.checkpoint import Workspace
from poprisk_lab.results import Metrics
from poprisk_lab.tasks.preferences import (
    ANSWER,
    PROMPT,
    language_model,
    texts,
    tokenizer_of,
    train_tokenizer,
)

CONTEXT, SEQUENCES, PEAK = PROMPT + ANSWER, 64, 3e-3
"""Tokens of a sequence in pre-training before its end, sequences a step, and the largest rate."""


def pretrain(width: int, layers: int, steps: int, workspace: Workspace) -> Metrics:
    """Train tokenizer and model, and keep both, with the tokens, as the workspace's product.

    Args:
        width: of the model.
        layers: of the model.
        steps: of training, with a warm-up and a cosine.
        workspace: from whose state it goes on.
    """
    corpus = list(texts())
    torch.manual_seed(0)
    model = language_model(width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.95))
    state = workspace.load()
    words = state["tokenizer"] if state else train_tokenizer(corpus)
    rows = tokenizer_of(words)([text + "\n\n" for text in corpus])["input_ids"]
    tokens = torch.tensor([token for row in rows for token in row])
    held, tokens = tokens[: len(tokens) // 50], tokens[len(tokens) // 50 :]
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(state["step"] if state else 0, steps):
        warm, turn = min(1.0, (step + 1) / 50), math.pi * step / steps
        optimizer.param_groups[0]["lr"] = PEAK * warm * (0.05 + 0.95 * (1 + math.cos(turn)) / 2)
        model.zero_grad()
        loss_on(model, tokens, torch.Generator().manual_seed(step)).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        workspace.save(partial(_state, step + 1, words, model.state_dict(), optimizer.state_dict()))
    with torch.no_grad():
        end = loss_on(model, held, torch.Generator().manual_seed(0))
    workspace.keep({"tokenizer": words, "weights": model.state_dict(), "tokens": tokens})
    weights = sum(p.numel() for p in model.parameters())
    return {"loss": float(end), "weights": weights, "tokens": len(tokens)}


def _state(step: int, words: str, model: Any, optimizer: Any) -> dict[str, Any]:
    return {"step": step, "tokenizer": words, "model": dict(model), "optimizer": optimizer}


def loss_on(model: Any, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Mean cross-entropy of the next token, on sequences drawn from a text.

    Each ends as a prompt with its answer does: an end that the model did not expect would be most
    of an answer's likelihood.
    """
    starts = torch.randint(len(tokens) - CONTEXT, (SEQUENCES, 1), generator=generator)
    rows = F.pad(tokens[starts + torch.arange(CONTEXT)], (0, 1))  # the token of the end is 0
    return F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
