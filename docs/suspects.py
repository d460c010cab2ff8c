"""Draw the README's picture of an audit: python docs/suspects.py docs/suspects.svg."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from figure import STYLE
from torch.nn import functional as F

from poprisk import Auditor, Canaries, PopRiskAdamW
from poprisk.audit import AuditResult
from poprisk_lab.audit.nets import build, recipe_for
from poprisk_lab.audit.training import batches
from poprisk_lab.pictures import encode
from poprisk_lab.tasks.mislabelled import Mislabelled, mislabelled

SEED, COLUMNS, ROWS = 0, 10, 2
SIDE, WIDE, HIGH, TOP = 56, 91, 104, 46


def audited(data: Mislabelled) -> AuditResult:
    """One training behind the gate, by the rule of ``poprisk audit``, and what it found."""
    recipe = recipe_for(len(data.x), tuple(data.x.shape[1:]))
    auditor = Auditor(Canaries(data.given, fraction=0.05, classes=data.classes, seed=SEED))
    model = build(recipe, data.x, data.classes, SEED)
    optimizer = PopRiskAdamW(
        model, lr=recipe.lr, batch_size=recipe.batch_size, dataset_size=len(data.x)
    )
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(recipe.epochs):
        for index in batches(torch.randperm(len(data.x), generator=generator), recipe.batch_size):
            outputs = model(data.x[index])
            auditor.update(index, outputs, auditor.targets[index])
            optimizer.zero_grad()
            F.cross_entropy(outputs, auditor.targets[index]).backward()
            optimizer.step()
    return auditor.result()


def draw(data: Mislabelled, found: AuditResult) -> str:
    """The surest suspects, and how many of the wrong labels are among all of them."""
    wrong = data.wrong.numpy()
    right = int(wrong[found.suspects()].sum())
    title = (
        f"{len(found.suspects())} suspects among {len(wrong):,} digits of which {wrong.sum()} are "
        f"labelled wrong; {right} of these are found. The surest:"
    )
    width = COLUMNS * WIDE + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + ROWS * HIGH}" '
        f'role="img" aria-label="Wrong labels of digits that an audit found">{STYLE}'
        f'<rect class="bg" width="{width}" height="{TOP + ROWS * HIGH}" rx="6"/>'
        f'<text class="t" x="22" y="26">{title}</text>'
    ]
    for k, i in enumerate(found.suspects()[: COLUMNS * ROWS]):
        x, y = 22 + k % COLUMNS * WIDE, TOP + k // COLUMNS * HIGH
        pixels = (255 - 255 * data.x[i].reshape(8, 8)).byte()
        parts.append(
            f'<image x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{encode(pixels)}"/>'
            f'<text x="{x + SIDE / 2}" y="{y + SIDE + 17}" text-anchor="middle">'
            f'<tspan text-decoration="line-through">{found.labels[i]}</tspan> → '
            f'<tspan font-weight="600">{found.suggested[i]}</tspan></text>'
        )
    return "".join([*parts, "</svg>"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    digits = mislabelled("digits", "random", 0.2, seed=SEED)
    Path(sys.argv[1]).write_text(draw(digits, audited(digits)), encoding="utf-8")
