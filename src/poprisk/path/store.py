"""Rows of numbers that a recorded run keeps, in memory or in files, up to a size."""

from __future__ import annotations

from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from poprisk._validate import NotAnalysable
from poprisk.path.checks import check_memory
from poprisk.printing import described


@final
class Storage:
    """A limit in bytes that several tables of rows share.

    Args:
        max_memory: bytes that all rows together may take.
        directory: where to keep them as raw binary files, one a table; None: in memory.
    """

    def __init__(self, max_memory: float, directory: str | Path | None = None) -> None:
        self.max_memory = max_memory
        self.directory = None if directory is None else Path(directory)
        self.used = 0
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _unwritable(self.directory, error) from error

    def table(self, name: str) -> VectorTable:
        """An empty table."""
        return VectorTable(self, name)

    def take(self, size: int) -> None:
        """Count ``size`` more bytes.

        Raises:
            NotAnalysable: if that is over the limit.
        """
        where = "disk" if self.directory is not None else "memory"
        check_memory(
            self.used + size,
            self.max_memory,
            f"recording this run to {where}",
            "record fewer steps, every few steps (stride=8), to disk (directory=...), or raise "
            "max_memory=.",
        )
        self.used += size


@final
class VectorTable:
    """Rows of one length and dtype; appended, then read in any order."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage = storage
        self.rows: list[Tensor] = []
        self.count = 0
        self.dtype = torch.float64
        self.width = 0
        directory = storage.directory
        self.path = None if directory is None else directory / f"{name}.bin"
        self.written: tuple[int, int] | None = None
        if self.path is not None:
            self._write(self.path, b"", "wb")

    def __repr__(self) -> str:
        where = "memory" if self.path is None else str(self.path)
        return described("VectorTable", f"{self.count:,} rows of {self.width:,}", f"in {where}")

    def __len__(self) -> int:
        return self.count

    def append(self, row: Tensor) -> None:
        """Add a copy of a vector."""
        self.storage.take(row.numel() * row.element_size())
        self.dtype, self.width = row.dtype, row.numel()
        self.count += 1
        if self.path is None:
            self.rows.append(row.detach().cpu().clone())
            return
        self._check_kept()
        self._write(self.path, row.detach().cpu().contiguous().numpy().tobytes(), "ab")

    def __getitem__(self, k: int) -> Tensor:
        """Row ``k``, a new tensor where it comes from a file."""
        if self.path is None:
            return self.rows[k]
        self._check_kept()
        kind = torch.empty(0, dtype=self.dtype).numpy().dtype
        k = range(self.count)[k]
        offset = k * self.width * kind.itemsize
        file = np.memmap(self.path, dtype=kind, mode="r", offset=offset, shape=(self.width,))
        return torch.from_numpy(np.array(file))

    def _write(self, path: Path, content: bytes, mode: str) -> None:
        try:
            with path.open(mode) as file:
                file.write(content)
        except OSError as error:
            raise _unwritable(path, error) from error
        self.written = _state_of(path)

    def _check_kept(self) -> None:
        if self.path is None:
            return
        found = _state_of(self.path)
        if found is None or found != self.written:
            what = "is gone" if found is None else "was changed since"
            raise NotAnalysable(
                f"{self.path}, which holds a part of the recorded run, {what}; record again, each "
                "run into a directory of its own that is kept while the run is used."
            )


def _state_of(path: Path) -> tuple[int, int] | None:
    """Size of a file in bytes, and when it was last written, in ns; None if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _unwritable(path: Path, error: OSError) -> NotAnalysable:
    """The error for a file of a recorded run that cannot be written."""
    return NotAnalysable(
        f"{path} cannot be written: {error.strerror or error}; choose another directory=, or leave "
        "it out to record in memory."
    )
