"""An audit as one HTML page that a person can work with: look at suspects, mark them, download."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from poprisk.audit import AuditResult, Rate
from poprisk_lab.audit.examples import AuditExamples
from poprisk_lab.audit.study import Judgement
from poprisk_lab.audit.words import details, headline, notices
from poprisk_lab.page import draw
from poprisk_lab.page.page import template
from poprisk_lab.plots import Line, Plot, Table
from poprisk_lab.store import Row, Store, replace_text

MOST_SUSPECTS = 10_000
MOST_PICTURES = 3_000
THUMBNAIL = 64
MOST_TEXT = 600
"""Letters of a cell that are shown."""
MOST_CLASSES = 30
COLUMNS = "row name given suggested told picture shown search".split()


def write_audit(
    path: Path,
    source: str,
    examples: AuditExamples,
    judged: Judgement,
    store: Store,
    *,
    apply: str = "",
    folds: str = "",
) -> None:
    """Write the page, atomically.

    Args:
        path: of the page.
        source: what was audited, as it was called.
        examples: as they were read.
        judged: what was found.
        store: of the run, for its settings and its environment.
        apply: the command that writes the corrected table; empty if it is none.
        folds: the command that trains on parts of the data; empty if it has none.

    Raises:
        OSError: if it cannot be written; an existing file is left as it was.
    """
    result, config = judged.result, store.config()
    suspects = result.suspects()
    probabilities = None if result.kind == "regression" else result.pred_probs
    shown = [
        _suspect(examples, result, probabilities, int(item), picture=i < MOST_PICTURES)
        for i, item in enumerate(suspects[:MOST_SUSPECTS])
    ]
    more = []
    if len(suspects) > MOST_SUSPECTS:
        more.append(
            f"The page shows the {MOST_SUSPECTS:,} surest of {len(suspects):,} suspects; "
            "suspects.csv has all."
        )
    text = template("audit.html.j2").render(
        source=source,
        details=details(examples, result),
        headline=headline(result),
        notices=[*notices(result, folds), *more],
        valid=result.valid,
        counting=examples.counting,
        matrix=matrix_table(examples, result),
        by_class=class_table(examples, result, judged.classes),
        by_module=module_table(judged.modules),
        figures=[(plot, draw.figure(plot)) for plot in plots(judged.epochs)],
        notes=examples.notes,
        left_out=examples.left_out,
        used={**config["audit"], **config["recipe"]},
        environment=store.environment(),
        apply=apply,
        data={
            "kind": result.kind,
            "classes": list(examples.classes),
            "columns": COLUMNS,
            "cells": [name for name in examples.show(0) if name != "image"],
            "suspects": shown,
            "key": f"poprisk-audit-{config['data']['inputs']}-{config['data']['targets']}",
        },
        plotly=draw.plotly_script(),
    )
    replace_text(path, text)


def _suspect(
    examples: AuditExamples,
    result: AuditResult,
    probabilities: NDArray[np.float64] | None,
    item: int,
    *,
    picture: bool,
) -> list[Any]:
    # The given one with all digits, by which --apply knows the row.
    given, suggested = _label(result.labels[item]), _label(result.suggested[item], digits=5)
    show = examples.show(item)
    image = show.pop("image", None)
    cells = {name: _cut(value) for name, value in show.items()}
    words = " ".join([examples.name(item), *(value or "" for value in cells.values())])
    told = ""
    if probabilities is not None:
        p = probabilities[item]
        told = f"{p[suggested]:.0%} sure, {p[given]:.0%} for the given one"
    thumbnail = _thumbnail(Path(image)) if image is not None and picture else None
    name = examples.name(item)
    return [item, name, given, suggested, told, thumbnail, [*cells.values()], words.lower()]


def _label(value: Any, digits: int = 17) -> float | int:
    flat = np.asarray(value).reshape(-1)[0]
    return int(flat) if np.issubdtype(flat.dtype, np.integer) else float(f"{flat:.{digits}g}")


def _cut(value: str | None) -> str | None:
    return value if value is None or len(value) <= MOST_TEXT else f"{value[:MOST_TEXT]} …"


def _thumbnail(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def matrix_table(examples: AuditExamples, result: AuditResult) -> Table:
    """How many suspects of each given class are suggested to be of each other."""
    k = len(examples.classes)
    if not 2 <= k <= MOST_CLASSES:
        return Table([], [])
    items = result.suspects()
    counts = np.zeros((k, k), int)
    np.add.at(counts, (result.labels[items], result.suggested[items]), 1)
    return Table(
        ["given \\ suggested", *examples.classes],
        [
            [name, *(str(count) if count else "" for count in counts[i])]
            for i, name in enumerate(examples.classes)
        ],
        "Suspects by given label (rows) and suggested label (columns).",
    )


def class_table(
    examples: AuditExamples, result: AuditResult, memorized: Mapping[int, Rate]
) -> Table:
    """How many labels of each class are suspect, how well it is predicted, what is memorized."""
    if not examples.classes:
        return Table([], [])
    p = result.pred_probs
    rows = []
    for i, name in enumerate(examples.classes):
        mine = result.labelled & (result.labels == i)
        n, bad = int(mine.sum()), int(result.suspect[mine].sum())
        if n:
            cells = [name, f"{n:,}", f"{bad:,}", f"{bad / n:.1%}", f"{p[mine, i].mean():.0%}"]
            if memorized:
                cells.append(_memorized(memorized[i]) if i in memorized else "too few planted")
            rows.append((bad / n, cells))
    rows.sort(key=lambda row: -row[0])
    head = ["class", "labels", "suspect", "share", "mean confidence in it"]
    about = "The classes with the largest share of suspect labels first."
    if not memorized and result.memorization is not None and result.cost == 0:
        about += (
            " Too few labels were planted to say what is memorized of each class; a larger --plant "
            "tells."
        )
    if memorized:
        head.append("memorized")
        about += (
            " Memorized: how far predictions repeat the labels planted in place of this class, "
            "beyond chance, with the interval of two standard errors."
        )
    return Table(head, [row for _, row in rows], about)


def module_table(modules: Mapping[str, Any] | None) -> Table:
    """What each module has added to the memorization of planted labels, the most first."""
    if modules is None or not np.isfinite(modules["change"]):
        return Table([], [])
    shares = sorted(modules["shares"], key=lambda share: -share["value"])
    rows = [
        [
            f"{share['name'] or 'the network'}: {share['kind']}",
            " × ".join(map(str, share["shape"])),
            f"{share['value']:.1%} ± {2 * share['standard_error']:.1%}",
        ]
        for share in shares
    ]
    total = sum(share["value"] for share in shares)
    return Table(
        ["module", "weight", "memorization that its steps added"],
        rows,
        "Of each epoch, the module's displacement times the mean of the gradients of memorization "
        f"at both ends, summed; {modules['planted']} planted labels, two standard errors. The "
        f"modules add up to {total:.1%}; measured, memorization has changed by "
        f"{modules['change']:.1%}.",
    )


def _memorized(rate: Rate) -> str:
    """With its interval, which may begin below 0 by chance and does not go past all of them."""
    half = 2 * rate.standard_error
    return f"{rate.value:.0%} [{rate.value - half:.0%}, {min(1.0, rate.value + half):.0%}]"


def plots(epochs: Sequence[Row]) -> list[Plot]:
    """Loss and memorization over the training."""
    x = [row["epoch"] for row in epochs]
    found = [
        Plot(
            "Training loss",
            "epoch",
            "loss",
            [Line("", x, [row["loss"] for row in epochs], "poprisk")],
            "Mean over the epoch, as it was trained, planted labels included.",
        )
    ]
    lines = [
        Line(name, x, [row[key] for row in epochs], colour)
        for name, key, colour in (
            ("labels that are the most probable class", "agreement", "adamw"),
            ("planted labels repeated", "memorization", "poprisk"),
        )
        if epochs and epochs[0][key] is not None
    ]
    if lines:
        found.append(
            Plot(
                "Agreement and memorization",
                "epoch",
                "share",
                lines,
                "A run that does not memorize repeats planted labels by chance only (0%)."
                if len(lines) > 1
                else "",
                percent=True,
            )
        )
    return found
