"""Find wrong labels from the predictions that a run makes on its own training set anyway."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from poprisk._validate import check_choice, check_number, check_type
from poprisk.audit.data import Indexed
from poprisk.audit.gather import gather
from poprisk.audit.judge import Audited, check_memory, judge, look_at, margins_of
from poprisk.audit.looks import Look, Predictions, memory_of
from poprisk.audit.planted import planted_labels
from poprisk.audit.rate import Rate
from poprisk.audit.result import AuditResult
from poprisk.dtensor import processes
from poprisk.losses import IGNORED
from poprisk.printing import described

MEMORIZED = 0.2
"""Memorization of planted labels from which predictions are not believed."""
MAX_MEMORY = 8 << 30
"""Bytes that predictions may take in memory, and likewise a noise matrix."""
UNPLANTED = (
    "no labels were planted, so that nothing shows whether labels were memorized; plant=0.05"
)


@final
class Auditor:
    r"""Find wrong labels while a model trains on them.

    A run behind the gate hardly follows wrong labels, so its predictions on its own training set
    are nearly out of sample [ours]. Labels planted wrong certify that: how many of them are found,
    and how much of them is memorized. Looks (passes over the data) that memorize more than
    ``limit`` do not count, unless all of them do.

    Args:
        targets: all training labels, by ``kind``: classes (n,); zeros and ones (n,) or (n, 1) of
            one logit; (n, k) of k logits; numbers (n, ...); 1 where the first of a pair is said to
            be the better one (n,), the output being its score minus the other's; or classes of
            tokens (n, t), padded by ``ignore_index``. Or :class:`poprisk.Canaries` made of them.
        kind: ``"classes"``, ``"binary"``, ``"multilabel"``, ``"regression"``, ``"preferences"`` or
            ``"tokens"``.
        plant: share of the labels to replace; train on :attr:`targets` then. 0 plants none, and
            the result says that nothing certifies it.
        classes: number of classes; counted if left out.
        structure: False leaves the noise matrix out.
        limit: memorization from which a look is not believed.
        seed: of what is planted.
        probabilities: whether outputs are probabilities; logits by default.
        ignore_index: the label that stands for none; such items are predicted.
        dtype: of the predictions that are kept; see :class:`poprisk.audit.looks.Predictions`.
        directory: where to keep them in files instead of in memory, one folder a process; files of
            a run before are overwritten, a checkpoint holds what they hold.
        max_memory: bytes that they may take in memory, and likewise the noise matrix.

    Attributes:
        targets: the labels to train on, in the host's memory. What goes into the loss must be
            these, and what goes into :meth:`update` what goes into the loss: planted labels that
            were never trained on look like labels that were not memorized.
        looks: what each pass over the data was like.

    Raises:
        TypeError, ValueError: for a bad argument.

    Example:
        >>> labels = torch.arange(100) % 4
        >>> auditor = Auditor(labels)
        >>> for index in torch.arange(100).split(20):
        ...     outputs = 9 * torch.eye(4)[labels[index]]
        ...     auditor.update(index, outputs, auditor.targets[index])
        >>> auditor.result().recall.value
        1.0
    """

    def __init__(
        self,
        targets: Any,
        *,
        kind: str = "classes",
        plant: float = 0.05,
        classes: int | None = None,
        structure: bool = True,
        limit: float = MEMORIZED,
        seed: int = 0,
        probabilities: bool = False,
        ignore_index: int = IGNORED,
        dtype: torch.dtype | None = None,
        directory: Any = None,
        max_memory: float = MAX_MEMORY,
    ) -> None:
        check_number("plant", plant, low=0.0, high=0.5)
        self.limit = check_number("limit", limit, low=0.0, include_low=False)
        check_choice("dtype", str(dtype or torch.float32), ("torch.float16", "torch.float32"))
        self.structure, self.probabilities = structure, probabilities
        self.items, self.planted, self.targets = planted_labels(
            targets,
            kind=kind,
            plant=plant,
            classes=classes,
            seed=seed,
            ignore_index=ignore_index,
        )
        numbers = self.items.classes is None
        if numbers and dtype == torch.float16:
            raise ValueError("dtype=torch.float16 does not hold numbers of any size; leave it out.")
        size = (len(self.items.labels), self.items.width)
        kept = 0 if directory is not None else memory_of(*size, dtype, numbers=numbers)
        check_memory(kept, self.items.classes, structure=structure, max_memory=max_memory)
        self.predictions = Predictions(
            *size, dtype=dtype, directory=_of_this_process(directory), numbers=numbers
        )
        # What training is to get, whatever becomes of the public tensor.
        self._trained = self.targets.clone()
        self.looks: list[Look] = []
        self.not_finite = 0

    def __repr__(self) -> str:
        planted = 0 if self.planted is None else len(self.planted.index)
        return described(
            "Auditor",
            self.items.kind,
            f"{len(self.items.targets):,} examples",
            planted=planted,
            looks=len(self.looks),
        )

    def update(self, index: Any, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch as it is trained on; no forward pass of its own.

        A look ends by itself when an example comes again and at least half of them have come.

        Args:
            index: positions of the batch's examples in the training set, integers (b,).
            outputs: of the model on it, (b, ...); logits, whatever is kept of them is a copy.
            targets: what it is trained on, (b, ...), from :attr:`targets`.

        Raises:
            TypeError, ValueError: if they do not fit, or targets are other ones.
        """
        items, found = self.items.read(
            index, outputs, targets, self._trained, probabilities=self.probabilities
        )
        half = len(self.predictions.seen) / (2 * processes())
        if self.predictions.passed >= half and bool(self.predictions.seen[items].any()):
            self.end_look()
        finite = found.isfinite().all(1)
        self.not_finite += int((~finite).sum())
        self.predictions.note(items[finite], found[finite])

    def end_look(self) -> None:
        """End a pass over the data, as at the end of an epoch; nothing if no example came."""
        kept = self.predictions
        rows = kept.seen.nonzero().squeeze(1)
        if not len(rows):
            return
        memorization = None
        if self.planted is not None:
            memorization = self.planted.memorization(kept.present, kept.seen)
        look = look_at(self.items, kept.present, rows, memorization, number=len(self.looks) + 1)
        # What too few planted labels say of a look is noise.
        memorized = (
            memorization is not None and memorization.valid and memorization.value > self.limit
        )
        look = look._replace(believed=not memorized)
        kept.close(look, margins_of(self.items, kept.present, rows))
        self.looks.append(look)

    def result(self, *, average: bool = True) -> AuditResult:
        """What was found; it ends the present look.

        With several processes every one of them must call it, and each gets the same.

        Args:
            average: over the believed looks, later ones weighing more; False takes each example's
                last one.

        Raises:
            RuntimeError: if no example was passed to :meth:`update`.
        """
        self.end_look()
        found = gather(self.predictions, self.looks, self.not_finite)
        if not found.looks and found.not_finite:
            raise RuntimeError(
                f"all {found.not_finite} predictions were NaN or Inf: the training has diverged."
            )
        if not found.looks:
            raise RuntimeError("the auditor has seen no batch; call update() in the training loop.")
        audited = Audited(
            found.average if average else found.last,
            found.weight > 0,
            history=found.history[:, : len(found.kept)],
            history_looks=tuple(found.kept),
            looks=tuple(found.looks),
            not_finite=found.not_finite,
        )
        return judge(
            self.items,
            audited,
            self.planted,
            structure=self.structure,
            limit=self.limit,
            uncertified=UNPLANTED,
        )

    def dataset(self, dataset: Any, *, label: str = "labels", index: str = "index") -> Dataset[Any]:
        """A map-style data set with the labels to train on, and each example's position.

        Args:
            dataset: whose items are tuples (inputs, ..., target) or dicts.
            label: name of the target in a dict.
            index: name that the position gets in a dict; in a tuple it comes last.

        Raises:
            TypeError, ValueError: if it has another length, or none.
        """
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                f"dataset must have a length and examples by position, but got "
                f"{type(dataset).__name__}; a stream of examples does not say which is which."
            )
        if len(dataset) != len(self.targets):
            raise ValueError(
                f"dataset has {len(dataset)} examples, but the auditor {len(self.targets)} targets."
            )
        return Indexed(dataset, self._trained, label=label, name=index)

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`result` depends on, for a run that is resumed."""
        return {
            "settings": self._settings(),
            "predictions": self.predictions.state_dict(),
            "looks": [_plain(look) for look in self.looks],
            "not_finite": self.not_finite,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state of the same settings, bit for bit.

        Raises:
            TypeError, ValueError: if it is no such state, or one of other settings or labels;
                nothing is changed then.
        """
        check_type("state_dict", state_dict, Mapping, "what state_dict() returned")
        missing = {"settings", "predictions", "looks", "not_finite"} - set(state_dict)
        if missing:
            raise ValueError(f"state_dict lacks {', '.join(sorted(missing))}.")
        for name, mine in self._settings().items():
            other = state_dict["settings"].get(name)
            if other != mine:
                raise ValueError(
                    f"state_dict is of an auditor with {name}={other!r}, but this one has {mine!r}."
                )
        self.predictions.load_state_dict(state_dict["predictions"])
        self.looks = [
            Look(**row | {"memorization": row["memorization"] and Rate(*row["memorization"])})
            for row in state_dict["looks"]
        ]
        self.not_finite = state_dict["not_finite"]

    def _settings(self) -> dict[str, Any]:
        """What the numbers depend on besides the batches; of the labels a weighted sum."""
        flat = self._trained.double().flatten().nan_to_num(0.0)
        return {
            "kind": self.items.kind,
            "classes": self.items.classes,
            "items": len(self.items.labels),
            "limit": self.limit,
            "probabilities": self.probabilities,
            "dtype": str(self.predictions.dtype),
            "labels": float(flat @ torch.linspace(1, 2, len(flat), dtype=torch.float64)),
        }


def _of_this_process(directory: Any) -> Any:
    """A folder of its own: processes that share files would overwrite each other's."""
    if directory is None or processes() == 1:
        return directory
    return Path(directory) / str(torch.distributed.get_rank())


def _plain(look: Look) -> dict[str, Any]:
    """A look without classes of ours, as ``torch.load(weights_only=True)`` takes it."""
    rate = look.memorization
    return look._asdict() | {"memorization": None if rate is None else tuple(rate)}
