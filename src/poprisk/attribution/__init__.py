"""Which training examples did this: influence through the whole of a run, by its adjoint."""

from poprisk.attribution.influence import attribute
from poprisk.attribution.result import Attribution
from poprisk.attribution.training import Replay, replay

__all__ = ["Attribution", "Replay", "attribute", "replay"]
