"""Population risk of a Lightning run, and when to stop it, without validation data.

Example::

    loader = DataLoader(indexed, batch_size=64, shuffle=True)  # (x, y, index) an example
    callback = LightningTwinCallback(torch.nn.CrossEntropyLoss(reduction="none"), stop=True)
    trainer = lightning.Trainer(callbacks=[callback], ...)
    trainer.fit(module, loader)
    print(callback.curve.point)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from poprisk.evaluation import Forward
from poprisk.integrations.twins import TwinFollower
from poprisk.monitor.steps import innermost
from poprisk.protocols import PerExampleLoss
from poprisk.risk.curve import PATIENCE
from poprisk.risk.lockstep import Clip, Lockstep

Split = Callable[[Any], tuple[Any, Tensor, Tensor]]


@final
class LightningTwinCallback(TwinFollower, Callback):
    """A twin in lockstep with a module: a curve of its risk, from its training data.

    The module is trained as it would be alone, the twin after each step of its optimizer (see
    :class:`poprisk.Lockstep`), which is another training of the same length for each probe, and an
    estimate passes over the whole training set. Outputs are those of the module's ``forward``,
    which ``training_step`` calls once a batch. The twin's state is saved with Lightning's
    checkpoints, and a resumed run goes on with the same curve.

    For one optimizer and automatic optimization, on one device, in single precision or
    ``bf16-mixed``; what cannot be followed is refused when training begins.

    Args:
        loss: one value an example, from outputs (b, ...) and targets (b, ...): what the
            ``training_step`` returns the mean of.
        every: optimizer steps between estimates; an epoch if left out.
        stop: whether to end training once the best moment is past: the last ``patience`` estimates
            are each worse than the best by more than 1.5 standard errors of the difference, or
            comparable no more.
        patience: of ``stop``.
        keep_best: whether to give the module the weights of :func:`poprisk.stopping_point` when
            training ends.
        split: from a batch to inputs, targets and positions of its examples; by default a tuple
            of these three.
        forward: from the module and inputs to outputs, for estimates; its ``forward`` by default.
        log: whether to hand estimates to Lightning's loggers.
        delta: as for :class:`poprisk.TwinRisk`.
        probes: likewise.
        seed: likewise.
        sinks: where estimates go too, as for :class:`poprisk.RiskMonitor`.
        leave_out: as for :class:`poprisk.TwinRisk`.

    Attributes:
        curve: the estimates so far.
    """

    def __init__(
        self,
        loss: PerExampleLoss,
        *,
        every: int | None = None,
        stop: bool = False,
        patience: int = PATIENCE,
        keep_best: bool = False,
        split: Split | None = None,
        forward: Forward | None = None,
        log: bool = True,
        delta: float = 0.3,
        probes: int = 1,
        seed: int = 0,
        sinks: Any = (),
        leave_out: float | None = None,
    ) -> None:
        super().__init__(
            loss,
            every=every,
            stop=stop,
            patience=patience,
            keep_best=keep_best,
            sinks=sinks,
            delta=delta,
            probes=probes,
            seed=seed,
            leave_out=leave_out,
        )
        self.log = log
        self.split, self.forward = split or three, forward
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The twin and the curve."""
        lockstep = None if self._lockstep is None else self._lockstep.state_dict()
        return {"lockstep": lockstep, "curve": self.curve.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, when training begins."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the twin, or take up that of a checkpoint.

        Raises:
            ValueError: if it cannot follow this training.
        """
        _check(trainer, pl_module)
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"a twin takes its examples from one DataLoader, but the trainer has a "
                f"{type(loader).__name__}."
            )
        self._loader = DataLoader(
            loader.dataset, batch_size=loader.batch_size or 1, collate_fn=loader.collate_fn
        )
        self._lockstep = Lockstep(
            pl_module,
            innermost(trainer.optimizers[0]),
            self.loss,
            dataset_size=loader.dataset,
            forward=self.forward,
            clip=_clipping(trainer),
            **self._settings,
        )
        if self._loaded is not None and self._loaded["lockstep"] is not None:
            self._lockstep.load_state_dict(self._loaded["lockstep"])
            self.curve.load_state_dict(self._loaded["curve"])
        elif trainer.global_step:
            raise ValueError(
                "the checkpoint that training goes on from has no twin: one that begins now would "
                "not show what was learned before; start anew, or leave the callback out."
            )
        self._loaded = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Say which examples the batch is of."""
        assert self._lockstep is not None
        _, targets, index = self.split(batch)
        self._lockstep.batch(index.cpu(), targets)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Estimate, if it is time, before validation and checkpoints of this step."""
        step = trainer.global_step
        if self.every is None:
            if not trainer.is_last_batch:
                return
        elif step % self.every or (self.curve.steps and self.curve.steps[-1] == step) or not step:
            return  # a step of several batches ends with the last of them
        row = self._estimate(step, self._batches(pl_module), pl_module)
        if self.log:
            pl_module.log_dict(row)
        if self._send(step, row):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow no more, and go back to the best weights if they are to be kept."""
        self._finish(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Follow no more."""
        self._unfollow()

    def _batches(self, module: LightningModule) -> Iterator[tuple[Any, Tensor, Tensor]]:
        assert self._loader is not None
        for batch in self._loader:
            yield self.split(module.transfer_batch_to_device(batch, module.device, 0))


def check_one_optimizer(trainer: Trainer, module: LightningModule, instead: str) -> None:
    """Raise ValueError unless one optimizer steps once a batch.

    Args:
        trainer: that trains.
        module: what it trains.
        instead: class to use in a loop of one's own.
    """
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        raise ValueError(
            f"automatic optimization with one optimizer is followed, but "
            f"{type(module).__name__} has {len(trainer.optimizers)}"
            f"{'' if module.automatic_optimization else ' and steps by itself'}; train a {instead} "
            "in a loop of your own."
        )


def _check(trainer: Trainer, module: LightningModule) -> None:
    """Raise ValueError for settings that a twin cannot follow."""
    check_one_optimizer(trainer, module, "TwinRisk")
    if str(trainer.precision) not in ("32-true", "64-true", "bf16-mixed", "bf16-true"):
        raise ValueError(
            f"a twin does not follow training with precision={trainer.precision!r}, whose "
            'gradients are scaled; use "bf16-mixed" or "32-true".'
        )


def three(batch: Any) -> tuple[Any, Tensor, Tensor]:
    """A batch that is inputs, targets and positions."""
    if isinstance(batch, Mapping) or len(batch) != 3:
        raise ValueError(
            "a batch must hold inputs, targets and positions of its examples in the training set, "
            "such as TensorDataset(x, y, torch.arange(len(x))) gives; pass split= for others."
        )
    x, targets, index = batch
    return x, targets, index


def _clipping(trainer: Trainer) -> Clip | None:
    """What the trainer does to gradients."""
    value: Any = trainer.gradient_clip_val
    if not value:
        return None
    clip: Any = clip_grad_value_ if trainer.gradient_clip_algorithm == "value" else clip_grad_norm_

    def clipping(model: nn.Module, optimizer: Optimizer) -> None:
        clip([p for group in optimizer.param_groups for p in group["params"]], float(value))

    return clipping
