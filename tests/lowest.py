"""The lowest versions that pyproject.toml promises, as constraints for pip. `make test-lowest`.

``python tests/lowest.py`` prints them, and the tested pins of all that is no promise;
``python tests/lowest.py --check`` compares them with what is installed.
"""

from __future__ import annotations

import platform
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROMISED = ("lab", "test")
"""The extras whose lower bounds are tested beside those of the library."""


def project() -> dict[str, Any]:
    """The table of that name in pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def promised(project: Mapping[str, Any]) -> dict[str, str]:
    """The lower bounds of what the library, the laboratory and the tests import, by name."""
    extras = project["optional-dependencies"]
    return bounds([*project["dependencies"], *(r for name in PROMISED for r in extras[name])])


def bounds(requirements: Iterable[str]) -> dict[str, str]:
    """The lower bound of each requirement, by normalized name.

    Raises:
        ValueError: if a requirement is not of the form ``name>=version``.

    Example:
        >>> bounds(["torch>=2.13", "scikit_learn>=1.5"])
        {'torch': '2.13', 'scikit-learn': '1.5'}
    """
    found = {}
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9]+(?:\.[0-9]+)*)", requirement)
        if match is None:
            raise ValueError(f"{requirement!r} is not of the form name>=version.")
        found[normalized(match[1])] = match[2]
    return found


def constraints(lowest: Mapping[str, str], pins: str) -> list[str]:
    """Lines for pip: the lower bounds, and the pins of everything else."""
    pinned = [line for line in pins.splitlines() if "==" in line and not line.startswith("#")]
    kept = [line for line in pinned if normalized(line.partition("==")[0]) not in lowest]
    return sorted(kept + [f"{name}=={version}" for name, version in lowest.items()])


def higher(lowest: Mapping[str, str], installed: Mapping[str, str]) -> list[str]:
    """What is not installed at its lowest: ``2.13`` is 2.13.0 and 2.13.0+cpu, but not 2.13.1."""
    return [
        f"{name} {installed[name]}, not {version}"
        for name, version in lowest.items()
        if release(installed[name]) != release(version)
    ]


def release(version: str) -> str:
    """A version without build and trailing zeros."""
    return re.sub(r"(\.0)+$", "", version.partition("+")[0])


def normalized(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(check: bool) -> None:
    """Print the constraints, or end with what is installed above them."""
    table = project()
    lowest = promised(table)
    if not check:
        pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        print("\n".join(constraints(lowest, pins)))
        return
    lowest |= {"python": table["requires-python"].removeprefix(">=")}
    python = ".".join(platform.python_version_tuple()[:2])
    installed = {name: python if name == "python" else metadata.version(name) for name in lowest}
    if above := higher(lowest, installed):
        sys.exit("installed: " + "; ".join(above))
    print(", ".join(f"{name} {version}" for name, version in installed.items()))


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
