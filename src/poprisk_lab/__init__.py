"""The laboratory of poprisk: its command line, tasks, methods, studies and pages."""

import sys
from importlib.util import find_spec
from pathlib import Path

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
