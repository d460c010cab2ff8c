"""Population risk from the training data alone."""

from poprisk.risk.estimate import RiskEstimate
from poprisk.risk.twin import TwinRisk

__all__ = ["RiskEstimate", "TwinRisk"]
