"""The laboratory of poprisk: its command line, tasks, methods, studies and pages."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poprisk_lab.compared import Compared, compare

__all__ = ["Compared", "compare"]

NEEDED = (
    "typer rich plotly jinja2 sklearn skimage scipy safetensors pandas PIL pytorch_optimizer"
).split()
"""What the extra ``lab`` installs, by the names that are imported."""

_missing = [name for name in NEEDED if find_spec(name) is None]
if _missing:
    _message = f"poprisk_lab needs {', '.join(_missing)}: pip install 'poprisk[lab]'"
    if Path(sys.argv[0]).stem == "poprisk":
        sys.exit(f"poprisk: {_message}")  # the command was installed without the extra
    raise ModuleNotFoundError(_message)


def __getattr__(name: str) -> Any:
    """Import what notebooks use when it is asked for: the command's help waits for no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from poprisk_lab import compared

    return getattr(compared, name)
