"""The tests notice plausible bugs: each is put into a copy of the library, and a test goes red."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mutations import Mutation

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "src" / "poprisk"

NO_MUTATION = "no mutation"
PARTS = (
    "optimizer",
    "fused",
    "factors",
    "kernel",
    "path",
    "risk",
    "fields",
    "interpolation",
    "claims_paths",
    "grokking",
)
MUTATIONS: dict[str, Mutation] = {
    f"{part}: {name}": mutation
    for part in PARTS
    for name, mutation in importlib.import_module(f"mutations.{part}").MUTATIONS.items()
}


def mutated_package(root: Path, mutation: Mutation | None) -> None:
    """Copy the package to ``root`` with one text replaced."""
    shutil.copytree(PACKAGE, root / "poprisk", ignore=shutil.ignore_patterns("__pycache__"))
    if mutation is not None:
        file = root / "poprisk" / mutation.file
        text = file.read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, f"{mutation} does not fit {text}"
        file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def exit_code(root: Path, tests: list[str]) -> int:
    """Run tests against the package at ``root`` in a fork, which has torch imported already."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(os.open(root / "output.txt", os.O_WRONLY | os.O_CREAT), 1)
            sys.path.insert(0, str(root))
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_all(root: Path) -> dict[str, int]:
    """The exit code of pytest on each of the packages that :func:`mutated_package` made."""
    importlib.import_module("torch._dynamo")  # once, not in every fork
    every_test = sorted({mutation.test for mutation in MUTATIONS.values()})
    codes = {name: exit_code(root / name, [m.test]) for name, m in MUTATIONS.items()}
    return {**codes, NO_MUTATION: exit_code(root / NO_MUTATION, every_test)}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the interpreter")
def test_each_mutation_turns_its_test_red_and_none_leaves_all_green(tmp_path: Path) -> None:
    for name in (*MUTATIONS, NO_MUTATION):
        mutated_package(tmp_path / name, MUTATIONS.get(name))
    done = subprocess.run(
        [sys.executable, __file__, tmp_path],
        cwd=TESTS,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    expected = {**dict.fromkeys(MUTATIONS, pytest.ExitCode.TESTS_FAILED), NO_MUTATION: 0}
    assert json.loads(done.stdout) == expected


if __name__ == "__main__":
    print(json.dumps(run_all(Path(sys.argv[1]))))
