"""The tests notice plausible bugs: each is put into a copy of the library, and a test goes red."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forked import copy_packages, exit_code, prepare
from mutations import Mutation

PARTS = (
    "optimizer",
    "exempt",
    "advise",
    "fused",
    "triton",
    "factors",
    "kernel",
    "path",
    "cut",
    "attribution",
    "risk",
    "monitor",
    "left_out",
    "lockstep",
    "audit",
    "fields",
    "interpolation",
    "claims_paths",
    "grokking",
    "clusters",
    "soap",
    "ranks",
)


def mutations_of(part: str) -> dict[str, Mutation]:
    found: dict[str, Mutation] = importlib.import_module(f"mutations.{part}").MUTATIONS
    return found


def outcome(root: Path, mutation: Mutation) -> int | None:
    """The exit code of the mutation's test on a copy of the packages with its text replaced."""
    copy_packages(root)
    file = root / mutation.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    return exit_code(root, [mutation.test])


def outcomes(part: str, root: Path) -> dict[str, int | None]:
    prepare()
    return {
        name: outcome(root / str(number), mutation)
        for number, (name, mutation) in enumerate(mutations_of(part).items())
    }


@pytest.mark.parametrize("part", PARTS)
def test_each_mutation_fits_the_code(part: str) -> None:
    root = Path(__file__).parent
    for name, mutation in mutations_of(part).items():
        text = (root.parent / "src" / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, f"{name!r} does not fit {mutation.file}"
        file, _, test = mutation.test.partition("::")
        tests = (root / file).read_text(encoding="utf-8")
        assert not test or f"def {test.partition('[')[0]}(" in tests, f"{name!r} has no test"


@pytest.mark.slow
@pytest.mark.mutations
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the interpreter")
@pytest.mark.parametrize("part", PARTS)
def test_each_mutation_turns_its_test_red(part: str, tmp_path: Path) -> None:
    if part == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton and TRITON_INTERPRET=1, as make test-extras sets it")
    done = subprocess.run(
        [sys.executable, __file__, part, tmp_path],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    expected = dict.fromkeys(mutations_of(part), int(pytest.ExitCode.TESTS_FAILED))
    assert json.loads(done.stdout) == expected


if __name__ == "__main__":
    print(json.dumps(outcomes(sys.argv[1], Path(sys.argv[2]))))
