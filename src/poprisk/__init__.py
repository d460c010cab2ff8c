"""poprisk: train on population risk.

The public names, in the order of the theory. See the README for a first run and
``docs/theory.md`` for the table from equations to functions.
"""

from poprisk.channel import PathOperators, path_operators
from poprisk.gated import gated
from poprisk.optimizer import PopRiskAdamW
from poprisk.path import NotAnalysable, Recorder, Run, record, trace_cells
from poprisk.stats import GateStats
from poprisk.tasks import Metric, Task

__version__ = "0.1.0"

__all__ = [
    "GateStats",
    "Metric",
    "NotAnalysable",
    "PathOperators",
    "PopRiskAdamW",
    "Recorder",
    "Run",
    "Task",
    "gated",
    "path_operators",
    "record",
    "trace_cells",
]
