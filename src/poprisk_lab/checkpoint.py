"""Checkpoints of a run: tensors in safetensors, all else in its JSON header; no pickle.

Written atomically, so that a process killed at any moment leaves the old one or the new one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSOR = "__tensor__"
TUPLE = "__tuple__"
INT_KEYS = "__int_keys__"


class CheckpointError(OSError):
    """A checkpoint that cannot be written, on a full disk for one; the old one is kept."""


def save_checkpoint(path: Path, value: Any) -> None:
    """Write nested dicts, lists, tuples, tensors, numbers, strings and None to one file.

    Raises:
        CheckpointError: if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    header = json.dumps(_pack(value, tensors))
    for left in path.parent.glob(f"{path.stem}.*.tmp"):  # by a process that was killed
        left.unlink(missing_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"value": header})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from error


def load_checkpoint(path: Path) -> Any:
    """Read what :func:`save_checkpoint` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        # Copies: Windows replaces no file that is mapped into memory.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return _unpack(json.loads(file.metadata()["value"]), tensors)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().clone(memory_format=torch.contiguous_format)
        return {TENSOR: key}
    if isinstance(value, dict):
        keys = {type(k) for k in value}
        if keys == {int}:
            return {INT_KEYS: [[k, _pack(v, tensors)] for k, v in value.items()]}
        if not keys <= {str}:
            raise TypeError(f"a checkpoint cannot hold these keys: {[*value]}.")
        return {k: _pack(v, tensors) for k, v in value.items()}
    if isinstance(value, tuple):
        return {TUPLE: [_pack(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_pack(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}.")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if TUPLE in value:
        return tuple(_unpack(v, tensors) for v in value[TUPLE])
    if INT_KEYS in value:
        return {k: _unpack(v, tensors) for k, v in value[INT_KEYS]}
    return {k: _unpack(v, tensors) for k, v in value.items()}
