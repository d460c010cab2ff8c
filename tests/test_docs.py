"""The names that the documentation gives exist."""

import importlib
import re
from pathlib import Path

import pytest

import poprisk

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
THEORY = (ROOT / "docs" / "explanation" / "theory.md").read_text(encoding="utf-8")

NAMES = sorted(set(re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_.]+)`", THEORY)))
FILES = sorted(set(re.findall(r"`([a-z_]+/[a-z_/]+\.(?:py|cpp))`", THEORY)))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def resolve(name: str) -> object:
    """What a dotted name stands for, below poprisk unless it says the laboratory."""
    parts = name.split(".")
    path = parts[0] if parts[0] == "poprisk_lab" else "poprisk"
    found: object = importlib.import_module(path)
    for part in parts[parts[0] == "poprisk_lab" :]:
        path = f"{path}.{part}"  # `poprisk.audit` is a function and a package
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith(".py")])
def test_a_name_in_the_theory_exists(name: str) -> None:
    assert resolve(name) is not None


@pytest.mark.parametrize("file", FILES)
def test_a_file_in_the_theory_exists(file: str) -> None:
    assert (SRC / "poprisk" / file).exists() or (ROOT / file).exists()


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_a_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in links if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """What the headings and marks of a page are called in links, as GitHub and MyST do."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#{1,3} (.+)$", text, re.MULTILINE)
    kept = {re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings}
    marks = re.findall(r"^\((.+)\)=$", text, re.MULTILINE)
    return {heading.replace(" ", "-") for heading in kept} | {*marks}


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_a_link_into_a_page_leads_to_a_heading(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    inside = [(page.parent / to if to else page, at) for to, at in links if "://" not in to]
    pages = [(to, at) for to, at in inside if to.suffix == ".md"]
    assert [f"{to.name}#{at}" for to, at in pages if at not in anchors(to)] == []


REFERENCE = "".join(
    p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "reference").glob("*.md")
)
DESCRIBED = set(re.findall(r"\.\. auto(?:class|function|exception):: (\w+)", REFERENCE))
WRITTEN = [p for p in PAGES if p.is_relative_to(ROOT / "docs")]
LASTING = [p for p in PAGES if p.name != "CHANGELOG.md" and p.parent.name != "notebook"]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("plot_*.py"))


def test_the_reference_has_every_public_name() -> None:
    assert set(poprisk.__all__) == DESCRIBED


@pytest.mark.parametrize("page", LASTING, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_public_name_on_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"`poprisk\.((?:\w+\.)*\w+)[`(]", text))
    names |= set(re.findall(r"\}`~?poprisk\.((?:\w+\.)*\w+)`", text))
    for name in names:
        if not name.startswith("integrations."):  # which need their extras
            assert resolve(name) is not None


def test_members_that_the_reference_picks_exist() -> None:
    picked = re.findall(r"automodule:: (?:poprisk\.)?(\S+)\n +:members: (.*)", REFERENCE)
    assert len(picked) >= 4
    for module, members in picked:
        for member in members.split(", "):
            if not module.startswith("integrations."):
                assert resolve(f"{module}.{member}") is not None


def test_every_page_is_in_the_contents() -> None:
    """Of the folder's index; Sphinx says so, too, but not in `make test`."""
    for page in WRITTEN:
        folder = page.parent
        contents = folder / ("README.md" if folder.name == "claims" else "index.md")
        if page != contents:
            assert re.search(
                rf"^{page.stem}$", contents.read_text(encoding="utf-8"), flags=re.MULTILINE
            ), page


def test_terms_are_explained_once() -> None:
    glossary = (ROOT / "docs" / "reference" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^(\S[^\n`{]*)\n  \S", glossary, flags=re.MULTILINE)
    assert len(terms) == len(set(terms)) > 20
    assert {"arm", "gate", "twin", "starved", "four cells", "closure"} <= set(terms)


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_leads_to_pages_and_says_no_number_of_its_own(tutorial: Path) -> None:
    """A result in the prose would go stale: the script prints it."""
    prose = [
        line
        for line in tutorial.read_text(encoding="utf-8").splitlines()
        if line.startswith("# ") and line != "# %%"
    ]
    for target in re.findall(r":doc:`/([^`]+)`", "\n".join(prose)):
        assert (ROOT / "docs" / f"{target}.md").exists()
    assert not re.search(r"\d\.\d|\d\d?(\.\d)? ?%(?! of the size)", "\n".join(prose))


def test_links_to_other_manuals_are_told_apart() -> None:
    lines = (ROOT / "docs" / "inventory.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.split() for line in lines]
    assert all(len(entry) == 4 for entry in entries)
    assert len({(role, name) for _, role, name, _ in entries}) == len(entries)
