"""What is drawn here from a seed is not what torch, or another purpose, draws from the same one."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from poprisk import Auditor, Canaries, TwinRisk
from poprisk.audit.items import items_of
from poprisk.audit.trained import fold_of
from poprisk.path.drift import draw_batches
from poprisk.randomness import generator_of
from poprisk_lab.tasks.preferences import flipped

SOURCE = Path(__file__).parents[1] / "src" / "poprisk"
STARTS = ("manual_seed", "default_rng", "RandomState")
N, SHARE, SEEDS = 640, 0.2, range(4)


def planted(seed: int) -> Tensor:
    return Canaries(torch.arange(N) % 4, fraction=SHARE, seed=seed).index


def planted_by_an_auditor(seed: int) -> Tensor:
    auditor = Auditor(torch.arange(N) % 4, plant=SHARE, seed=seed)
    assert auditor.planted is not None
    return auditor.planted.index


def planted_numbers(seed: int) -> Tensor:
    return Canaries(torch.arange(N).double(), fraction=SHARE, seed=seed).index


def first_fold(seed: int) -> Tensor:
    items = items_of(torch.zeros(N, dtype=torch.long), kind="classes", classes=2)
    return (fold_of(items, 5, seed) == 0).nonzero()[:, 0]


def first_batch(seed: int) -> Tensor:
    return draw_batches(N, round(SHARE * N), 1, seed, replace=False)[0]


def flips(seed: int) -> Tensor:
    return flipped(N, SHARE, seed=seed).nonzero()[:, 0]


CHOICES = [planted, planted_numbers, planted_by_an_auditor, first_fold, first_batch, flips]


def of_torch(seed: int) -> Tensor:
    """Flips as one makes them, and the first batches of a loader or trainer with this seed."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed))[: round(SHARE * N)]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("other", [of_torch, flips], ids=lambda f: f.__name__)
def test_examples_are_chosen_apart_from_others_of_the_same_seed(
    choice: Callable[[int], Tensor], other: Callable[[int], Tensor]
) -> None:
    """Of independent choices 20% are in both; of one order it would be all."""
    if choice is other:
        return
    shared = [torch.isin(choice(seed), other(seed)).double().mean() for seed in SEEDS]
    expected, spread = SHARE, ((1 - SHARE) ** 2 / (N * len(SEEDS))) ** 0.5
    assert torch.stack(shared).mean() == pytest.approx(expected, abs=5 * spread)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_twin_pushes_apart_from_noise_of_the_same_seed(seed: int) -> None:
    twin = TwinRisk(
        lambda: torch.nn.Linear(1, 1),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda u, y: (u - y).square(),
        dataset_size=N,
        seed=seed,
    )
    pushed = twin.probes[0].perturbation(torch.arange(N), torch.Size([1]), shift_invariant=False)
    generator = torch.Generator().manual_seed(seed * 1009)
    noise = 2 * torch.randint(2, (N, 1), generator=generator) - 1
    assert abs(float((pushed * noise).mean())) < 5 / N**0.5


def test_a_seed_has_a_stream_for_every_purpose() -> None:
    def numbers(seed: int, stream: str) -> list[int]:
        return torch.randint(2**62, (3,), generator=generator_of(seed, stream)).tolist()

    assert numbers(1, "a") == numbers(1, "a")
    assert (
        len({tuple(numbers(s, name)) for s in (-1, 0, 1, 11) for name in ("a", "b", "a 1")}) == 12
    )


def test_a_generator_of_torch_goes_on() -> None:
    generator = torch.Generator().manual_seed(3)
    assert generator_of(generator, "probes") is generator


def seeds_of(file: Path) -> Iterator[ast.expr]:
    """What the generators of a file start from."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Call) and isinstance(called, ast.Attribute):
            yield from node.args if called.attr in STARTS else ()


def test_a_seed_of_the_user_goes_to_no_generator_directly() -> None:
    """Only to that of its purpose; numbers fixed in the source are no seed of the user."""
    found = [
        f"{file.relative_to(SOURCE)}: {ast.unparse(seed)}"
        for file in sorted(SOURCE.rglob("*.py"))
        if file.name != "randomness.py"
        for seed in seeds_of(file)
        if any(isinstance(n, ast.Name) and n.id == "seed" for n in ast.walk(seed))
        or any(isinstance(n, ast.Attribute) and n.attr == "seed" for n in ast.walk(seed))
    ]
    assert found == ["risk/local_losses.py: seed"]  # directions of a derivative, always 0, 1 or 2
