"""One name for one thing: classes, the words of the glossary, and the protocol of results."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import poprisk
from poprisk import Estimated

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TREES = {
    str(p.relative_to(ROOT / "src")): ast.parse(p.read_text(encoding="utf-8")) for p in SOURCES
}
GLOSSARY = (ROOT / "docs" / "reference" / "glossary.md").read_text(encoding="utf-8")
FIELDS = ("value", "standard_error", "valid", "reason", "cost")


def classes() -> dict[str, list[str]]:
    """Files that define a class, by its name."""
    found: dict[str, list[str]] = defaultdict(list)
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(file)
    return found


def names_in(node: ast.AST) -> Iterator[str]:
    """The identifiers that one node of a syntax tree introduces or uses."""
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.arg, ast.keyword)):
        yield node.arg or ""
    elif isinstance(node, ast.alias):
        yield from (node.asname or node.name).split(".")


def identifiers(tree: ast.Module) -> set[str]:
    """All names in a file but the old ones that renamings list."""
    listed = {
        keyword
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("renamed_")
        for keyword in node.keywords
    }
    nodes = (node for node in ast.walk(tree) if node not in listed)
    return {name for node in nodes for name in names_in(node)}


def has_word(identifier: str, word: str) -> bool:
    """Whether a word stands in an identifier, alone or between underscores."""
    return f"_{word}_" in f"_{identifier.strip('_')}_"


def rows() -> list[Sequence[str]]:
    """Term, names in code and words that are not, of the glossary's table."""
    table = GLOSSARY.partition("| term | name in code | not |")[2].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table if row]


def words(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_no_two_classes_have_one_name() -> None:
    assert {name: files for name, files in classes().items() if len(files) > 1} == {}


def test_the_words_that_the_glossary_forbids_are_in_no_name() -> None:
    forbidden = [word for row in rows() for word in words(row[2])]
    assert len(forbidden) > 10
    found = [
        f"{file}: {name}"
        for file, tree in TREES.items()
        for name in sorted(identifiers(tree))
        if any(has_word(name, word) for word in forbidden)
    ]
    assert found == []


def test_the_names_that_the_glossary_gives_are_used() -> None:
    used = set().union(*map(identifiers, TREES.values()))
    for row in rows():
        assert words(row[1])
        for word in words(row[1]):
            assert any(has_word(name, word) for name in used), word


def test_a_word_is_found_within_a_name() -> None:
    assert has_word("freedom_error", "freedom")
    assert has_word("_tilt", "tilt")
    assert not has_word("DegreesOfFreedom", "Freedom")
    assert not has_word("activation", "act")
    source = "@renamed_arguments(budget='max_memory')\ndef f(slots): return g(link=1).clock"
    assert identifiers(ast.parse(source)) == {
        *("renamed_arguments", "f", "slots", "g", "link", "clock")
    }


def library_classes() -> Iterator[type]:
    """Classes of the library that have no underscore and need no extra."""
    for info in pkgutil.walk_packages(poprisk.__path__, "poprisk."):
        needs_extra = info.name.startswith("poprisk.integrations.") or info.name.endswith("_triton")
        if needs_extra or info.name == "poprisk.__main__":
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == info.name and name[0] != "_":
                yield value


def fields_of(cls: type) -> set[str]:
    if dataclasses.is_dataclass(cls):
        return {f.name for f in dataclasses.fields(cls)}
    return set(getattr(cls, "_fields", ()))


def results() -> list[type]:
    """Result classes that say a value, an error, or whether it is valid."""
    found = (c for c in library_classes() if fields_of(c) & set(FIELDS))
    return sorted(set(found), key=lambda c: c.__name__)


RESULTS = results()
ESTIMATES = (
    "AdaptationGap ErrorBound Estimate Exponent FreshBatchRisk LooRisk Memorization RiskEstimate "
    "Selection StoppingPoint"
).split()


def test_the_estimates_of_the_library_are_looked_at() -> None:
    assert set(ESTIMATES) <= {c.__name__ for c in RESULTS}


@pytest.mark.parametrize("kind", RESULTS, ids=lambda c: c.__name__)
def test_a_result_has_all_that_an_estimate_has(kind: type) -> None:
    missing = [name for name in FIELDS if name not in fields_of(kind) and not hasattr(kind, name)]
    assert missing == []


def test_the_protocol_is_what_results_are_tested_for() -> None:
    assert {name for name in vars(Estimated) if not name.startswith("_")} == set(FIELDS)
