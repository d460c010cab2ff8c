"""Write constraints that hold what pyproject.toml promises at its lowest, the rest as tested.

Usage: python .ci/lowest.py > lowest.txt
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROMISED = ("lab",)
"""The extras whose lower bounds are tested; test tools stay at their pins."""


def lower_bounds(project: dict[str, object], extras: tuple[str, ...] = PROMISED) -> dict[str, str]:
    """Lowest version of each requirement, by normalized name.

    Raises:
        ValueError: if a requirement is not of the form ``name>=version``.
    """
    optional = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(r for e in extras for r in optional[e])]
    found = {}
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9][0-9.]*)", requirement)
        if match is None:
            raise ValueError(f"{requirement!r} has no lower bound of the form name>=version.")
        found[normalized(match[1])] = match[2]
    return found


def lowest(project: dict[str, object], pins: str) -> list[str]:
    """Constraints: the lower bounds, and the pins of all that is no promise of the project's."""
    bounds = lower_bounds(project)
    pinned = (line for line in pins.splitlines() if "==" in line and not line.startswith("#"))
    others = [line for line in pinned if normalized(line.partition("==")[0]) not in bounds]
    return sorted(others + [f"{name}=={version}" for name, version in bounds.items()])


def normalized(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    sys.stdout.write("\n".join(lowest(settings["project"], tested)) + "\n")
