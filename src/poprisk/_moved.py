"""Modules by the names that they had in the last release, with a warning; gone in the next one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from poprisk._renamed import warn_renamed

MOVED = {
    "optimizer": "poprisk.optim.adamw",
    "gate": "poprisk.optim.gate",
    "update": "poprisk.optim.update",
    "variance": "poprisk.optim.variance",
    "stats": "poprisk.optim.stats",
    "within": "poprisk.optim.batch_variance",
    "dataparallel": "poprisk.optim.rank_variance",
    "fused": "poprisk.optim.fused",
    "sharding": "poprisk.dtensor",
    "factors": "poprisk.per_sample",
    "kernel": "poprisk.ntk",
    "channel": "poprisk.path.operators",
    "drift": "poprisk.path.drift",
    "path.losses": "poprisk.losses",
    "path.rules": "poprisk.optim.step",
    "risk.links": "poprisk.risk.local_losses",
    "tasks": "poprisk_lab.tasks",
    "arms": "poprisk_lab.arms",
    "controls": "poprisk_lab.controls",
    "training": "poprisk_lab.fit",
    "checkpoint": "poprisk_lab.checkpoint",
    "compare": "poprisk_lab.comparison",
    "reproduce": "poprisk_lab.studies",
    "report": "poprisk_lab.page",
    "cli": "poprisk_lab.cli",
}
"""From names below ``poprisk`` to where the modules are."""


class Moved(MetaPathFinder, Loader):
    """Finds a module of :data:`MOVED` where it is now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "poprisk" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__.partition(".")[2]]
        warn_renamed(module.__name__, new)
        sys.modules[module.__name__] = importlib.import_module(new)


def install() -> None:
    """Let imports of old names find their modules."""
    sys.meta_path.append(Moved())
    # No import may bind this name of the package: it is the function's.
    sys.modules["poprisk.gated"] = sys.modules["poprisk.optim.wrapper"]
