"""Population risk from the training data alone."""

from poprisk.risk.canaries import Canaries
from poprisk.risk.choose import Selection, StoppingPoint, select, stopping_point
from poprisk.risk.curve import RiskCurve
from poprisk.risk.estimate import RiskEstimate
from poprisk.risk.fresh import FreshBatchRisk, fresh_batch_risk
from poprisk.risk.gap import AdaptationGap, adaptation_gap
from poprisk.risk.lockstep import Lockstep
from poprisk.risk.loo import LooRisk, loo_risk
from poprisk.risk.twin import TwinRisk

__all__ = [
    "AdaptationGap",
    "Canaries",
    "FreshBatchRisk",
    "Lockstep",
    "LooRisk",
    "RiskCurve",
    "RiskEstimate",
    "Selection",
    "StoppingPoint",
    "TwinRisk",
    "adaptation_gap",
    "fresh_batch_risk",
    "loo_risk",
    "select",
    "stopping_point",
]
