"""What the README and the pages of docs/ show is run as written, page by page, each in a folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from skimage import io
from sklearn.datasets import load_wine
from typer.testing import CliRunner

from poprisk_lab.cli import app
from processes import Call, at_once, run_code

ROOT = Path(__file__).parents[1]
SHOWN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- needs: ([\w, ]+) -->\n)?^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE
)
NUMBER = re.compile(r"[+-]\d+\.\d+")
SHARE = re.compile(r"\d+\.\d+(?=%)")


class Block(NamedTuple):
    """A block of code of a page.

    Attributes:
        page: its file.
        number: among the blocks of the page.
        needs: packages beyond those of `make test`.
        language: after the backticks.
        code: as it stands there.
        prints: what the page says that it prints, in a block of text after it.
    """

    page: Path
    number: int
    needs: tuple[str, ...]
    language: str
    code: str
    prints: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.number}"

    @property
    def file(self) -> str | None:
        """The file that the block is, by its first line."""
        found = re.match(r"# (\w+\.py)\n", self.code)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    after = [*found, ("", "", "")][1:]
    return [
        Block(
            page,
            i,
            tuple(re.findall(r"\w+", needs)),
            language,
            code,
            then if kind == "text" else None,
        )
        for i, ((needs, language, code), (_, kind, then)) in enumerate(
            zip(found, after, strict=True)
        )
    ]


def commands(page: Path) -> list[str]:
    """The commands of a page, without comments."""
    lines = [line for b in blocks(page) if b.language == "sh" for line in b.code.splitlines()]
    return [line.split("#")[0].strip() for line in lines]


PROGRAMS = ("poprisk ", "python ", "torchrun ")


def of_a_command(block: Block) -> bool:
    """Whether a page starts the block after others, or on several processes: not alone."""
    starts = ("python ", "torchrun ")
    return any(c.startswith(starts) and c.endswith(f" {block.file}") for c in commands(block.page))


BLOCKS = [block for page in SHOWN for block in blocks(page)]
PYTHON = [b for b in BLOCKS if b.language == "python" and not of_a_command(b)]
RUN = {page: [c for c in commands(page) if c.startswith(PROGRAMS)] for page in SHOWN}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the data that the pages name."""
    x, y = load_wine(return_X_y=True)
    header = ",".join([*(f"x{i}" for i in range(x.shape[1])), "class"])
    np.savetxt(tmp_path / "wine.csv", np.column_stack([x, y]), delimiter=",", header=header)
    random = np.random.default_rng(0)
    for name, brightness in (("dark", 60), ("light", 180)):
        (tmp_path / "shapes" / name).mkdir(parents=True)
        for i in range(30):
            image = random.integers(brightness - 40, brightness + 40, (8, 8, 3), dtype=np.uint8)
            io.imsave(tmp_path / "shapes" / name / f"{i}.png", image, check_contrast=False)
    return tmp_path


def output(code: str, folder: Path, *, warnings_are_errors: bool) -> str:
    """What a program prints that is run in a folder."""
    (done,) = at_once(Call(run_code, (code, folder, warnings_are_errors)))
    assert done.code == 0, done.stderr
    return done.stdout


def shown(page: Path, value: Any, name: str) -> Any:
    """A parameter; those of pages other than the README are run by `make test-pages`."""
    return pytest.param(value, id=name, marks=() if page == SHOWN[0] else pytest.mark.pages)


@pytest.mark.slow
@pytest.mark.parametrize("block", [shown(b.page, b, b.name) for b in PYTHON if not b.needs])
def test_code_runs_without_a_warning(block: Block, folder: Path) -> None:
    printed = output(block.code, folder, warnings_are_errors=True)
    if block.prints is not None:
        assert NUMBER.sub("#", printed) == NUMBER.sub("#", block.prints)
        said, found = (list(map(float, NUMBER.findall(t))) for t in (block.prints, printed))
        assert found == pytest.approx(said, abs=0.03)


@pytest.mark.slow
@pytest.mark.extras
@pytest.mark.parametrize("block", [b for b in PYTHON if b.needs], ids=lambda b: b.name)
def test_code_with_an_extra_runs(block: Block, folder: Path) -> None:
    for package in block.needs:
        pytest.importorskip(package)
    output(block.code, folder, warnings_are_errors=False)


SHORT = {"compare": ["--epochs", "2"]}
"""What makes a long command short; ``make test-pages`` runs those of the README as shown, too."""


def as_shown(page: Path) -> list[Any]:
    """Parameters: the page and what is added to its commands."""
    name = str(page.relative_to(ROOT))
    whole = pytest.param(page, {}, id=name, marks=pytest.mark.pages)
    return [whole, pytest.param(page, SHORT, id=f"{name}, short")] if page == SHOWN[0] else [whole]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "more"), [p for page, lines in RUN.items() if lines for p in as_shown(page)]
)
def test_commands_run_in_their_order(
    page: Path, more: dict[str, list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.code, encoding="utf-8")
    for command in RUN[page]:
        program, *arguments = shlex.split(command)
        if program == "torchrun":
            subprocess.run([sys.executable, "-m", "torch.distributed.run", *arguments], check=True)
            continue
        if program == "python":
            code = (folder / arguments[0]).read_text(encoding="utf-8")
            printed = output(code, folder, warnings_are_errors=True)
            there = (b for b in blocks(page) if b.language == "sh" and command in b.code)
            prints = next(there).prints or ""
            # Shares in percent, which another processor's roundings may move a little.
            assert SHARE.sub("#", printed) == SHARE.sub("#", prints)
            said, found = (SHARE.findall(text) for text in (prints, printed))
            assert [*map(float, found)] == pytest.approx([*map(float, said)], abs=2.5)
            continue
        result = CliRunner().invoke(app, [*arguments, *more.get(arguments[0], [])])
        assert result.exit_code == 0, result.output
        if "--shard" in arguments and "left for other processes" in result.stdout:
            continue
        if arguments[0] in ("compare", "explain", "report"):
            assert "Report: runs/" in result.stdout
            assert (folder / result.stdout.split("Report: ")[1].strip()).exists()


def test_what_is_shown_was_found() -> None:
    """A fence that the pattern misses would be a block that nobody runs."""
    fences = [line for p in SHOWN for line in p.read_text(encoding="utf-8").splitlines()]
    assert sum(line.strip() == "```python" for line in fences) == len(
        [b for b in BLOCKS if b.language == "python"]
    )
    assert sum(bool(b.needs) for b in PYTHON) >= 4
    assert {p.name for p, lines in RUN.items() if lines} >= {"README.md", "distributed.md"}


@pytest.mark.parametrize("page", SHOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_command_shown_exists(page: Path) -> None:
    """In the text, too: `poprisk NAME` is a command."""
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    known |= {g.name for g in app.registered_groups if g.name}
    said = set(re.findall(r"`poprisk ([a-z]+)", page.read_text(encoding="utf-8")))
    assert said <= known
