"""The README: its figures are on record, its words explained, its files there, its length kept."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from poprisk_lab.studies import CLAIMS

ROOT = Path(__file__).parents[1]

readme_figures: Any = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "readme_figures.py")))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES: dict[str, str] = readme_figures.pages()
WORDS = ("gate", "arm", "twin", "starved", "four cells", "closure", "not settled")
"""Hard words; the README explains each where it comes first, and sets it in italics there."""
CLAIM_WORDS = {
    "grokking": "grokking",
    "grokking-multistep": "two-step task",
    "pinn": "differential equation",
    "image": "picture",
    "benign-overfitting": "benign overfitting",
    "double-descent": "double descent",
    "implicit-bias": "implicit bias",
    "drift-diffusion": "drift and diffusion",
    "coupling": "coupling",
    "feature-learning": "feature learning",
    "memorization": "memorization",
    "dpo": "preferences",
    "audit": "wrong labels",
    "stopping": "population risk",
    "forward-forward": "without backpropagation",
}


def test_the_two_commands_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert wanted == ["run", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in wanted)


def test_figures_are_those_on_record() -> None:
    """docs/readme_figures.py makes them from the records; what it lists is stale."""
    assert readme_figures.stale(PAGES) == []


def test_a_stale_figure_would_be_found() -> None:
    pieces = readme_figures.pieces()
    assert len(pieces) > 25
    others = dict(PAGES)
    for page, piece in pieces:
        number = re.findall(r"\d+\.?\d*(?=[^\d]*$)", piece)[0]
        others[page] = others[page].replace(number, "other")
    assert set(readme_figures.stale(others)) == set(pieces)


def test_verdicts_are_those_on_record() -> None:
    said = re.search(
        r"^On record: (.*?)\n\n", PAGES["docs/how-to/reproduce.md"], flags=re.DOTALL | re.MULTILINE
    )
    assert said is not None
    reproduced, partly, not_at_all = re.split(r"\*reproduced\*;|\*partly\*;", said[1])
    told = {"reproduced": reproduced, "partly reproduced": partly, "not reproduced": not_at_all}
    assert set(CLAIM_WORDS) == set(CLAIMS)
    for claim, verdict in readme_figures.verdicts().items():
        for kind, text in told.items():
            sentence = " ".join(text.split()).partition(".")[0]
            assert (CLAIM_WORDS[claim] in sentence) == (kind == verdict), (claim, verdict)


def test_the_files_it_links_to_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert len(re.sub(r"```.*?```", "", README, flags=re.DOTALL).split()) <= 900


@pytest.mark.parametrize("word", WORDS)
def test_a_hard_word_is_explained_where_it_comes_first(word: str) -> None:
    prose = re.sub(r"```.*?```|\]\(.*?\)|`[^`]*`", "", README, flags=re.DOTALL)
    first = re.search(rf"\*?\b{word}s?\b\*?", prose)
    assert first is not None
    assert first[0].strip("*") != first[0], prose[first.start() - 40 : first.end() + 40]
