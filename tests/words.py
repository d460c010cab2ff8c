"""A language of a few words, for trainers of language models: tokens, tiny models, sentences."""

from __future__ import annotations

from typing import Any

import torch


def tokenizer(words: int) -> Any:
    """A word a token, ``w0`` and on."""
    import tokenizers
    import transformers

    known = {f"w{i}": i for i in range(words)} | {"<eos>": words, "<pad>": words + 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<eos>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", pad_token="<pad>"
    )


def llama(words: int) -> Any:
    """The configuration of a tiny model of these words."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=words + 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=1,
        pad_token_id=words + 1,
        eos_token_id=words,
        bos_token_id=None,
    )


def sentences(count: int, low: int, high: int, g: torch.Generator) -> list[str]:
    """Sentences of four words from ``w<low>`` to below ``w<high>``."""
    rows = torch.randint(low, high, (count, 4), generator=g)
    return [" ".join(f"w{i}" for i in row) for row in rows.tolist()]
