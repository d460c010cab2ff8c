"""The order of imports: a module of poprisk imports only modules before it in the chain."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

CHAIN: Sequence[str] = (
    "checks printing intervals randomness sharding holders evaluation forward_mode factors kernel "
    "path channel drift risk gate variance settings within update stats fused state replay buckets "
    "dataparallel optimizer behaviour gated controls monitor integrations tasks arms checkpoint "
    "training records rundir comparison compare convergence wording verdict selection explain "
    "reproduce report display bench cli"
).split()

# What a module outside the chain may import; no module imports one of these.
OUTSIDE: dict[str, Sequence[str]] = {
    "__init__": CHAIN,
    "__main__": CHAIN,
    "reference": ["reference"],
}

EXTRAS = (
    "typer rich plotly jinja2 sklearn skimage scipy safetensors pytorch_optimizer "
    "transformers trl accelerate datasets lightning jaxtyping beartype hypothesis pytest "
    "deepxde nngeometry curvlinops backpack opacus"
).split()


def imported_modules(file: Path, root: Path) -> Iterator[str]:
    """Yield the absolute name of all that a file imports, wherever in the file it does so."""
    package = [root.name, *file.relative_to(root).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            if node.module:
                base = [*base, node.module]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def violations(root: Path) -> list[str]:
    """Return one line for each import under the package at ``root`` that breaks the order."""
    found = []
    for file in sorted(root.rglob("*.py")):
        where = file.relative_to(root)
        module = where.parts[0].removesuffix(".py")
        if module not in CHAIN and module not in OUTSIDE:
            found.append(f"{where} is not in the chain")
            continue
        allowed = CHAIN[: CHAIN.index(module) + 1] if module in CHAIN else OUTSIDE[module]
        for name in imported_modules(file, root):
            top, *rest = name.split(".")
            if top == root.name and (rest[:1] or [""])[0] not in allowed:
                found.append(f"{where} imports {name}")
    return found


def test_the_library_follows_the_chain() -> None:
    assert violations(SRC / "poprisk") == []


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("gate.py", "from poprisk.checks import positive", []),
        ("gate.py", "from . import checks, kernel\nimport torch, poprisk.risk", []),
        ("tasks/digits.py", "from .image import load\nfrom ..gate import soft", []),
        ("tasks/__init__.py", "from . import digits\nfrom .digits import load", []),
        ("__init__.py", "from .gate import soft\nfrom poprisk.optimizer import PopRiskAdamW", []),
        ("gate.py", "from .optimizer import PopRiskAdamW", ["poprisk.optimizer.PopRiskAdamW"]),
        ("gate.py", "from . import optimizer", ["poprisk.optimizer"]),
        ("gate.py", "import poprisk.optimizer as o", ["poprisk.optimizer"]),
        ("gate.py", "def f():\n    from poprisk import cli", ["poprisk.cli"]),
        ("gate.py", "import poprisk", ["poprisk"]),
        ("gate.py", "from poprisk import PopRiskAdamW", ["poprisk.PopRiskAdamW"]),
        ("gate.py", "from .reference import soft", ["poprisk.reference.soft"]),
        ("__init__.py", "from . import reference", ["poprisk.reference"]),
        ("reference/optimizer.py", "from ..gate import soft", ["poprisk.gate.soft"]),
        ("tasks/digits.py", "from ..compare import run", ["poprisk.compare.run"]),
        ("tasks/__init__.py", "from ..report.page import Page", ["poprisk.report.page.Page"]),
    ],
)
def test_the_checker_resolves_every_form_of_import(
    tmp_path: Path, file: str, code: str, expected: list[str]
) -> None:
    path = tmp_path / "poprisk" / file
    path.parent.mkdir(parents=True)
    path.write_text(code, encoding="utf-8")
    found = violations(tmp_path / "poprisk")
    assert found == [f"{Path(file)} imports {name}" for name in expected]


@pytest.mark.parametrize("file", ["utils.py", "helpers/text.py"])
def test_the_checker_reports_a_module_outside_the_chain(tmp_path: Path, file: str) -> None:
    path = tmp_path / "poprisk" / file
    path.parent.mkdir(parents=True)
    path.write_text("", encoding="utf-8")
    assert violations(tmp_path / "poprisk") == [f"{Path(file)} is not in the chain"]


def test_importing_poprisk_imports_no_extra() -> None:
    code = "import poprisk, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=SRC,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(EXTRAS) & set(done.stdout.split()) == set()
