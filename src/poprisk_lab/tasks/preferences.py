"""Preferences with a known reward: a tiny language model, its own answers, ranked by a rule.

Tokenizer and model are trained on the spot on what the running Python says about itself, and pairs
of answers are sampled from the model: nothing is downloaded. It needs transformers and tokenizers.
"""

from __future__ import annotations

import ast
import itertools
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk._validate import check_choice, check_number, check_positive
from poprisk.randomness import generator_of

VOCABULARY, END = 512, "<eos>"
PROMPT, ANSWER = 8, 16
"""Tokens of a prompt, and of an answer before its end."""
BLOCK, BLOCKS = 1024, 200
"""Prompts that are answered at once, and how often at most."""
SHORTEST = 40
"""Characters that a text has at least."""


class Reward(NamedTuple):
    """A rule that says how good an answer is.

    Attributes:
        name: in words.
        of: an answer's reward.
        gap: by how much the answers of a pair differ at least.
    """

    name: str
    of: Callable[[str], float]
    gap: float


def prose(text: str) -> float:
    """Share of lower-case letters and spaces.

    Example:
        >>> prose("if x:")
        0.8
    """
    return sum(c == " " or "a" <= c <= "z" for c in text) / max(1, len(text))


def characters(text: str) -> float:
    """Characters of the answer: all have as many tokens, so that long ones have long tokens."""
    return float(len(text))


REWARDS = {
    "prose": Reward("share of lower-case letters and spaces", prose, 0.12),
    "characters": Reward("characters", characters, 6.0),
}


def texts() -> Iterator[str]:
    """What the running Python says about itself: its topics, and its modules' docstrings."""
    from pydoc_data.topics import topics

    yield from topics.values()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        yield from (text for text in found if text and len(text) >= SHORTEST)


def train_tokenizer(corpus: Sequence[str], size: int = VOCABULARY) -> str:
    """A byte-level BPE of these texts, as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return found.to_str()


def tokenizer_of(found: str) -> Any:
    """The tokenizer of transformers that this JSON describes."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(found),
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def language_model(width: int, layers: int, weights: dict[str, Tensor] | None = None) -> Any:
    """A Llama of that size, with weights drawn by torch's generator unless they are given."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=5 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=2 * (PROMPT + ANSWER),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    if weights is not None:
        model.load_state_dict(weights)
    return model


class Pairs(NamedTuple):
    """Pairs of answers, the better one first.

    Attributes:
        prompts: texts.
        better: the answers with the larger reward.
        worse: the others.
        rewards: of both, (n, 2).
    """

    prompts: list[str]
    better: list[str]
    worse: list[str]
    rewards: Tensor


def draw_pairs(
    model: Any, tokenizer: Any, tokens: Tensor, reward: str, count: int, *, seed: int
) -> Pairs:
    """Prompts out of a text, each with two answers of the model whose rewards differ clearly.

    Only texts whose tokens are those that were sampled count, so that all have one length.

    Args:
        model: that answers.
        tokenizer: its tokenizer.
        tokens: the text (t,).
        reward: one of :data:`REWARDS`.
        count: how many pairs.
        seed: of prompts and answers.

    Raises:
        TypeError, ValueError: for a bad argument, or a model whose answers are hardly ever a pair.
    """
    check_choice("reward", reward, tuple(REWARDS))
    check_positive("count", count)
    rule = REWARDS[reward]
    generator = torch.Generator().manual_seed(seed)
    found = list[tuple[str, str, str, float, float]]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for block in itertools.count():
            if len(found) >= count:
                break
            if block == BLOCKS:
                raise ValueError(
                    f"the model gave {len(found)} of {count} pairs after {BLOCK * BLOCKS:,} "
                    "prompts; pre-train it longer."
                )
            starts = torch.randint(len(tokens) - PROMPT, (BLOCK, 1), generator=generator)
            prompts = tokens[starts + torch.arange(PROMPT)]
            asked = tokenizer.batch_decode(prompts)
            first, second = (_answers(model, tokenizer, prompts, asked) for _ in range(2))
            for prompt, a, b in zip(asked, first, second, strict=True):
                if a is None or b is None:
                    continue
                scores = rule.of(a), rule.of(b)
                if abs(scores[0] - scores[1]) >= rule.gap:
                    best = (a, b) if scores[0] > scores[1] else (b, a)
                    found.append((prompt, *best, max(scores), min(scores)))
    prompts_, better, worse, high, low = zip(*found[:count], strict=True)
    rewards = torch.tensor([high, low]).T
    return Pairs(list(prompts_), list(better), list(worse), rewards)


def answer(model: Any, prompts: Tensor) -> Tensor:
    """Sampled answers of :data:`ANSWER` tokens (n, ANSWER), by torch's generator.

    Args:
        model: that answers.
        prompts: tokens (n, p).
    """
    with torch.no_grad():
        rows = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=ANSWER,
            suppress_tokens=[0],  # an end would make a shorter answer
        )
    return rows[:, prompts.shape[1] :]


def _answers(model: Any, tokenizer: Any, prompts: Tensor, asked: Sequence[str]) -> list[str | None]:
    """Texts of answers; None where the whole text has other tokens than those sampled."""
    answers = answer(model, prompts)
    said = tokenizer.batch_decode(answers)
    whole = tokenizer([a + b for a, b in zip(asked, said, strict=True)])["input_ids"]
    alone = tokenizer(list(asked))["input_ids"]
    rows = torch.cat([prompts, answers], 1).tolist()
    same = [w == r and p == r[:PROMPT] for w, p, r in zip(whole, alone, rows, strict=True)]
    return [text if kept else None for text, kept in zip(said, same, strict=True)]


def flipped(count: int, share: float, *, seed: int) -> Tensor:
    """Which pairs are the wrong way round: ``round(share·count)`` of them, (count,) boolean.

    For one seed those of a smaller share are among those of a larger one.

    Example:
        >>> int(flipped(10, 0.3, seed=0).sum())
        3
    """
    check_number("share", share, low=0.0, high=1.0)
    order = torch.randperm(count, generator=generator_of(seed, "flips"))
    found = torch.zeros(count, dtype=torch.bool)
    found[order[: round(share * count)]] = True
    return found
