"""Estimates of influence by maintained packages: EKFAC by kronfluence, TRAK by traker.

Both read the weights at the end and nothing of the training; bergson's, in a module of its own,
goes through it. Signs are as in :mod:`poprisk`: positive where an example raised the query's loss.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from poprisk.attribution import Replay
from poprisk.forward_mode import plain_kernels
from poprisk_lab.studies.influence_magic import Loss, magic, model_at

PROJECTED = 100
"""Dimensions of TRAK's projection: fewer than examples, or its kernel is singular."""

Estimate = Callable[[Replay, Loss], Tensor]


def data_of(done: Replay) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and query examples."""
    x, y = done.problem.query
    assert y is not None
    return done.problem.train, (x, y)


def sampled(u: Tensor) -> Tensor:
    """Targets drawn from what a model says: of classes, or of numbers with unit variance."""
    if u.shape[1] == 1:
        return u + torch.randn_like(u)
    return torch.multinomial(u.softmax(1), 1).squeeze(1)


def ekfac(done: Replay, loss: Loss) -> Tensor:
    """Influence functions with eigenvalue-corrected Kronecker factors, (q, n).

    Grosse et al. 2023, arXiv:2308.03296. Of the layers that kronfluence supports: here all that
    are exactly ``nn.Linear``, which attention's and embeddings are not.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class PerExample(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            u = model(x)
            return loss(u, sampled(u.detach()) if sample else y).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [name for name, m in model.named_modules() if type(m) is nn.Linear]

    model = model_at(done, done.final)
    names = PerExample().get_influence_tracked_modules()
    assert names
    train, query = (TensorDataset(*t) for t in data_of(done))
    task = PerExample()
    with tempfile.TemporaryDirectory() as folder, plain_kernels(model):
        prepared = prepare_model(model, task)
        analyzer = Analyzer(
            "study", prepared, task, cpu=True, output_dir=folder, disable_tqdm=True,
            log_level=logging.ERROR,
        )  # fmt: skip
        analyzer.fit_all_factors(
            "factors", train, per_device_batch_size=len(train),
            factor_args=FactorArguments(strategy="ekfac"),
        )  # fmt: skip
        analyzer.compute_pairwise_scores(
            "scores", "factors", query, train, len(query), per_device_train_batch_size=len(train)
        )
        found = analyzer.load_pairwise_scores("scores")
    assert found is not None
    return -found["all_modules"]


def trak(done: Replay, loss: Loss) -> Tensor:
    """TRAK on the one model at the end, (q, n): Park et al. 2023, arXiv:2303.14186."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput, ImageClassificationModelOutput

    class Number(AbstractModelOutput):
        """The output itself; the squared error's descent direction leads away from it."""

        def __init__(self) -> None:
            pass

        def get_output(self, model: Any, weights: Any, buffers: Any, x: Tensor, _: Tensor) -> Any:
            return torch.func.functional_call(model, (weights, buffers), x.unsqueeze(0)).sum()

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Any:
            x, y = batch
            return (y - torch.func.functional_call(model, (weights, buffers), x)).detach()

    train, query = data_of(done)
    model = model_at(done, done.final)
    with torch.no_grad():
        numbers = model(query[0]).shape[1] == 1
    task = Number() if numbers else ImageClassificationModelOutput()
    with tempfile.TemporaryDirectory() as folder, plain_kernels(model):
        settings: dict[str, Any] = {
            "save_dir": str(Path(folder) / "trak"), "device": "cpu", "proj_dim": PROJECTED,
            "use_half_precision": False, "logging_level": logging.ERROR,
        }  # fmt: skip
        weights = model.state_dict()
        tracer = TRAKer(model, task, len(train[0]), **settings)
        tracer.load_checkpoint(weights, model_id=0)
        tracer.featurize(train, num_samples=len(train[0]))
        tracer.finalize_features()
        # Another one reads the features: the projection of this one is gone by now.
        tracer = TRAKer(model, task, len(train[0]), **settings)
        tracer.start_scoring_checkpoint("study", weights, model_id=0, num_targets=len(query[0]))
        tracer.score(query, num_samples=len(query[0]))
        scores = torch.as_tensor(tracer.finalize_scores("study")).T.clone()
        slope = task.get_out_to_loss_grad(
            model, dict(model.named_parameters()), dict(model.named_buffers()), query
        )
    return -slope.reshape(-1, 1) * scores


RIVALS: Mapping[str, tuple[str, Estimate]] = {
    "EKFAC (kronfluence)": ("kronfluence", ekfac),
    "TRAK (traker)": ("trak", trak),
    "MAGIC (bergson)": ("bergson", magic),
}
"""By name: the package that it needs, and the estimate."""
