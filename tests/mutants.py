"""Mutation testing: faults made by cosmic-ray, and whether the tests that pin a file notice them.

    make mutants ARGS="gate.py update.py --sample 60"

cosmic-ray finds the places and makes the mutants; each is run here, in a fork that has torch loaded
already, until the first test goes red. A run can be stopped: it goes on where it was, unless the
file has changed. Mutants that change nothing by their nature are listed in :mod:`equivalents`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import difflib
import hashlib
import importlib
import json
import math
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from equivalents import EQUIVALENT
from forked import SRC, copy_packages, exit_code, prepare

TESTS = Path(__file__).parent
RESULTS = TESTS.parent / "benchmarks" / "results" / "mutants.json"

OPTIMIZER = ["test_optimizer.py", "test_optimizer_state.py", "test_captured.py"]
PINNED: dict[str, list[str]] = {
    "poprisk/optim/gate.py": ["test_gate.py", "test_optimizer.py", "test_captured.py"],
    "poprisk/optim/update.py": OPTIMIZER,
    "poprisk/optim/variance.py": [
        "test_variance.py",
        "test_grad_mean_var.py",
        "test_gate.py",
        "test_optimizer.py",
        "test_captured.py",
        "test_within.py",
        "test_optimizer_state.py",
    ],
    "poprisk/path/follow.py": ["test_follow.py", "test_channel.py", "test_path.py"],
    "poprisk/path/march.py": ["test_follow.py", "test_online.py", "test_path.py"],
    "poprisk/path/integrals.py": ["test_integrals.py", "test_path.py", "test_channel.py"],
    "poprisk/path/quadrature.py": ["test_quadrature.py", "test_path.py"],
    "poprisk/optim/step.py": [
        "test_rules.py",
        "test_recursion.py",
        "test_recorder.py",
        "test_path.py",
    ],
    "poprisk/path/recursion.py": [
        "test_recursion.py",
        "test_follow.py",
        "test_integrals.py",
        "test_path.py",
        "test_channel.py",
        "test_risk_loo.py",
    ],
    "poprisk/risk/local_losses.py": [
        "test_risk_links.py",
        "test_risk_estimate.py",
        "test_risk_losses.py",
    ],
    "poprisk/risk/estimate.py": [
        "test_risk_reference.py",
        "test_risk_estimate.py",
        "test_risk_twin.py",
        "test_risk_losses.py",
    ],
    "poprisk/optim/adamw.py": [*OPTIMIZER, "test_within.py", "test_drop_in.py"],
    "poprisk/optim/wrapper.py": ["test_gated.py", "test_optimizer_state.py", "test_drop_in.py"],
}
"""The files under test, and the tests that pin each, the quickest first."""

LEFT_OUT = re.compile("BitOr|BitAnd|BitXor|Shift|FloorDiv|_Mod|NoOp|no-op|Variable")
"""Operators whose mutants mostly raise TypeError, which any test notices: they would flatter."""
FOR_CHECKERS = {"final", "overload", "override"}
"""Decorators that only a type checker reads."""
SECONDS = 600
"""Of processor time, after which a mutant hangs and counts as noticed."""


class Mutant(NamedTuple):
    """One fault: the line it is in, what it makes of it, and the whole file."""

    line: int
    change: str
    source: str


def places(source: str) -> list[tuple[str, int, int]]:
    """Operator, occurrence and line of everything that can be mutated."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    tree, found = get_ast(source), list[tuple[str, int, int]]()
    for name in sorted(operator_names()):
        kind = get_operator(name)
        if not LEFT_OUT.search(name) and not kind.arguments():
            positions = (p for node in ast_nodes(tree) for p in kind().mutation_positions(node))
            found += [(name, i, start[0]) for i, (start, _) in enumerate(positions)]
    return found


def mutants_of(source: str, order: list[tuple[str, int, int]]) -> Iterator[Mutant]:
    """The mutants at ``order``, places, as far as they are faults that somebody could make."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    tree = ast.parse(source)
    original, usual = behaviour(tree), odd_comparisons(tree)
    for name, occurrence, line in order:
        mutated = mutate_code(source, get_operator(name)(), occurrence) or source
        try:
            tree = ast.parse(mutated)
        except SyntaxError:
            continue
        if odd_comparisons(tree) == usual and behaviour(tree) != original:
            yield Mutant(line, change_of(source, mutated), mutated)


def odd_comparisons(tree: ast.Module) -> int:
    """How many comparisons are no plausible fault, or one that Python itself warns of.

    The order of strings, ``is`` with a string or a number, and anything but ``is`` with None.
    """

    def odd(node: ast.Compare) -> bool:
        constants = [n.value for n in (node.left, *node.comparators) if isinstance(n, ast.Constant)]
        kinds = {type(op) for op in node.ops}
        if any(c is None for c in constants):
            return not kinds <= {ast.Is, ast.IsNot}
        if kinds & {ast.Is, ast.IsNot}:
            return any(isinstance(c, str | float | int) for c in constants)
        ordered = kinds & {ast.Lt, ast.LtE, ast.Gt, ast.GtE}
        return bool(ordered) and any(isinstance(c, str) for c in constants)

    return sum(odd(node) for node in ast.walk(tree) if isinstance(node, ast.Compare))


def digest_of(source: str) -> str:
    """Changes when the code does, its import statements aside, which a move of files renames."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.If | ast.Try):
            node.body = [s for s in node.body if not isinstance(s, ast.Import | ast.ImportFrom)]
    return hashlib.sha256(behaviour(tree).encode()).hexdigest()[:16]


def behaviour(tree: ast.Module) -> str:
    """The code without what is for type checkers, and what may only be passed by name."""
    tree = copy.deepcopy(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            node.decorator_list = [
                d
                for d in node.decorator_list
                if not (isinstance(d, ast.Name) and d.id in FOR_CHECKERS)
            ]
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            node.annotation = ast.Constant(0)
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arguments):  # a bare * is no product
            node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            node.defaults += [d for d in node.kw_defaults if d is not None]
            node.posonlyargs.clear(), node.kwonlyargs.clear(), node.kw_defaults.clear()
    return ast.dump(tree)


def change_of(source: str, mutated: str) -> str:
    """The changed lines, before and after, with a number if the same line occurs several times."""
    before, after = source.splitlines(), mutated.splitlines()
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    texts, place = list[str](), 0
    for tag, a, b, c, d in blocks:
        if tag != "equal":
            parts = (before[a:b], after[c:d])
            texts.append(" -> ".join(" ".join(line.strip() for line in part) for part in parts))
            place = before[:a].count(before[a]) if a < len(before) else 0
    return " ; ".join(texts) + (f" [{place + 1}]" if place else "")


class Workshop:
    """A copy of the package into which one mutant after the other is put."""

    def __init__(self, root: Path) -> None:
        self.root = root
        copy_packages(root)

    @contextlib.contextmanager
    def holding(self, module: str, source: str) -> Iterator[None]:
        """The package with ``source`` for one of its files."""
        file = self.root / module
        kept = file.read_text(encoding="utf-8")
        file.write_text(source, encoding="utf-8")
        try:
            yield
        finally:
            file.write_text(kept, encoding="utf-8")

    def outcome(self, module: str, source: str) -> str:
        """Whether the tests of a file notice it: "killed", "survived" or "hung"."""
        with self.holding(module, source):
            code = exit_code(self.root, ["-m", "not slow", *PINNED[module]], seconds=SECONDS)
        if code is None:
            return "hung"
        return "survived" if code == pytest.ExitCode.OK else "killed"


def interval(killed: int, n: int, of: int) -> list[float]:
    """Wilson's 95% interval of a share, with the correction for a sample from ``of``."""
    if not n:
        return [0.0, 1.0]
    if n >= of:
        return [round(killed / n, 4)] * 2
    z = 1.96 * math.sqrt((of - n) / (of - 1))
    p, scale = killed / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return [round(centre - half, 4), round(centre + half, 4)]


def summary(module: str, candidates: int, outcomes: dict[str, str]) -> dict[str, Any]:
    """Counts, share noticed of those that are not equivalent, and the survivors with reasons."""
    alive = [change for change, outcome in outcomes.items() if outcome == "survived"]
    equivalent = {c: EQUIVALENT[module][c] for c in alive if c in EQUIVALENT.get(module, {})}
    real = len(outcomes) - len(equivalent)
    killed = len(outcomes) - len(alive)
    return {
        "tests": PINNED[module],
        "candidates": candidates,
        "mutants": len(outcomes),
        "killed": killed,
        "equivalent": equivalent,
        "survived": [change for change in alive if change not in equivalent],
        "share": round(killed / real, 4) if real else 1.0,
        "interval": interval(killed, real, max(real, candidates - len(equivalent))),
    }


class Results:
    """What is known, kept in a file after each mutant."""

    def __init__(self, path: Path, seed: int, sample: int | None) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        if path.exists():
            self.known = json.loads(path.read_text(encoding="utf-8"))
        self.head = {
            "tool": f"cosmic-ray {version('cosmic-ray')}",
            "torch": importlib.import_module("torch").__version__,
            "seed": seed,
            "sample": sample,
        }

    def outcomes(self, module: str, digest: str) -> dict[str, str]:
        """What is known of a file as it is."""
        found = self.known.get("files", {}).get(module, {})
        return dict(found.get("outcomes", {})) if found.get("digest") == digest else {}

    def keep(self, module: str, digest: str, candidates: int, outcomes: dict[str, str]) -> None:
        files = self.known.get("files", {})
        row = summary(module, candidates, outcomes)
        files[module] = {"digest": digest, **row, "outcomes": outcomes}
        ordered = {name: files[name] for name in PINNED if name in files}
        real = sum(f["mutants"] - len(f["equivalent"]) for f in ordered.values())
        killed = sum(f["killed"] for f in ordered.values())
        self.known = {**self.head, "share": round(killed / max(real, 1), 4), "files": ordered}
        text = json.dumps(self.known, indent=1, ensure_ascii=False) + "\n"
        self.path.write_text(text, encoding="utf-8")


def run(module: str, results: Results, *, seed: int, sample: int | None, again: bool) -> None:
    """Try the mutants of one file, or a random sample of them."""
    source = (SRC / module).read_text(encoding="utf-8")
    digest = digest_of(source)
    candidates = places(source)
    order = random.Random(f"{seed} {module}").sample(candidates, len(candidates))
    mutants = mutants_of(source, order)
    outcomes = results.outcomes(module, digest)
    if again:
        known = EQUIVALENT.get(module, {})
        outcomes = {c: o for c, o in outcomes.items() if o != "survived" or c in known}
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        if not outcomes and (found := workshop.outcome(module, source)) != "survived":
            output = (Path(folder) / "output.txt").read_text(encoding="utf-8")
            raise SystemExit(f"the tests of {module} fail without a mutant ({found}):\n{output}")
        seen = set[str]()
        for mutant in mutants:
            if len(seen) == sample:
                break
            seen.add(mutant.change)
            if mutant.change in outcomes:
                continue
            outcomes[mutant.change] = workshop.outcome(module, mutant.source)
            results.keep(module, digest, len(candidates), outcomes)
            if outcomes[mutant.change] != "killed":
                print(
                    f"{module}:{mutant.line}: {outcomes[mutant.change]}: {mutant.change}",
                    flush=True,
                )
    results.keep(module, digest, len(candidates), outcomes)
    row = results.known["files"][module]
    print(f"{module}: {row['share']:.0%} of {row['mutants']} noticed {row['interval']}", flush=True)


def absolute(path: str) -> Path:
    """A path that stays the same when the working directory changes."""
    return Path(path).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", help="files; all that are pinned if left out")
    parser.add_argument("--sample", type=int, help="mutants of each file; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--again", action="store_true", help="try survivors that are not equivalent once more"
    )
    parser.add_argument("--out", type=absolute, default=RESULTS)
    options = parser.parse_args()
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.chdir(TESTS)
    sys.dont_write_bytecode = True
    prepare()
    results = Results(options.out, options.seed, options.sample)
    for module in options.modules or PINNED:
        run(module, results, seed=options.seed, sample=options.sample, again=options.again)


if __name__ == "__main__":
    main()
