"""Checkpoints: what goes in comes out, and a failed write leaves the old one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poprisk_lab.checkpoint import load_checkpoint, save_checkpoint


def same(a: Any, b: Any) -> bool:
    """Equal in value and in type, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        keys = [*map(repr, a)] == [*map(repr, b)]
        return keys and all(same(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def through_file(path: Path, value: Any) -> Any:
    save_checkpoint(path, value)
    return load_checkpoint(path)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=30, deadline=None)
@given(value=VALUES)
def test_nested_values_come_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "nested.safetensors"
    assert same(through_file(path, value), value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3),
        torch.arange(6.0, dtype=torch.float64).view(2, 3).t(),
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
        torch.arange(3),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([1.5, -2.0], dtype=torch.float16),
        torch.tensor([1 + 2j, -1j]),
        torch.arange(10.0)[::3],
        torch.ones(3, requires_grad=True),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}",
)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, tensor: Tensor) -> None:
    back = through_file(tmp_path / "t.safetensors", {"w": [tensor]})["w"][0]
    assert same(back, tensor.detach())
    assert not back.requires_grad


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.linalg.eigh(torch.eye(3)).eigenvectors,
        torch.arange(12.0).view(3, 4)[:, ::2],
    ],
    ids=["transposed", "channels last", "eigenvectors", "with gaps"],
)
def test_tensors_come_back_as_a_copy_lies_in_memory(tmp_path: Path, tensor: Tensor) -> None:
    """Products with them round differently where they lie otherwise."""
    back = through_file(tmp_path / "state.safetensors", {"x": tensor})["x"]
    assert back.stride() == tensor.clone().stride()
    assert torch.equal(back, tensor)


def test_numbers_that_json_does_not_know_come_back(tmp_path: Path) -> None:
    value = [math.inf, -math.inf, 5e-324, 0.1 + 0.2, -0.0]
    back = through_file(tmp_path / "n.safetensors", value)
    assert [x.hex() for x in back] == [x.hex() for x in value]
    assert math.isnan(through_file(tmp_path / "n.safetensors", {"x": math.nan})["x"])


def test_a_tensor_held_twice_or_shared_comes_back_twice(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    back = through_file(tmp_path / "t.safetensors", {"a": base, "b": base, "part": base[1:]})
    assert same(back, {"a": base, "b": base, "part": base[1:]})


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "RMSprop", "Adam"])
def test_a_loaded_optimizer_goes_on_as_the_saved_one(tmp_path: Path, kind: str) -> None:
    def step(optimizer: torch.optim.Optimizer, w: Tensor, seed: int) -> None:
        w.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    extra = {"momentum": 0.9} if kind in ("SGD", "RMSprop") else {}
    w = torch.nn.Parameter(torch.ones(5))
    optimizer = getattr(torch.optim, kind)([w], lr=0.1, **extra)
    for seed in range(3):
        step(optimizer, w, seed)
    copy = torch.nn.Parameter(w.detach().clone())
    other = getattr(torch.optim, kind)([copy], lr=0.5)
    other.load_state_dict(through_file(tmp_path / "o.safetensors", optimizer.state_dict()))
    step(optimizer, w, 3)
    step(other, copy, 3)
    assert torch.equal(w, copy)


@pytest.mark.parametrize(
    ("value", "name"),
    [({1, 2}, "set"), (b"x", "bytes"), (object(), "object"), (1j, "complex"), (len, "builtin")],
)
def test_what_cannot_be_kept_is_refused_and_the_old_file_stays(
    tmp_path: Path, value: Any, name: str
) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"kept": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(TypeError, match=f"a checkpoint cannot hold {name}"):
        save_checkpoint(path, {"tensor": torch.zeros(2), "deep": [({"x": value},)]})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [{1.5: 0}, {None: 0}, {(1, 2): 0}, {True: 0}, {1: 0, "1": 0}])
def test_keys_that_would_come_back_as_text_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="a checkpoint cannot hold"):
        save_checkpoint(tmp_path / "c.safetensors", value)


@pytest.mark.parametrize("written", [0, 100])
def test_a_write_that_fails_half_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    def torn(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"\0" * written)
        raise OSError(28, "No space left on device")

    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"kept": torch.arange(3)})
    monkeypatch.setattr(safetensors.torch, "save_file", torn)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"lost": torch.zeros(100)})
    assert same(load_checkpoint(path), {"kept": torch.arange(3)})


def test_a_new_checkpoint_replaces_the_old_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "adamw-lr0.001-wd0.01-0.safetensors"
    save_checkpoint(path, {"epoch": 1})
    held = load_checkpoint(path)
    save_checkpoint(path, {"epoch": 2})
    assert (held, load_checkpoint(path)) == ({"epoch": 1}, {"epoch": 2})
    assert list(tmp_path.iterdir()) == [path]


def test_an_unpickler_is_never_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"w": torch.ones(2), "n": (1, [2.0])})
    for module, name in (("pickle", "load"), ("pickle", "loads"), ("torch", "load")):
        monkeypatch.setattr(f"{module}.{name}", refuse)
    assert same(load_checkpoint(path), {"w": torch.ones(2), "n": (1, [2.0])})
