"""The tests notice plausible bugs: each is put into a copy of the library, and a test goes red."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "src" / "poprisk"

REFERENCE = "test_optimizer.py::test_equals_the_reference_with_other_settings"
SIZES = "test_gate.py::test_alpha_auto_in_the_optimizer"
THRESHOLDS = "test_optimizer.py::test_equals_the_reference_with_every_threshold"
PATHS = "test_optimizer.py::test_foreach_is_the_loop_for_all_layouts_at_once"
DECAY = "test_optimizer.py::test_weight_decay_is_not_gated"
NOT_FINITE = "test_optimizer_state.py::test_a_gradient_that_is_not_finite_changes_nothing"
NOT_FINITE_GATED = "test_gated.py::test_a_gradient_that_is_not_finite_changes_nothing"


NO_MUTATION = "no mutation"


class Mutation(NamedTuple):
    """A text that occurs once in a file, what replaces it, and the test that must notice."""

    file: str
    old: str
    new: str
    test: str


MUTATIONS = {
    "mean used after its update": Mutation(
        "update.py",
        "estimator.observe_(s, g, m, clock)",
        "estimator.observe_(s, g, [x.lerp(y, 1 - clock.beta1) for x, y in zip(m, g)], clock)",
        REFERENCE,
    ),
    "no bias correction of the variance": Mutation(
        "variance.py",
        "return variances, 1 / (1 - self.rho**clock.observations)",
        "return variances, 1.0",
        REFERENCE,
    ),
    "no bias correction of the mean in the gate": Mutation(
        "variance.py", "return 1 / (1 - self.beta1**self.t)", "return 1.0", REFERENCE
    ),
    "no bias correction of the mean in the step": Mutation(
        "update.py", "-(settings.lr / (1 - clock.beta1**clock.t))", "-settings.lr", REFERENCE
    ),
    "variance divided by b-1 again": Mutation(
        "gate.py",
        "return z * z * (noise_ratio + finite) / inflation",
        "return z * z * (noise_ratio + finite) / inflation / ((batch_size or 2) - 1)",
        SIZES,
    ),
    "gated weight decay": Mutation(
        "update.py",
        "            torch._foreach_mul_(q, m)\n",
        "            decay = settings.lr * settings.weight_decay\n"
        "            torch._foreach_mul_(w, [(1 - decay * x) / (1 - decay) for x in q])\n"
        "            torch._foreach_mul_(q, m)\n",
        DECAY,
    ),
    "threshold ignored": Mutation("gate.py", "alpha=self.alpha,", "alpha=1.0,", THRESHOLDS),
    "foreach leaves the end of large tensors out": Mutation(
        "update.py",
        "for piece in _pieces(slots.subset([i])):",
        "for piece in _pieces(slots.subset([i]))[:1]:",
        PATHS,
    ),
    "foreach leaves the last block out": Mutation(
        "update.py", "    if block:\n", "    if len(block) > 99:\n", PATHS
    ),
    "NaN enters the state": Mutation(
        "optimizer.py",
        "self._count_skip())\n            return loss\n",
        "self._count_skip())\n",
        NOT_FINITE,
    ),
    "NaN enters the state of a wrapper": Mutation(
        "gated.py",
        "self.skipped_steps)\n            return loss\n",
        "self.skipped_steps)\n",
        NOT_FINITE_GATED,
    ),
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
