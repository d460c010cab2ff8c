"""Properties that several tests assert."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: Tensor) -> Tensor:
    """The bit pattern of every entry (of every real component) as an integer."""
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return t.contiguous().view(INTEGERS[t.element_size()])


def assert_bitwise(actual: Any, expected: Any, where: str = "") -> None:
    """Both are the same structure of dicts and sequences, with tensors equal bit for bit."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), where
        assert actual.dtype == expected.dtype, where
        assert actual.shape == expected.shape, where
        assert torch.equal(bits(actual), bits(expected)), f"{where}: {actual} != {expected}"
    elif isinstance(expected, Mapping):
        assert set(actual) == set(expected), where
        for key, value in expected.items():
            assert_bitwise(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(actual) == len(expected), where
        for i, value in enumerate(expected):
            assert_bitwise(actual[i], value, f"{where}[{i}]")
    else:
        assert actual == expected, f"{where}: {actual} != {expected}"


def ulps_apart(actual: Tensor, expected: Tensor) -> int:
    """How many representable numbers lie between the entries, at most."""
    assert actual.dtype == expected.dtype
    ordered = []
    for t in (actual, expected):
        integers = bits(t)
        sign_bit = torch.iinfo(integers.dtype).min
        ordered.append(torch.where(integers < 0, sign_bit - integers, integers).long())
    return int((ordered[0] - ordered[1]).abs().max()) if actual.numel() else 0


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tol: float) -> None:
    """Pairs of tensors agree to ``tol``, relative to entries above one."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=tol, atol=tol, msg=lambda text, i=i: f"[{i}] {text}")


def complete_state(optimizer: Optimizer, *, but: Collection[str] = ()) -> dict[str, Any]:
    """A copy of weights, gradients, state and settings of every group, ``but`` some settings."""
    return deepcopy(
        {
            "weights": [p.detach() for g in optimizer.param_groups for p in g["params"]],
            "state": optimizer.state_dict()["state"],
            "settings": [
                {k: v for k, v in g.items() if k not in ("params", *but)}
                for g in optimizer.param_groups
            ],
        }
    )


@contextmanager
def nothing_changes(optimizer: Optimizer, *, but: Collection[str] = ()) -> Iterator[None]:
    """Weights, state and settings are bit for bit what they were before the block."""
    before = complete_state(optimizer, but=but)
    yield
    assert_bitwise(complete_state(optimizer, but=but), before)
