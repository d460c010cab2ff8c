"""IDX files: read back as they were written, or refused with what is wrong."""

from __future__ import annotations

import gzip
import runpy
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poprisk_lab.tasks.idx import read_idx, read_mnist

SCRIPT = Path(__file__).parents[1] / "docs" / "how-to" / "forward_forward_mnist.py"


def idx(array: Any, code: int) -> bytes:
    head = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def write_mnist(
    directory: Path, *, rows: int = 40, zipped: bool = False, dot: bool = False
) -> None:
    rng = np.random.default_rng(0)
    for prefix, count in (("train", rows), ("t10k", rows // 2)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 256, (count, 4, 3)).astype(np.uint8)
        for part, array in (("images-idx3", images), ("labels-idx1", labels)):
            name = f"{prefix}-{part}-ubyte".replace("-idx", ".idx" if dot else "-idx")
            content = idx(array, 0x08)
            path = directory / (name + ".gz" * zipped)
            path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize(
    ("dtype", "code"),
    [("u1", 8), ("i1", 9), (">i2", 0x0B), (">i4", 0x0C), (">f4", 0x0D), (">f8", 0x0E)],
)
def test_every_type_comes_back(tmp_path: Path, dtype: str, code: int) -> None:
    array = np.arange(-6 if "u" not in dtype else 0, 18 if "u" not in dtype else 24).astype(dtype)
    array = array.reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array, code))
    found = read_idx(tmp_path / "a")
    assert found.dtype == torch.from_numpy(array.astype(dtype.strip(">"))).dtype
    assert found.tolist() == array.tolist()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dot", [False, True])
def test_the_four_files(tmp_path: Path, zipped: bool, dot: bool) -> None:
    write_mnist(tmp_path, zipped=zipped, dot=dot)
    found = read_mnist(tmp_path)
    x, y = found["train"]
    assert (x.shape, x.dtype, y.dtype) == ((40, 12), torch.float32, torch.int64)
    assert y[:11].tolist() == [*range(10), 0]
    raw = np.random.default_rng(0).integers(0, 256, (40, 4, 3)).reshape(40, 12)
    torch.testing.assert_close(x, torch.tensor(raw).float() / 255)
    assert len(found["test"][0]) == 20


def test_what_is_no_idx_file_is_refused(tmp_path: Path) -> None:
    content = idx(np.zeros((3, 2), np.uint8), 8)
    (tmp_path / "html").write_bytes(b"<html>")
    (tmp_path / "short").write_bytes(content[:-1])
    (tmp_path / "long").write_bytes(content + b"a")
    (tmp_path / "cut").write_bytes(content[:7])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("html", "empty"):
        with pytest.raises(ValueError, match="is no IDX file"):
            read_idx(tmp_path / name)
    for name in ("short", "long", "cut"):
        with pytest.raises(ValueError, match="download it again"):
            read_idx(tmp_path / name)


def test_missing_files_and_pairs_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no train-images-idx3-ubyte in"):
        read_mnist(tmp_path)
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(7, np.uint8), 8))
    with pytest.raises(ValueError, match="the test set must have pictures"):
        read_mnist(tmp_path)


@pytest.mark.parametrize("rule", ["forward-forward", "mono-forward", "backpropagation"])
def test_the_script_trains_on_files(
    tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mnist(tmp_path, rows=100)
    said = [
        "--rule",
        rule,
        "--hidden",
        "8",
        "8",
        "--epochs",
        "2",
        "--batch",
        "32",
        "--noise",
        "0.2",
        "--gate",
    ]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), *said])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1", "epoch 2"]
    assert all("test error" in line for line in lines)
