"""Checkpoints of a trial: tensors in safetensors, all else in its JSON header; no pickle.

Written atomically, so that a process killed at any moment leaves the old one or the new one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

TENSOR = "__tensor__"
STRIDES = "__strides__"
"""Of a tensor that did not lie row by row: products of it round differently elsewhere in memory."""
TUPLE = "__tuple__"
INT_KEYS = "__int_keys__"
CHECKPOINT_SECONDS = 20.0
LEFT_SECONDS = 600.0
"""No checkpoint takes that long to write."""


class CheckpointError(OSError):
    """A checkpoint that cannot be written, on a full disk for one, or that is damaged."""


@final
class Workspace:
    """The files of one attempt at a trial, which may be stopped at any moment.

    Args:
        path: of the checkpoint, written by this attempt alone; None: nothing is kept.
        earlier: checkpoints of the attempts before it, the latest first.
        product: where to keep what later trials need; None: nowhere.
        given: the products of the trials that this one comes after, by name.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        earlier: Sequence[Path] = (),
        product: Path | None = None,
        given: Mapping[str, Path] | None = None,
    ) -> None:
        self.path, self.earlier, self.product = path, earlier, product
        self.given = given or {}
        self.on_row: Callable[[dict[str, Any]], None] | None = None
        self._saved_at = time.monotonic()

    @property
    def latest(self) -> Path | None:
        """The checkpoint to go on from; None if there is none."""
        files = [self.path, *self.earlier] if self.path is not None else []
        return next((file for file in files if file is not None and file.exists()), None)

    def load(self) -> Any:
        """The state that was last saved; None if none was.

        Raises:
            CheckpointError: if it cannot be read.
        """
        if self.latest is None:
            return None
        try:
            return load_checkpoint(self.latest)
        except Exception as error:
            raise self.damaged(error) from error

    def damaged(self, error: Exception) -> CheckpointError:
        """The refusal of a state that cannot be taken up."""
        return CheckpointError(
            f"{self.latest} is damaged: {error}. Nothing was changed; delete that file to begin "
            "its trial from the start."
        )

    def save(self, state: Callable[[], Any]) -> None:
        """Save what ``state()`` returns, if the last time is long enough ago."""
        now = time.monotonic()
        if self.path is not None and now - self._saved_at > CHECKPOINT_SECONDS:
            save_checkpoint(self.path, state())
            self._saved_at = now

    def clear(self) -> None:
        """Remove all checkpoints, and what killed attempts left half written: the trial is done."""
        for file in (self.path, *self.earlier) if self.path is not None else ():
            file.unlink(missing_ok=True)
            for left in file.parent.glob(f"{file.stem}.*.tmp"):
                with suppress(FileNotFoundError):  # its process is alive, and has finished it
                    if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                        left.unlink()

    def tell(self, row: dict[str, Any]) -> None:
        """Add a row to the record of the trial while it runs."""
        if self.on_row is not None:
            self.on_row(row)

    def keep(self, value: Any) -> None:
        """Keep what trials that come after this one need."""
        if self.product is not None:
            save_checkpoint(self.product, value)


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
        raise CheckpointError(
            f"cannot write {path}: {error}; what was trained is kept, repeat the command to go on."
        ) from error


def load_checkpoint(path: Path) -> Any:
    """Read what :func:`save_checkpoint` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        # Copies: Windows replaces no file that is mapped into memory.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return _unpack(json.loads(file.metadata()["value"]), tensors)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key, strides = str(len(tensors)), value.detach().clone().stride()
        tensors[key] = value.detach().clone(memory_format=torch.contiguous_format)
        moved = strides != tensors[key].stride()
        return {TENSOR: key, STRIDES: [*strides]} if moved else {TENSOR: key}
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
        tensor = tensors[value[TENSOR]]
        if STRIDES not in value:
            return tensor
        return torch.empty_strided(tensor.shape, value[STRIDES], dtype=tensor.dtype).copy_(tensor)
    if TUPLE in value:
        return tuple(_unpack(v, tensors) for v in value[TUPLE])
    if INT_KEYS in value:
        return {k: _unpack(v, tensors) for k, v in value[INT_KEYS]}
    return {k: _unpack(v, tensors) for k, v in value.items()}
