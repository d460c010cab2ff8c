"""The order of imports: a module of poprisk imports only modules before it in the chain."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import poprisk
from poprisk import _moved
from processes import Call, at_once, run_code

SRC = Path(__file__).parents[1] / "src"

CHAINS: Mapping[str, Sequence[str]] = {
    "poprisk": (
        "_renamed _moved _validate printing protocols intervals randomness dtensor holders "
        "evaluation forward_mode uncut per_sample jacobian linalg spectrum ntk optim losses path "
        "attribution risk audit monitor integrations task"
    ).split(),
    "poprisk_lab": (
        "claims tasks controls arms checkpoint fit store results study work pool runner clusters "
        "comparison convergence pictures plots wording verdict selection advise explain influence "
        "audit studies page evidence display compared bench cli"
    ).split(),
}
"""The modules of each package; one imports only those before it."""

LIBRARY = "poprisk"

EXTRAS = (
    "typer rich plotly jinja2 sklearn skimage scipy safetensors pandas polars PIL "
    "pytorch_optimizer cleanlab mnist1d "
    "transformers trl accelerate datasets lightning jaxtyping beartype hypothesis pytest "
    "deepxde triton kronfluence trak bergson torchopt nngeometry curvlinops backpack opacus"
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
    found, chain = list[str](), CHAINS[root.name]
    for file in sorted(root.rglob("*.py")):
        where = file.relative_to(root)
        module = where.parts[0].removesuffix(".py")
        if module not in {*chain, "__init__", "__main__"}:
            found.append(f"{where} is not in the chain")
            continue
        allowed = chain[: chain.index(module) + 1] if module in chain else chain
        for name in imported_modules(file, root):
            top, *rest = name.split(".")
            own = top == root.name and (rest[:1] or [""])[0] not in allowed
            if own or (top in CHAINS and top not in {root.name, LIBRARY}):
                found.append(f"{where} imports {name}")
    return found


@pytest.mark.parametrize("package", CHAINS)
def test_a_package_follows_its_chain(package: str) -> None:
    assert violations(SRC / package) == []


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("poprisk/risk/twin.py", "from poprisk.holders import lend", []),
        ("poprisk/risk/twin.py", "from .. import holders\nimport torch, poprisk.path", []),
        ("poprisk/task/trial.py", "from .batches import cut\nfrom ..risk import select", []),
        ("poprisk/__init__.py", "from .risk import select\nfrom poprisk.task import Task", []),
        ("poprisk_lab/fit.py", "import poprisk\nfrom poprisk.optim.gate import Gate", []),
        ("poprisk_lab/__main__.py", "from poprisk_lab.cli import main", []),
        ("poprisk/path/run.py", "from ..risk import select", ["poprisk.risk.select"]),
        ("poprisk/path/run.py", "from .. import risk", ["poprisk.risk"]),
        ("poprisk/path/run.py", "import poprisk.risk.twin as t", ["poprisk.risk.twin"]),
        ("poprisk/path/run.py", "def f():\n    from poprisk import task", ["poprisk.task"]),
        ("poprisk/path/run.py", "import poprisk", ["poprisk"]),
        ("poprisk/path/run.py", "from poprisk import record", ["poprisk.record"]),
        ("poprisk/path/run.py", "from poprisk_lab import arms", ["poprisk_lab.arms"]),
        ("poprisk/__init__.py", "import poprisk_lab", ["poprisk_lab"]),
        ("poprisk_lab/tasks/digits.py", "from ..cli import main", ["poprisk_lab.cli.main"]),
    ],
)
def test_the_checker_resolves_every_form_of_import(
    tmp_path: Path, file: str, code: str, expected: list[str]
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code, encoding="utf-8")
    package, _, where = file.partition("/")
    found = violations(tmp_path / package)
    assert found == [f"{Path(where)} imports {name}" for name in expected]


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


def test_the_library_runs_the_command_of_the_laboratory(tmp_path: Path) -> None:
    """As ``python -m poprisk --help``."""
    code = (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        "runpy.run_module('poprisk', run_name='__main__')"
    )
    (done,) = at_once(Call(run_code, (code, tmp_path, False)))
    assert done.code == 0, done.stderr
    assert "compare" in done.stdout


@pytest.mark.parametrize("old", list(_moved.MOVED))
def test_a_module_is_found_by_its_name_of_the_last_release(old: str) -> None:
    new = importlib.import_module(_moved.MOVED[old])
    sys.modules.pop(f"poprisk.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"poprisk.{old} is {new.__name__} now"):
        found = importlib.import_module(f"poprisk.{old}")
    assert found is new
    assert new.__spec__ is not None
    assert new.__spec__.name == new.__name__


def test_gated_stays_the_function() -> None:
    module = importlib.import_module("poprisk.gated")
    assert poprisk.gated is module.gated
