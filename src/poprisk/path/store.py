"""Rows of numbers that a recorded run keeps, in memory or in files, within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from poprisk.path import checks as refuse
from poprisk.printing import described


@final
class Storage:
    """A budget in bytes that several tables of rows share.

    Args:
        budget: bytes that all rows together may take.
        directory: where to keep them as raw binary files, one a table; None: in memory.
    """

    def __init__(self, budget: float, directory: str | Path | None = None) -> None:
        self.budget = budget
        self.directory = None if directory is None else Path(directory)
        self.used = 0
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                refuse.check_written(self.directory, error)

    def table(self, name: str) -> Table:
        """An empty table."""
        return Table(self, name)

    def take(self, size: int) -> None:
        """Count ``size`` more bytes.

        Raises:
            NotAnalysable: if that is over the budget.
        """
        where = "disk" if self.directory is not None else "memory"
        refuse.check_budget(
            self.used + size,
            self.budget,
            f"recording this run to {where}",
            "record fewer steps, every few steps (stride=8), to disk (directory=...), or raise "
            "budget=.",
        )
        self.used += size


@final
class Table:
    """Rows of one length and dtype; appended, then read in any order."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage = storage
        self.rows: list[Tensor] = []
        self.count = 0
        self.dtype = torch.float64
        self.width = 0
        directory = storage.directory
        self.path = None if directory is None else directory / f"{name}.bin"
        self.written: refuse.FileState | None = None
        if self.path is not None:
            self._write(self.path, b"", "wb")

    def __repr__(self) -> str:
        where = "memory" if self.path is None else str(self.path)
        return described("Table", f"{self.count:,} rows of {self.width:,}", f"in {where}")

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
            refuse.check_written(path, error)
        self.written = refuse.file_state(path)

    def _check_kept(self) -> None:
        if self.path is not None:
            refuse.check_kept(self.path, self.written)
