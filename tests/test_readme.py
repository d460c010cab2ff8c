"""Every snippet of the README is run as written, top to bottom, in one folder."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from skimage import io
from sklearn.datasets import load_wine

from poprisk_lab.studies import CLAIMS

ROOT = Path(__file__).parents[1]

readme_figures: Any = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "readme_figures.py")))
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [
    line.split("#")[0].strip()
    for language, code in BLOCKS
    if language == "sh"
    for line in code.splitlines()
]
CLAIM_WORDS = {
    "grokking": "grokking",
    "grokking-multistep": "two-step task",
    "pinn": "differential equation",
    "image": "picture",
    "benign-overfitting": "benign overfitting",
    "double-descent": "double descent",
    "implicit-bias": "implicit bias",
    "drift-diffusion": "drift and diffusion",
    "coupling": "coupling",
    "feature-learning": "feature learning",
    "memorization": "memorization",
}
COMMANDS = [line for line in SHELL if line.startswith("poprisk ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the snippets name, and the snippets that are files."""
    path = tmp_path_factory.mktemp("readme")
    x, y = load_wine(return_X_y=True)
    header = ",".join([*(f"x{i}" for i in range(x.shape[1])), "class"])
    np.savetxt(path / "wine.csv", np.column_stack([x, y]), delimiter=",", header=header)
    random = np.random.default_rng(0)
    for name, brightness in (("dark", 60), ("light", 180)):
        (path / "shapes" / name).mkdir(parents=True)
        for i in range(30):
            image = random.integers(brightness - 40, brightness + 40, (8, 8, 3), dtype=np.uint8)
            io.imsave(path / "shapes" / name / f"{i}.png", image, check_contrast=False)
    for code in PYTHON:
        named = re.match(r"# (\w+\.py)\n", code)
        if named:
            (path / named[1]).write_text(code, encoding="utf-8")
    return path


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_snippet_runs(code: str, folder: Path) -> None:
    run([sys.executable, "-W", "error", "-c", code], folder)


@pytest.mark.slow
def test_commands_run_in_their_order(folder: Path) -> None:
    program = [sys.executable, "-m", "poprisk_lab"]
    for command in COMMANDS:
        output = run([*program, *shlex.split(command)[1:]], folder)
        if any(word in command for word in ("compare", "explain", "report")):
            assert "Report: runs/" in output
            assert (folder / output.split("Report: ")[1].strip()).exists()


def test_the_two_commands_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = [line.split()[1] for line in SHELL if line.startswith("make ")]
    assert wanted == ["run", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in wanted)


def test_its_figures_are_those_on_record() -> None:
    """docs/readme_figures.py makes them from the records; what it lists is stale."""
    assert readme_figures.stale(README) == []


def test_a_stale_figure_would_be_found() -> None:
    pieces = readme_figures.pieces()
    assert len(pieces) > 20
    for piece in pieces:
        number = re.findall(r"\d+\.?\d*(?=[^\d]*$)", piece)[0]
        other = README.replace(number, "123456")
        assert piece in readme_figures.stale(other)


def test_its_verdicts_are_those_on_record() -> None:
    said = re.search(r"^On record: (.*?)\n\n", README, flags=re.DOTALL | re.MULTILINE)
    assert said is not None
    reproduced, partly, not_at_all = re.split(r"\*reproduced\*;|\*partly\*;", said[1])
    told = {"reproduced": reproduced, "partly reproduced": partly, "not reproduced": not_at_all}
    assert set(CLAIM_WORDS) == set(CLAIMS)
    for claim, verdict in readme_figures.verdicts().items():
        for kind, text in told.items():
            sentence = " ".join(text.split()).partition(".")[0]
            assert (CLAIM_WORDS[claim] in sentence) == (kind == verdict), (claim, verdict)


def test_the_files_it_links_to_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def run(command: list[str], folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
