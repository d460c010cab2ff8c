"""What can be asked of a trained network: one test prediction, or the mean loss of some of them."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from poprisk import losses
from poprisk.attribution import Replay
from poprisk.task import Task

TEST, WRONG, CLASS, PREDICTION = "test", "wrong", "class", "prediction"
MOST_NAMES = 12
"""Labels that a message lists."""


class Query(NamedTuple):
    """A question.

    Attributes:
        kind: ``"test"``, the mean loss of the whole test set; ``"class"``, that of one class;
            ``"prediction"``, of one test example; ``"wrong"``, of the first that are wrong.
        which: the class, or the position in the test set; -1: none.
    """

    kind: str
    which: int = -1

    @property
    def name(self) -> str:
        """Fit for the name of a file."""
        return self.kind if self.which < 0 else f"{self.kind}-{self.which}"

    @property
    def words(self) -> str:
        """For people."""
        kinds = {TEST: "the test set", CLASS: f"class {self.which}"}
        return kinds.get(self.kind, f"test example {self.which}")


def parse_query(text: str) -> Query:
    """What ``--query`` says.

    Raises:
        ValueError: if it is none of what can be asked.

    Example:
        >>> parse_query("17"), parse_query("class=3").name
        (Query(kind='prediction', which=17), 'class-3')
    """
    if text in (TEST, WRONG):
        return Query(text)
    if found := re.fullmatch(r"(class=)?(\d+)", text, flags=re.ASCII):
        return Query(CLASS if found[1] else PREDICTION, int(found[2]))
    raise ValueError(
        "--query must be a position in the test set (from 0), wrong, test or class=LABEL, but got "
        f"{text!r}."
    )


def check_query(query: Query, task: Task) -> None:
    """Raise ValueError unless a task has what is asked for."""
    m, y = len(task.test[1]), task.test[1]
    if query.kind == PREDICTION and query.which >= m:
        raise ValueError(
            f"--query {query.which} is no position in the test set of {task.name}, whose {m:,} "
            f"examples are 0 to {m - 1}."
        )
    if query.kind in (WRONG, CLASS) and not has_classes(task):
        asked = WRONG if query.kind == WRONG else f"class={query.which}"
        raise ValueError(
            f"--query {asked} needs one class an example as target, which {task.name} does not "
            "have; give a position in the test set, or test."
        )
    if query.kind == CLASS and not bool((y == query.which).any()):
        labels = [str(v) for v in y[y >= 0].unique().tolist()]
        more = f" and {len(labels) - MOST_NAMES} more" if len(labels) > MOST_NAMES else ""
        raise ValueError(
            f"--query class={query.which}: no test example of {task.name} has that label; there "
            f"are {', '.join(labels[:MOST_NAMES])}{more}."
        )


def has_classes(task: Task) -> bool:
    """Whether each target is one class."""
    return task.classification and task.test[1].ndim == 1


def predicted_classes(outputs: Tensor) -> Tensor:
    """The class of each row of scores (m, c), or of logits (m,) or (m, 1) of class 1, (m,)."""
    flat = outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]
    return (flat[:, 0] > 0).long() if flat.shape[1] == 1 else flat.argmax(1)


class PredictedClass(NamedTuple):
    """What the network says of one test example of a task with classes.

    Attributes:
        predicted: class.
        label: class; -1 where there is none.
        rival: the label where the prediction is wrong, else the class that comes second.
    """

    predicted: int
    label: int
    rival: int


def prediction_of(outputs: Tensor, label: int) -> PredictedClass:
    """Read off the outputs (c,) of one example."""
    scores = _scores(outputs)
    first, second = scores.topk(2).indices.tolist()
    label = label if 0 <= label < len(scores) else -1
    return PredictedClass(first, label, second if label in (first, -1) else label)


def _scores(outputs: Tensor) -> Tensor:
    """A score for each class, (c,); of one logit, which is that of class 1, two."""
    flat = outputs.flatten()
    return torch.stack([torch.zeros_like(flat[0]), flat[0]]) if len(flat) == 1 else flat


class Asked(NamedTuple):
    """A query in the terms of one trained network.

    Attributes:
        x: inputs that it looks at.
        y: their targets.
        quantity: what is measured, in words.
        prediction: of one example of a task with classes.
        output: of one example whose target is one number.
        target: its target.
        sign: of the output's error.
    """

    x: Tensor
    y: Tensor
    quantity: str
    prediction: PredictedClass | None = None
    output: float | None = None
    target: float | None = None
    sign: float = 1.0

    @property
    def measured(self) -> bool:
        """Whether it is no mean loss."""
        return self.prediction is not None or self.output is not None

    def measure(self, outputs: Tensor, _: Tensor | None) -> Tensor:
        """The margin of a prediction over its rival, or how far an output is off, to its side."""
        if self.prediction is not None:
            scores = _scores(outputs[0])
            return scores[self.prediction.predicted] - scores[self.prediction.rival]
        return self.sign * (outputs.flatten()[0] - self.y.to(outputs).flatten()[0])

    def value(self, run: Replay, w: Tensor) -> float:
        """What the query comes to at some weights (P,)."""
        u = outputs_at(run, w, self.x)
        if self.measured:
            return float(self.measure(u, self.y))
        return float(losses.values(run.problem.loss, u, self.y).mean())


def outputs_at(run: Replay, w: Tensor, x: Tensor) -> Tensor:
    """Outputs of the run's model at some weights (P,)."""
    return run.problem.shaped(run.problem.J.values(w, x)).detach()


def ask(query: Query, task: Task, run: Replay) -> Asked:
    """A query of a trained network.

    Args:
        query: one that the task has; not :data:`WRONG`.
        task: whose test set it is.
        run: at whose end the network is.
    """
    x, y = task.test
    if query.kind == TEST:
        return Asked(x, y, "mean test loss")
    if query.kind == CLASS:
        mine = y == query.which
        return Asked(x[mine], y[mine], f"mean test loss of class {query.which}")
    x, y = x[query.which : query.which + 1], y[query.which : query.which + 1]
    u = outputs_at(run, run.final, x)
    if has_classes(task):
        found = prediction_of(u[0], int(y[0]))
        return Asked(x, y, f"margin of {found.predicted} over {found.rival}", found)
    if u.numel() == y.numel() == 1:
        output, target = float(u), float(y)
        above = output >= target
        what = "output minus target" if above else "target minus output"
        return Asked(x, y, what, None, output, target, 1.0 if above else -1.0)
    return Asked(x, y, "loss")
