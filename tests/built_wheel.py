"""The wheel: what it holds, and that it works where only it is installed. `make test-wheel`.

Not among the tests of `make test`: it builds, and installs torch into an empty environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from poprisk_lab.studies import CLAIMS

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
LARGEST = 1_000_000
"""Bytes of a wheel."""
DATA = {
    "poprisk/py.typed",
    "poprisk/optim/fused/kernel.cpp",
    "poprisk/optim/fused/wrapped.hpp",
    "poprisk_lab/py.typed",
    "poprisk_lab/page/audit.js",
    "poprisk_lab/page/page.css",
    "poprisk_lab/page/plotly-basic.min.js.xz",
}
"""What must be there beside modules and templates."""

TASK = """\
import torch
from poprisk import Task
from torch.nn.functional import cross_entropy

def points(seed=0):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(seed))
    y = (x[:, 0] > 0).long()
    return Task(
        name="points",
        description="points above and below a line",
        model=lambda: torch.nn.Linear(4, 2),
        loss=lambda outputs, targets: cross_entropy(outputs, targets, reduction="none"),
        train=(x[:40], y[:40]),
        test=(x[40:], y[40:]),
        epochs=2,
        batch_size=8,
    )
"""


def expected() -> set[str]:
    """The files that belong into the wheel: modules, templates and data, as in the checkout."""
    kinds = [file for end in ("py", "html.j2", "toml") for file in SRC.rglob(f"*.{end}")]
    return {file.relative_to(SRC).as_posix() for file in kinds} | DATA


def held(wheel: Path) -> set[str]:
    """The files of a wheel but for the metadata."""
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


def without_paths() -> dict[str, str]:
    """The environment without what would lead Python to the checkout, held to the tested pins."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    return {**kept, "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "COLUMNS": "200"}


def call(*command: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command as in a fresh shell."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=without_paths(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive, which is built from the checkout."""
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (archive,) = out.glob("*.tar.gz")
    (found,) = out.glob("*.whl")
    assert archive.name == f"{found.name.partition('-py3')[0]}.tar.gz"
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and what it requires, no more."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    found = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install(found, "torch")  # first and alone: nothing else then chooses another build of it
    install(found, str(wheel))
    return found


def install(python: Path, *requirements: str) -> None:
    """Install with nothing built from source."""
    options = ("--quiet", "--only-binary=:all:")
    call(python, "-m", "pip", "install", *options, *requirements, cwd=python.parent)


def test_the_wheel_holds_what_it_needs_and_nothing_else(wheel: Path) -> None:
    assert held(wheel) == expected()
    assert wheel.stat().st_size < LARGEST


def test_the_library_works_alone(python: Path, tmp_path: Path) -> None:
    call(python, "-I", ROOT / "tests" / "smoke_library.py", ROOT, cwd=tmp_path)
    command = python.with_name("poprisk")
    (line,) = call(command, "tasks", cwd=tmp_path, code=1).stderr.splitlines()
    assert line.startswith("poprisk: poprisk_lab needs typer, rich,")
    assert line.endswith(": pip install 'poprisk[lab]'")


def test_the_laboratory_works_with_its_extra(python: Path, wheel: Path, tmp_path: Path) -> None:
    install(python, f"poprisk[lab] @ {wheel.as_uri()}")
    command = python.with_name("poprisk")
    assert "reproduce" in call(command, "--help", cwd=tmp_path).stdout
    assert "digits-cnn" in call(command, "tasks", cwd=tmp_path).stdout
    task = tmp_path / "mine.py"
    task.write_text(TASK, encoding="utf-8")
    options = ("--seeds", "1", "--epochs", "1", "--workers", "1", "--out", "run")
    told = call(command, "compare", "mine.py:points", *options, cwd=tmp_path).stdout
    assert "one seed, so no interval and no verdict" in told
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "points above and below a line" in page
    assert "<style>" in page
    told = call(command, "reproduce", "all", "--summary", cwd=tmp_path).stdout
    assert told.count("not run yet") == len(CLAIMS)  # the records are kept with the source alone
