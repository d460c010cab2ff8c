"""The tests notice plausible bugs: each is put into a copy of the library, and a test goes red."""

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
        "optimizer.py", "if not all_finite(grads):", "if False:", NOT_FINITE
    ),
    "NaN enters the state of a wrapper": Mutation(
        "gated.py", "if not all_finite(grads):", "if False:", NOT_FINITE_GATED
    ),
}


def copy_of_the_package(root: Path) -> Path:
    target = root / "poprisk"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def run_tests(root: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """Run tests against the package at ``root``."""
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:hypothesispytest"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", *plugins, *tests],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_turns_a_test_red(name: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    file = copy_of_the_package(tmp_path) / mutation.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    done = run_tests(tmp_path, [mutation.test])
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "FAILED" in done.stdout


@pytest.mark.slow
def test_without_mutation_the_same_tests_are_green(tmp_path: Path) -> None:
    copy_of_the_package(tmp_path)
    done = run_tests(tmp_path, sorted({mutation.test for mutation in MUTATIONS.values()}))
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
