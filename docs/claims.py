"""Write docs/claims/ from the results on record: python docs/claims.py (needs matplotlib).

A page for each claim with its plots, and a summary. Nothing here is typed by hand: rerun it when
a record changes.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from poprisk_lab.page.claims import criteria_table, headline, notices, summary_table
from poprisk_lab.plots import Line, Picture, Plot
from poprisk_lab.studies import CLAIMS
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
CORRECTION = (
    "“Reproduced” takes all criteria but the controls at once, which needs no correction for their "
    "number; read one by one they stand uncorrected."
)
LINES = {"solid": "-", "dash": "--", "dot": ":"}


def draw(plot: Plot, path: Path) -> None:
    """One plot as SVG."""
    figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for line in plot.lines:
        draw_line(axes, line)
    axes.set(xlabel=plot.x, ylabel=plot.y)
    axes.set_xscale("log" if plot.log_x else "linear")
    axes.set_yscale("log" if plot.log_y else "linear")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(plot.lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_line(axes: plt.Axes, line: Line) -> None:
    """One line, its band, or its points."""
    colour, label = COLOURS[line.colour], line.name or "_nolegend_"
    if len(line.low):
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    if line.kind in ("points", "marks"):
        axes.plot(line.x, line.mean, ".", color=colour, label=label, alpha=0.8)
    else:
        axes.plot(line.x, line.mean, LINES[line.dash], color=colour, label=label, lw=1.8)


def page(found: Judged) -> str:
    """The page of a claim, with its pictures written beside it."""
    claim, report = found.claim, found.report
    if report is None:
        raise ValueError(f"the record of {claim.name} is not of a finished run.")
    command = f"poprisk reproduce {claim.name}"
    lines = [
        f"# {claim.title}",
        "",
        f"*{claim.statement}* {claim.source}. Paper: {claim.paper or 'no figure given'}.",
        "",
        f"**{headline(found)}**",
        "",
        *(f"> - {notice}" for notice in notices(found)),
        "",
        "| criterion | needed | paper | found, 95% interval | outcome |",
        "|---|---|---|---|---|",
    ]
    lines += [row(cells) for cells in criteria_table(report.criteria).rows]
    lines += ["", CORRECTION]
    for number, item in enumerate(claim.show(found.progress.done), 1):
        lines += [
            "",
            f"## {item.title}",
            "",
            f"![{item.title}]({picture(claim.name, number, item)})",
        ]
        lines += ["", item.about]
    table = report.table
    if table.rows:
        lines += ["", "## The numbers", "", row(table.head), "|" + "---|" * len(table.head)]
        lines += [row(cells) for cells in table.rows]
        lines += ["", table.about]
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


def row(cells: Sequence[str]) -> str:
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
        "| claim | main figure | here | paper | criteria that hold | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for name, _, verdict, holds, figure, ours, paper in summary_table(found).rows:
        linked = f"[{name}]({name}.md)" if ours else name
        lines.append(row((linked, figure, ours, paper, holds, f"**{verdict}**")))
    pages = [one.claim.name for one in found if one.report is not None]
    lines += ["", "```{toctree}", ":hidden:", "", *pages, "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write all pages."""
    mpl.rcParams.update({"svg.hashsalt": "poprisk", "font.size": 9, "svg.fonttype": "none"})
    FOLDER.mkdir(exist_ok=True)
    found = [on_record(claim) for claim in CLAIMS.values()]
    for one in found:
        if one.report is not None:
            (FOLDER / f"{one.claim.name}.md").write_text(page(one), encoding="utf-8")
    (FOLDER / "README.md").write_text(summary(found), encoding="utf-8")


if __name__ == "__main__":
    main()
