"""What a task is: a model, a per-example loss, data, a metric, and how long to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from poprisk._validate import check_choice, check_positive
from poprisk.printing import described
from poprisk.task.data import BATCH, Pair, as_data, as_tensor, check_raw
from poprisk.task.metrics import METRICS, Metric, accuracy
from poprisk.task.trial import try_task

__all__ = ["METRICS", "Metric", "Pair", "Task", "module_kinds"]


@dataclass(frozen=True)
class Task:
    """A learning problem that `poprisk compare` can train on.

    Args:
        name: short name, used in reports.
        model: makes a fresh model; called after the random seed is set.
        loss: per-example loss, from outputs (b, ...) and targets (b, ...) to a tensor (b,).
        train: training inputs and targets: a pair of tensors, arrays or frames; or a map-style data
            set of such pairs, a ``DataLoader`` of one (whose ``collate_fn``, ``batch_size`` and
            ``drop_last`` are kept), or a pair of one and targets. These are read batch by batch, in
            the process that trains, whenever an example's turn comes.
        test: the same for the test set, used for measuring only.
        metric: ``"accuracy"``, ``"balanced accuracy"``, ``"f1"`` (macro), ``"auc"`` (of the ROC
            curve), ``"mse"``, or a :class:`Metric`.
        epochs: passes over the training set.
        batch_size: examples per step; left out, the loader's, or 64.
        clean: training targets without label noise, where they are known: shape of the targets.
        description: one line for the report.
        drop_last: whether to leave out a last batch that is not full.
        raw: what people are shown of the training and of the test examples, a pair: pictures
            (n, h, w) or (n, h, w, 3), texts, or tables (a frame, or columns by name), a row an
            example; left out, the inputs themselves, where they are pictures or short.

    When it is made, a fresh model is evaluated on both sets, scored, and trained on one batch of
    each size that occurs (:mod:`poprisk.task.trial`), so that nothing fails in the middle of a
    comparison.

    Raises:
        TypeError, ValueError: if a part has the wrong type, or the parts do not fit each other.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    train: Any
    test: Any
    metric: str | Metric = "accuracy"
    epochs: int = 100
    batch_size: int = cast(int, None)
    clean: Any = None
    description: str = ""
    drop_last: bool = False
    raw: Any = None

    def __repr__(self) -> str:
        sizes = f"{len(self.train[1]):,} training and {len(self.test[1]):,} test examples"
        epochs, batches = f"{self.epochs} epochs", f"batches of {self.batch_size}"
        return described("Task", repr(self.name), sizes, self.scored_by.name, epochs, batches)

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            check_positive("batch_size", self.batch_size)
        for name in ("train", "test"):
            found = as_data(name, getattr(self, name), batch_size=self.batch_size)
            object.__setattr__(self, name, (found.inputs, found.targets))
            if name == "train":
                object.__setattr__(self, "drop_last", self.drop_last or found.drop_last)
                object.__setattr__(self, "batch_size", self.batch_size or found.batch_size or BATCH)
        if self.clean is not None:
            object.__setattr__(self, "clean", as_tensor("clean", self.clean))
        if self.raw is not None:
            check_raw(self.raw, (len(self.train[1]), len(self.test[1])))
        if isinstance(self.metric, str):
            check_choice("metric", self.metric, METRICS)
            object.__setattr__(self, "metric", METRICS[self.metric])
        check_positive("epochs", self.epochs)
        if self.batch_size >= len(self.train[1]):
            raise ValueError(
                f"batch_size={self.batch_size} must be smaller than the number of training "
                f"examples, {len(self.train[1])}: the gate measures noise from batch to batch."
            )
        try_task(self, by_class=self.scored_by.by_class)

    def new_model(self, device: str = "cpu") -> nn.Module:
        """A fresh model on a device; lazy modules take their shapes from the first examples."""
        model = self.model()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a function that returns a torch.nn.Module, but it returned "
                f"{type(model).__name__}."
            )
        model = model.to(device)
        if any(is_lazy(t) for t in (*model.parameters(), *model.buffers())):
            model.eval()
            model(self.train[0][:2].to(device))
            model.train()
        return model

    @property
    def scored_by(self) -> Metric:
        """The metric, resolved."""
        return cast(Metric, self.metric)

    @property
    def classification(self) -> bool:
        """Whether targets are class indices."""
        return not self.train[1].is_floating_point() and not self.train[1].is_complex()

    @property
    def noise_known(self) -> bool:
        """Whether some training target is known to be wrong."""
        return self.clean is not None and bool((self.train[1] != self.clean).any())

    def memorized(self, outputs: Tensor) -> float | None:
        r"""How much of the label noise ``outputs`` on the training set reproduce.

        Classes: the share of wrong labels that are predicted. Numbers: the regression coefficient
        of the outputs' deviation on the noise, :math:`\langle f - y_{clean}, e\rangle/\|e\|^2`
        with :math:`e = y - y_{clean}`. None where the noise is unknown or absent.
        """
        if self.clean is None:
            return None
        y = self.train[1]
        if self.classification:
            wrong = y != self.clean
            own = self.scored_by.name == "accuracy"  # of outputs of a form of their own, perhaps
            share = self.scored_by.function if own else accuracy
            return float(share(outputs[wrong], y[wrong])) if bool(wrong.any()) else None
        noise = (y - self.clean).double()
        if not bool(noise.any()):
            return None
        deviation = (outputs.reshape(y.shape) - self.clean).double()
        return float((deviation * noise).sum() / noise.square().sum())


def module_kinds(model: nn.Module) -> dict[str, str]:
    """What each module with parameters of its own is, by name, as ``Linear(64, 256)``.

    Example:
        >>> module_kinds(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Conv1d(3, 5, 2)))
        {'0': 'Linear(64, 256)', '2': 'Conv1d(3, 5, 2)'}
    """
    return {
        name: _kind(module)
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }


def _kind(module: nn.Module) -> str:
    """Class and sizes, the inputs first, as torch's layers take them."""
    own = [tuple(p.shape) for p in module.parameters(recurse=False)]
    sizes = max(own, key=len)  # the weight, not the bias
    if isinstance(module, nn.Linear):
        sizes = (module.in_features, module.out_features)
    elif isinstance(module, nn.modules.conv._ConvNd):
        sizes = (module.in_channels, module.out_channels, *module.kernel_size)
    return f"{type(module).__name__}({', '.join(map(str, sizes))})"
