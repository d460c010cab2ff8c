"""Tiny models of the hub's kinds, made from a config."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def distilbert(classes: int, **settings: Any) -> Any:
    """A sentence classifier of one block."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=20,
        dim=16,
        hidden_dim=32,
        n_layers=1,
        n_heads=2,
        max_position_embeddings=8,
        num_labels=classes,
        **settings,
    )
    return transformers.DistilBertForSequenceClassification(config)
