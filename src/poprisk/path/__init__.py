"""Record a run and follow the output gradient along it, exactly.

:func:`record` or :class:`Recorder` keeps what a run did; :func:`integrate` turns it into the
operators P, Q, W, G, D of the theory, :func:`follow` into their action on a few vectors.
"""

from poprisk._renamed import renamed_names
from poprisk._validate import NotAnalysable
from poprisk.optim.step import StepContext, StepRule, realized_update
from poprisk.path.closure import Closure
from poprisk.path.follow import Applied, Followed, follow
from poprisk.path.integrals import Integrals, integrate, phi_functions
from poprisk.path.online import CellTracer
from poprisk.path.recorder import Recorder, record
from poprisk.path.run import Run
from poprisk.path.trace import CellTrace, QueryParts, split_gradient, trace_cells

__all__ = [
    "Applied",
    "CellTrace",
    "CellTracer",
    "Closure",
    "Followed",
    "Integrals",
    "NotAnalysable",
    "QueryParts",
    "Recorder",
    "Run",
    "StepContext",
    "StepRule",
    "follow",
    "integrate",
    "phi_functions",
    "realized_update",
    "record",
    "split_gradient",
    "trace_cells",
]

__getattr__ = renamed_names(__name__, Facts="StepContext")
