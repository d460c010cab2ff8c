"""The names that the documentation gives exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
THEORY = (ROOT / "docs" / "explanation" / "theory.md").read_text(encoding="utf-8")

NAMES = sorted(set(re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_.]+)`", THEORY)))
FILES = sorted(set(re.findall(r"`([a-z_]+/[a-z_/]+\.(?:py|cpp))`", THEORY)))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def resolve(name: str) -> object:
    """What a dotted name stands for, below poprisk unless it says the laboratory."""
    parts = name.split(".")
    found: object = importlib.import_module(parts[0] if parts[0] == "poprisk_lab" else "poprisk")
    for part in parts[parts[0] == "poprisk_lab" :]:
        if not hasattr(found, part):
            found = importlib.import_module(f"{found.__name__}.{part}")  # type: ignore[attr-defined]
        else:
            found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith(".py")])
def test_a_name_in_the_theory_exists(name: str) -> None:
    assert resolve(name) is not None


@pytest.mark.parametrize("file", FILES)
def test_a_file_in_the_theory_exists(file: str) -> None:
    assert (SRC / "poprisk" / file).exists()


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_a_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in links if "://" not in t and not (page.parent / t).exists()]
    assert missing == []
