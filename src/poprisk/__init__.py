"""poprisk: train on population risk.

The public names, in the order of the theory. See the README for a first run and
``docs/theory.md`` for the table from equations to functions.
"""

from poprisk.channel import PathOperators, path_operators
from poprisk.gated import gated
from poprisk.kernel import Kernel, entk
from poprisk.optimizer import PopRiskAdamW
from poprisk.path import NotAnalysable, Recorder, Run, record, trace_cells
from poprisk.stats import GateStats
from poprisk.tasks import Metric, Task
from poprisk.variance import grad_mean_var

__version__ = "0.1.0"

__all__ = [
    "GateStats",
    "Kernel",
    "Metric",
    "NotAnalysable",
    "PathOperators",
    "PopRiskAdamW",
    "Recorder",
    "Run",
    "Task",
    "entk",
    "gated",
    "grad_mean_var",
    "path_operators",
    "record",
    "trace_cells",
]
