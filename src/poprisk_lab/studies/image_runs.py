"""Training a network on a picture: signal-to-noise ratio along the run, the picture at its end."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import torch
from torch import Tensor, nn

from poprisk.task import Task
from poprisk_lab.controls import UpdateTrace
from poprisk_lab.studies.claim import Found, Workspace
from poprisk_lab.studies.curves import rounded
from poprisk_lab.studies.optimizers import Step, make_optimizer, train_with_control
from poprisk_lab.tasks.image import image

GAP = 4
ENLARGED = 4


def run(settings: dict[str, Any], workspace: Workspace) -> Found:
    """Train one network on one noisy picture, and beside it AdamW at its update sizes if asked."""

    def train(arm: str, trace: UpdateTrace | None, step: Step) -> list[Found]:
        return [_train(settings, arm, trace, step, seed) for seed in settings["seeds"]]

    return train_with_control(train, settings["arm"], matched=settings["matched"])


def task_of(settings: dict[str, Any], seed: int) -> Task:
    """The noisy picture of a trial."""
    names = ("noise", "size", "network", "picture")
    return image(seed, **{name: settings[name] for name in names})


def _train(
    settings: dict[str, Any], arm: str, trace: UpdateTrace | None, step: Step, seed: int
) -> Found:
    task = task_of(settings, seed)
    x, y = task.train
    torch.manual_seed(seed)
    model = task.model()
    optimizer = make_optimizer(
        arm,
        model,
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        batch_size=task.batch_size,
        dataset_size=len(x),
        trace=trace,
    )
    generator = torch.Generator().manual_seed(seed)
    quality = []
    for epoch in range(1, settings["epochs"] + 1):
        for batch in torch.randperm(len(x), generator=generator).split(task.batch_size):
            optimizer.zero_grad()
            task.loss(model(x[batch]), y[batch]).mean().backward()
            step(optimizer)
        if epoch % settings["every"] == 0:
            quality.append(psnr(_outputs(model, x), task.test[1]))
    return _found(task, _outputs(model, x), quality, keep=seed in settings["keep"])


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def _found(task: Task, end: Tensor, quality: list[float], *, keep: bool) -> Found:
    best = max(quality)
    memorized = task.memorized(end)
    return {
        "quality": rounded(quality),
        "final": round(quality[-1], 4),
        "best": round(best, 4),
        "lost": round(best - quality[-1], 4),
        "best_at": quality.index(best),
        "memorized": None if memorized is None else round(memorized, 4),
        "picture": encode(square(end)) if keep else "",
    }


def psnr(outputs: Tensor, clean: Tensor) -> float:
    r"""Peak signal-to-noise ratio :math:`-10 \log_{10}` of the mean squared error, in dB.

    The peak is 1; both of one shape.

    Example:
        >>> psnr(torch.full((4,), 0.1), torch.zeros(4))
        20.0
    """
    return round(-10 * math.log10(float((outputs - clean).double().square().mean())), 6)


def square(values: Tensor) -> Tensor:
    """Grey values (size², 1) as a picture (size, size) of bytes."""
    size = math.isqrt(len(values))
    return (values.reshape(size, size).clamp(0, 1) * 255).round().to(torch.uint8)


def encode(pixels: Tensor) -> str:
    """A picture (h, w) of bytes as a PNG in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def decode(png: str) -> Tensor:
    """The picture (h, w) of bytes that :func:`encode` made a PNG of."""
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(png)))))


def side_by_side(pictures: list[Tensor]) -> str:
    """Pictures of one size (h, w) in a row, enlarged, as a PNG in base64."""
    large = [p.repeat_interleave(ENLARGED, 0).repeat_interleave(ENLARGED, 1) for p in pictures]
    gap = torch.full((len(large[0]), GAP), 255, dtype=torch.uint8)
    return encode(torch.cat([part for p in large for part in (p, gap)][:-1], 1))
