"""Signal channel and reservoir of a run: what reached the query points, and what could not."""

from poprisk.channel.cells import Cells, FourCells, TestError
from poprisk.channel.coupling import Coupling, NoiseGain, Prediction
from poprisk.channel.operators import PathOperators, path_operators
from poprisk.channel.spectrum import Channel, Spectrum

__all__ = [
    "Cells",
    "Channel",
    "Coupling",
    "FourCells",
    "NoiseGain",
    "PathOperators",
    "Prediction",
    "Spectrum",
    "TestError",
    "path_operators",
]
