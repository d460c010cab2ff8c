"""poprisk: train on population risk.

The public names, in the order of the theory. See the README for a first run and
``docs/explanation/theory.md`` for the table from equations to functions.
"""

from poprisk import _moved
from poprisk.attribution import Attribution, Replay, attribute, replay
from poprisk.audit import Auditor, AuditResult, audit
from poprisk.monitor import RiskMonitor
from poprisk.ntk import Kernel, entk
from poprisk.optim.adamw import PopRiskAdamW
from poprisk.optim.exempt import exempt_groups
from poprisk.optim.rank_variance import observe_ranks
from poprisk.optim.soap import PopRiskSOAP
from poprisk.optim.stats import GateStats
from poprisk.optim.variance import grad_mean_var
from poprisk.optim.wrapper import GatedOptimizer, gated
from poprisk.path import CellTracer, NotAnalysable, Recorder, Run, record, trace_cells
from poprisk.path.operators import PathOperators, path_operators
from poprisk.protocols import Estimated, ProgressCallback
from poprisk.risk import (
    AdaptationGap,
    Canaries,
    FreshBatchRisk,
    Lockstep,
    LooRisk,
    RiskCurve,
    RiskEstimate,
    Selection,
    StoppingPoint,
    TwinRisk,
    adaptation_gap,
    fresh_batch_risk,
    loo_risk,
    select,
    stopping_point,
)
from poprisk.task import Metric, Task

__version__ = "0.1.0"

__all__ = [
    "AdaptationGap",
    "Attribution",
    "AuditResult",
    "Auditor",
    "Canaries",
    "CellTracer",
    "Estimated",
    "FreshBatchRisk",
    "GateStats",
    "GatedOptimizer",
    "Kernel",
    "Lockstep",
    "LooRisk",
    "Metric",
    "NotAnalysable",
    "PathOperators",
    "PopRiskAdamW",
    "PopRiskSOAP",
    "ProgressCallback",
    "Recorder",
    "Replay",
    "RiskCurve",
    "RiskEstimate",
    "RiskMonitor",
    "Run",
    "Selection",
    "StoppingPoint",
    "Task",
    "TwinRisk",
    "adaptation_gap",
    "attribute",
    "audit",
    "entk",
    "exempt_groups",
    "fresh_batch_risk",
    "gated",
    "grad_mean_var",
    "loo_risk",
    "observe_ranks",
    "path_operators",
    "record",
    "replay",
    "select",
    "stopping_point",
    "trace_cells",
]

_moved.install()
