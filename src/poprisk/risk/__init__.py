"""Population risk from the training data alone."""

from poprisk.risk.canaries import Canaries
from poprisk.risk.choose import Selection, StoppingPoint, select, stopping_point
from poprisk.risk.estimate import RiskEstimate
from poprisk.risk.fresh import FreshBatchRisk, fresh_batch_risk
from poprisk.risk.loo import LooRisk, loo_risk
from poprisk.risk.twin import TwinRisk

__all__ = [
    "Canaries",
    "FreshBatchRisk",
    "LooRisk",
    "RiskEstimate",
    "Selection",
    "StoppingPoint",
    "TwinRisk",
    "fresh_batch_risk",
    "loo_risk",
    "select",
    "stopping_point",
]
