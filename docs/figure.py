"""Draw the README's picture from a run directory: python docs/figure.py RUN docs/digits.svg."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from poprisk_lab.comparison import run_directory
from poprisk_lab.page.figures import epoch_line
from poprisk_lab.plots import Line
from poprisk_lab.results import RunData, read_run

WIDTH, HEIGHT, LEFT, TOP, PANEL_W, PANEL_H = 920, 350, 52, 72, 370, 220
GAP = 20
LOWEST = 0.6  # of the accuracy axis; earlier values are cut off
ARMS = (  # name, label, colour, dash
    ("poprisk", "PopRiskAdamW", "#d9480f", ""),
    ("adamw-lr0.001-wd0.01", "AdamW, same lr and decay", "#1c6dd0", ""),
    ("rms-matched", "same update size, no mask", "#7048a8", "6 4"),
    ("shuffled", "mask shuffled", "#5c5f66", "2 3"),
)
STYLE = """<style>text{font:13px system-ui,sans-serif;fill:#333}.t{font-weight:600;font-size:14px}
.a{fill:#666;font-size:12px}.g{stroke:#bbb;stroke-opacity:.35}.bg{fill:#fff}
@media(prefers-color-scheme:dark){text{fill:#ddd}.a{fill:#aaa}.bg{fill:#16181d}}</style>"""


def panel(data: RunData, key: str, title: str, left: float, low: float) -> str:
    """One plot: a line and a 95% band for each arm, and the axes."""
    last = data.config["task"]["epochs"]

    def point(epoch: float, value: float) -> str:
        x = left + PANEL_W * epoch / last
        y = TOP + PANEL_H * (1 - (min(max(value, low), 1.0) - low) / (1 - low))
        return f"{x:.1f},{y:.1f}"

    parts = [f'<text class="t" x="{left}" y="{TOP - 14}">{title}</text>']
    for i in range(5):
        value = low + (1 - low) * i / 4
        (x, y), (x2, _) = (point(e, value).split(",") for e in (0, last))
        parts.append(f'<line class="g" x1="{x}" y1="{y}" x2="{x2}" y2="{y}"/>')
        parts.append(
            f'<text class="a" x="{left - 8}" y="{float(y) + 4}" text-anchor="end">'
            f"{value:.0%}</text>"
        )
    for epoch in (0, last // 3, 2 * last // 3, last):
        x, y = point(epoch, low).split(",")
        parts.append(
            f'<text class="a" x="{x}" y="{float(y) + 18}" text-anchor="middle">{epoch}</text>'
        )
    for name, _, colour, dash in ARMS:
        c = epoch_line(name, [row for row in data.epochs if row["arm"] == name], key, colour)
        parts.append(band(c, colour, point))
        line = " ".join(point(e, m) for e, m in zip(c.x, c.mean, strict=True))
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/>'
        )
    return "".join(parts)


def legend() -> str:
    """Names of the lines, above both plots."""
    parts, x = [], LEFT
    for _, label, colour, dash in ARMS:
        parts.append(
            f'<line x1="{x}" y1="18" x2="{x + 26}" y2="18" stroke="{colour}" stroke-width="2.5" '
            f'stroke-dasharray="{dash}"/><text x="{x + 33}" y="22">{label}</text>'
        )
        x += 33 + 8 * len(label) + 26
    return "".join(parts)


def band(c: Line, colour: str, point: object) -> str:
    """The 95% interval around a line."""
    assert callable(point)
    rows = [r for r in zip(c.x, c.low, c.high, strict=True) if math.isfinite(r[1])]
    upper = [point(e, high) for e, _, high in rows]
    lower = [point(e, low) for e, low, _ in reversed(rows)]
    points = " ".join(upper + lower)
    return f'<polygon points="{points}" fill="{colour}" fill-opacity=".15"/>'


def main(run: Path, out: Path) -> None:
    """Write the picture."""
    data = read_run(run_directory(run))
    seeds, noise = len(data.config["seeds"]), data.config["task"]["description"]
    left2 = LEFT + PANEL_W + GAP + 50
    foot = f"{noise}; means and 95% intervals over {seeds} seeds, by epoch"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Test accuracy and memorized wrong labels over training">{STYLE}'
        f'<rect class="bg" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        + legend()
        + panel(data, "test_metric", "Test accuracy", LEFT, LOWEST)
        + panel(data, "memorized", "Wrong labels memorized", left2, 0.0)
        + f'<text class="a" x="{LEFT}" y="{HEIGHT - 14}">{foot}</text></svg>\n'
    )
    out.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
