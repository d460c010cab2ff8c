"""Write docs/claims/ from the results on record: python docs/claims.py (needs matplotlib).

A page for each claim with its plots, and a summary. Nothing here is typed by hand: rerun it when
a record changes.
"""

from __future__ import annotations

import base64
import math
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from poprisk_lab.page.claims import criterion_line, notices, summary_rows
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.claim import Curve, Picture, Plot
from poprisk_lab.studies.record import Judged, on_record

FOLDER = Path(__file__).parent / "claims"
COLOURS = {
    "poprisk": "#e8500a",
    "adamw": "#3f7fe8",
    "early-stopping": "#0a9a62",
    "rms-matched": "#8f41a9",
    "shuffled": "#8a7400",
    "paper": "#204c58",
    "peer": "#7f8084",
    "other": "#7f8084",
    **{f"module-{i}": c for i, c in enumerate(
        ("#45085a", "#472c7a", "#3d4b89", "#31688e", "#27808e", "#209a8a", "#31b27c", "#60c860"), 1
    )},
}  # fmt: skip
LINES = {"solid": "-", "dash": "--", "dot": ":"}


def draw(plot: Plot, path: Path) -> None:
    """One plot as SVG."""
    figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for curve in plot.curves:
        draw_curve(axes, curve)
    axes.set(xlabel=plot.x, ylabel=plot.y)
    axes.set_xscale("log" if plot.log_x else "linear")
    axes.set_yscale("log" if plot.log_y else "linear")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(plot.curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_curve(axes: plt.Axes, curve: Curve) -> None:
    """One line, its band, or its points."""
    colour, label = COLOURS[curve.colour], curve.name or "_nolegend_"
    if len(curve.low):
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    if curve.points:
        axes.plot(curve.x, curve.y, ".", color=colour, label=label, alpha=0.8)
    else:
        axes.plot(curve.x, curve.y, LINES[curve.dash], color=colour, label=label, lw=1.8)


def page(found: Judged) -> str:
    """The page of a claim, with its pictures written beside it."""
    claim, findings = found.claim, found.findings
    if findings is None:
        raise ValueError(f"the record of {claim.name} is not of a finished run.")
    command = f"poprisk reproduce {claim.name}"
    lines = [
        f"# {claim.title}",
        "",
        f"*{claim.statement}* {claim.source}. Paper: {claim.paper or 'no figure given'}.",
        "",
        f"**{found.verdict.capitalize()}**: {findings.ours}.",
        "",
        *(f"> {notice}" for notice in notices(found)),
        "",
        *(f"- {sentence}" for sentence in findings.sentences),
        *([f"- Controls: {findings.controls}"] if findings.controls else []),
        "",
        "| criterion | needed | paper | found, 95% interval | outcome |",
        "|---|---|---|---|---|",
    ]
    for line in map(criterion_line, findings.criteria):
        cells = (line.asks, line.bound, line.claimed or "–", line.found, line.outcome)
        lines.append(row(cells))
    for number, item in enumerate(claim.show(found.progress.done), 1):
        lines += [
            "",
            f"## {item.title}",
            "",
            f"![{item.title}]({picture(claim.name, number, item)})",
        ]
        lines += ["", item.about]
    if findings.table:
        head, *rest = findings.table
        lines += ["", "## The numbers", "", row(head), "|" + "---|" * len(head)]
        lines += [row(cells) for cells in rest]
    lines += ["", "## Settings", "", "As published:", "", *(f"- {s}" for s in claim.published)]
    lines += ["", "Ours:", "", *(f"- {s}" for s in claim.ours), ""]
    environment = ", ".join(f"{k} {v}" for k, v in found.progress.environment.items())
    minutes = math.ceil(found.progress.seconds / 60)
    lines.append(
        f"`{command}`: {len(found.progress.done)} trials, {minutes} minutes of one core; "
        f"{environment}. The data are in "
        f"[{claim.name}.json](../../records/{claim.name}.json)."
    )
    return "\n".join(lines) + "\n"


def row(cells: list[str] | tuple[str, ...]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def picture(name: str, number: int, item: Plot | Picture) -> str:
    """Write one plot or picture; return its file name."""
    if isinstance(item, Plot):
        draw(item, FOLDER / f"{name}-{number}.svg")
        return f"{name}-{number}.svg"
    (FOLDER / f"{name}-{number}.png").write_bytes(base64.b64decode(item.png))
    return f"{name}-{number}.png"


def summary(found: list[Judged]) -> str:
    """The page of all claims."""
    lines = [
        "# The claims of the paper",
        "",
        "What *A Theory of Generalization in Deep Learning* (arXiv:2605.01172) says, and what was "
        "found here, with controls and 95% intervals. Each row is one command, "
        "`poprisk reproduce CLAIM`; the table is `poprisk reproduce all --summary`.",
        "",
        "| claim | paper | here | controls | verdict |",
        "|---|---|---|---|---|",
    ]
    for r in summary_rows(found):
        name = f"[{r.name}]({r.name}.md)" if r.ours else r.name
        lines.append(row((name, r.paper, r.ours, r.controls, f"**{r.verdict}**")))
    pages = [one.claim.name for one in found if one.findings is not None]
    lines += ["", "```{toctree}", ":hidden:", "", *pages, "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write all pages."""
    mpl.rcParams.update({"svg.hashsalt": "poprisk", "font.size": 9, "svg.fonttype": "none"})
    FOLDER.mkdir(exist_ok=True)
    found = [on_record(claim) for claim in CLAIMS.values()]
    for one in found:
        if one.findings is not None:
            (FOLDER / f"{one.claim.name}.md").write_text(page(one), encoding="utf-8")
    (FOLDER / "README.md").write_text(summary(found), encoding="utf-8")


if __name__ == "__main__":
    main()
