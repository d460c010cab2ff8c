"""Measured tables that packages ship: their noise is unknown, so that risk is that of other rows.

It has the error of those rows, a few hundred (:meth:`NoisyData.risk_error`).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from poprisk.losses import squared_error
from poprisk.randomness import generator_of
from poprisk_lab.studies.risk.problems import NoisyData, binary_costs


def cancer(seed: int, *, n: int, noise: float) -> NoisyData:
    """Which of 569 tumours are benign, from 30 measurements (scikit-learn's copy).

    The measured classes are told apart almost without error: labels are flipped.

    Args:
        seed: of rows and flips.
        n: training examples; the others are fresh.
        noise: share of the labels that are flipped, in expectation.
    """
    from sklearn.datasets import load_breast_cancer

    x, y = (torch.as_tensor(a).float() for a in load_breast_cancer(return_X_y=True))
    train, rest = _split(len(y), n, seed)
    x, y = _standardized(x, train), y.unsqueeze(1)
    turn = torch.rand(n, 1, generator=generator_of(seed, "flips")) < noise
    given = torch.where(turn, 1 - y[train], y[train])
    return NoisyData(x[train], given, x[rest], binary_costs(y[rest], noise))


def diabetes(seed: int, *, n: int) -> NoisyData:
    """Progression of 442 patients from 10 measurements (scikit-learn's copy)."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes(return_X_y=True, scaled=False)
    x, y = (torch.as_tensor(a).float() for a in data)
    train, rest = _split(len(y), n, seed)
    x, y = _standardized(x, train), _standardized(y.unsqueeze(1), train)
    fresh = y[rest]
    return NoisyData(x[train], y[train], x[rest], partial(squared_error, targets=fresh))


def countries(seed: int, *, training: int) -> NoisyData:
    """Life expectancy in 142 countries in twelve years (plotly's copy of Gapminder's table).

    From wealth, population, year and continent; a group is a country, and fresh ones are others.

    Args:
        seed: of the choice of countries.
        training: countries, of twelve rows each.
    """
    from plotly.data import gapminder

    table = gapminder(return_type="pandas")
    numbers = np.stack([np.log(table["gdpPercap"]), np.log(table["pop"]), table["year"]], 1)
    _, continent = np.unique(table["continent"], return_inverse=True)
    _, country = np.unique(table["country"], return_inverse=True)
    group = torch.from_numpy(country)
    train = torch.isin(group, _split(int(group.max()) + 1, training, seed)[0])
    x = torch.cat(
        [
            _standardized(torch.from_numpy(numbers).float(), train),
            torch.nn.functional.one_hot(torch.from_numpy(continent)).float(),
        ],
        1,
    )
    y = _standardized(torch.tensor(table["lifeExp"].to_numpy().copy()).float().unsqueeze(1), train)
    fresh = y[~train]
    ids, fresh_ids = (group[rows].unique(return_inverse=True)[1] for rows in (train, ~train))
    return NoisyData(
        x[train], y[train], x[~train], partial(squared_error, targets=fresh), ids, fresh_ids
    )


def _split(count: int, training: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions for training, and the others."""
    order = torch.randperm(count, generator=generator_of(seed, "rows"))
    return order[:training], order[training:]


def _standardized(values: Tensor, training: Tensor) -> Tensor:
    """Columns (n, d) in standard deviations of the training rows from their means."""
    return (values - values[training].mean(0)) / values[training].std(0)
