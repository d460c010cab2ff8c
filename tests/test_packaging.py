"""What the package says of itself agrees: extras, lowest versions, files of the wheel, citation."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import built_wheel
import lowest
import poprisk
import poprisk_lab

ROOT = Path(__file__).parents[1]
PROJECT = lowest.project()
EXTRAS = PROJECT["optional-dependencies"]


# --- what is missing ------------------------------------------------------------------------------


def without(*names: str, command: str) -> subprocess.CompletedProcess[str]:
    """What ``import poprisk_lab`` says in a program of that name where packages are missing."""
    code = (
        f"import sys; sys.argv[0] = {command!r}\n"
        f"for name in {names!r}: sys.modules[name] = None\n"
        "import poprisk_lab"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_laboratory_names_what_is_missing_and_what_to_install() -> None:
    done = without("plotly", "skimage", command="/home/me/train.py")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: poprisk_lab needs plotly, skimage: pip install 'poprisk[lab]'"
    )


@pytest.mark.parametrize("command", ["/usr/bin/poprisk", "poprisk.exe"])
def test_the_command_says_so_in_one_line(command: str) -> None:
    done = without("typer", command=command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "poprisk: poprisk_lab needs typer: pip install 'poprisk[lab]'\n"


def test_it_asks_for_all_of_the_extra_and_for_nothing_else() -> None:
    homes = metadata.packages_distributions()
    needed = {lowest.normalized(homes[name][0]) for name in poprisk_lab.NEEDED}
    assert needed == lowest.bounds(EXTRAS["lab"]).keys()


# --- the lowest versions --------------------------------------------------------------------------


def test_the_lowest_versions_take_the_place_of_the_pins() -> None:
    pins = "# tested\nnumpy==2.4.6\nScikit_Learn==1.9.1\n\nclick==8.5.1\n"
    bounds = lowest.bounds(["numpy>=1.26", "scikit-learn>=1.5"])
    assert lowest.constraints(bounds, pins) == ["click==8.5.1", "numpy==1.26", "scikit-learn==1.5"]


@pytest.mark.parametrize(
    "text", ["numpy", "numpy>1.26", "numpy>=1.26,<3", "numpy==1.26", "a[b]>=1"]
)
def test_a_requirement_without_a_plain_lower_bound_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is not of the form name>=version.")):
        lowest.bounds([text])


def test_what_is_installed_above_its_lowest_is_named() -> None:
    bounds = {"torch": "2.13", "numpy": "1.26", "rich": "13.8", "typer": "0.26.0"}
    installed = {"torch": "2.13.0+cpu", "numpy": "1.26.4", "rich": "13.10.0", "typer": "0.26"}
    assert lowest.higher(bounds, installed) == ["numpy 1.26.4, not 1.26", "rich 13.10.0, not 13.8"]


def test_every_promise_has_a_pin_that_keeps_it() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    tested = {lowest.normalized(name): version for name, version in pins.items()}
    numbers = {name: [int(part) for part in re.findall(r"\d+", v)] for name, v in tested.items()}
    for name, version in lowest.promised(PROJECT).items():
        assert numbers[name] >= [int(part) for part in version.split(".")], name


# --- the wheel ------------------------------------------------------------------------------------


def test_a_file_too_many_or_too_few_in_a_wheel_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "poprisk-0.1.0-py3-none-any.whl"
    files = {*built_wheel.expected(), "poprisk-0.1.0.dist-info/METADATA"}
    for more, less in ((set(), set()), ({"records/pinn.json"}, set()), (set(), built_wheel.DATA)):
        with zipfile.ZipFile(file, "w") as archive:
            for name in (files | more) - less:
                archive.writestr(name, "")
        assert built_wheel.held(file) ^ built_wheel.expected() == more | less


def test_the_wheel_needs_every_file_that_is_not_python() -> None:
    named = PROJECT["name"]
    there = {
        path.relative_to(built_wheel.SRC).as_posix()
        for path in built_wheel.SRC.glob(f"{named}*/**/*")
        if path.is_file() and path.suffix != ".pyc" and f"{named}.egg-info" not in path.parts
    }
    assert there == built_wheel.expected()


# --- versions and citation ------------------------------------------------------------------------


def test_the_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {PROJECT["version"], poprisk.__version__, citation["version"]} == {poprisk.__version__}


def test_the_citation_has_what_its_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["license"] == PROJECT["license"].split(" AND ")[0]  # of our own code
    assert all(citation[key] for key in ("message", "title", "authors", "abstract"))
    (paper,) = citation["references"]
    assert {"type": "other", "value": "arXiv:2605.01172"} in paper["identifiers"]
    bibtex = (ROOT / "README.md").read_text(encoding="utf-8").partition("```bibtex")[2]
    title = re.search(r"title *= \{(.*)\}", bibtex)
    authors = re.search(r"author *= \{(.*)\}", bibtex)
    assert title is not None
    assert authors is not None
    assert paper["title"] == title[1]
    names = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    assert " and ".join(names) == authors[1]
    assert paper["year"] == 2026


def test_python_is_as_low_as_the_classifiers_say() -> None:
    least = PROJECT["requires-python"].removeprefix(">=")
    versions = [
        text.rpartition(" ")[2]
        for text in PROJECT["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", text)
    ]
    assert versions[0] == least
