"""The report in a real browser: the figures are drawn, nothing fails, nothing is fetched."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import toyclaim
from poprisk_lab.comparison import describe_task
from poprisk_lab.influence import described, label_counts, parse_query
from poprisk_lab.page import render
from poprisk_lab.page.claims import render_claim, summary_table
from poprisk_lab.page.explanation import render as render_explanation
from poprisk_lab.page.influence import render as render_influence
from poprisk_lab.page.page import template
from poprisk_lab.studies.claim import Results, TrialResult, Workspace
from poprisk_lab.studies.record import judged
from poprisk_lab.studies.run import ClaimProgress
from poprisk_lab.tasks import load_task
from test_explain import made_up
from test_report import REGRESSION, synthetic

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *"--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync".split(),
    *"--disable-component-update --no-first-run --enable-logging=stderr --dump-dom".split(),
    *"--virtual-time-budget=5000 --window-size=1200,2000".split(),
    "--host-resolver-rules=MAP * ~NOTFOUND",
]
OURS_LIGHT, OURS_DARK = "rgb(232, 80, 10)", "rgb(255, 143, 76)"  # --c-poprisk in page.css

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]


class Opened(NamedTuple):
    """The document after its scripts ran, and what they wrote to the console."""

    dom: str
    console: list[str]

    def drawn(self) -> int:
        """How many plots have a drawing."""
        return len(re.findall(r'class="plot js-plotly-plot"', self.dom))


def open_page(text: str, folder: Path, *flags: str) -> Opened:
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    return Opened(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def with_script(text: str, script: str) -> str:
    """Add a script at the end of a page, as a reader's clicks."""
    before, after = text.rsplit("</body>", 1)
    return f"{before}<script>{script}</script></body>{after}"


def test_figures_are_drawn_without_errors(tmp_path: Path) -> None:
    page = open_page(render(*synthetic()), tmp_path)
    assert page.console == []
    assert 'data-drawn="4"' in page.dom  # two of the arms, two of our gate
    assert page.drawn() == 4
    assert f"stroke: {OURS_LIGHT}" in page.dom
    assert OURS_DARK not in page.dom


def test_dark_mode_paints_other_colours(tmp_path: Path) -> None:
    page = open_page(render(*synthetic()), tmp_path, "--blink-settings=preferredColorScheme=0")
    assert page.console == []
    assert f"stroke: {OURS_DARK}" in page.dom
    assert OURS_LIGHT not in page.dom


def test_opening_details_and_clicking_the_legend(tmp_path: Path) -> None:
    clicks = """
        document.querySelectorAll("details").forEach(d => { d.open = true; });
        setTimeout(() => {
          const plot = document.querySelector(".plot");
          const visible = i => plot.data.filter(t => t.meta.series === i).every(t => t.visible);
          const chip = i => plot.closest(".group").querySelector(`[data-series="${i}"]`);
          const count = plot.closest(".group").querySelectorAll(".chip").length;
          const before = [visible(0), visible(count - 1)];
          chip(0).click();
          chip(count - 1).click();
          const after = [visible(0), visible(count - 1), chip(0).ariaPressed];
          document.body.dataset.seen = JSON.stringify([before, after]).replaceAll('"', "'");
        }, 1000);
    """
    data, verdict = synthetic(**REGRESSION)
    page = open_page(with_script(render(data, verdict), clicks), tmp_path)
    assert page.console == []
    assert page.drawn() == 6  # the gate of the shuffled control too
    assert "data-seen=\"[[true,false],[false,true,'false']]\"" in page.dom


LONG = "paper: correlation 0.991, relative error 0.165; drift peaks near 4.8, ends near 2.4, " * 2


def claim_page() -> str:
    """A claim whose facts and figures are as long as the longest."""
    claim = dataclasses.replace(toyclaim.CLAIM, paper=LONG)
    trials = [t for t in toyclaim.trials(True) if not t.needs]
    done = Results(TrialResult(t.settings, toyclaim.run(t.settings, Workspace())) for t in trials)
    return render_claim(judged(claim, ClaimProgress(done, [], {}, True, {"torch": LONG}, 0.0)))


def summary_page() -> str:
    row = ["claim-name", "A title", "not reproduced", "1 of 2", LONG, LONG, LONG]
    table = summary_table([])._replace(rows=[row] * 3)
    return template("claims.html.j2").render(table=table)


def influence_page() -> str:
    """Answers that are not to be believed, with pictures and with long reasons."""
    task, names = load_task("digits", seed=0, hidden=8), ("test", "3")
    rng = torch.Generator().manual_seed(0)
    query = {
        "quantity": "mean test loss",
        "examples": 797,
        "prediction": None,
        "output": None,
        "target": None,
        "value": 0.5,
        "valid": False,
        "reason": LONG,
        "agreement": 0.3,
        "trainings": 9.0,
        "influence": torch.randn(1000, generator=rng).tolist(),
        "without": {"examples": [1], "predicted": 0.1, "measured": 0.2, "says": 3},
    }
    found = {
        "task": describe_task("digits", task),
        "plan": {"optimizer": "AdamW", "lr": 1e-3},
        "training": {"weights": 9, "epochs": 3, "steps": 48, "metric": 0.9},
        "labels": label_counts(task),
        "queries": [described(task, parse_query(name), query)
                    for name in names],
        "notices": [LONG],
    }  # fmt: skip
    return render_influence(found, task, {})


PAGES: dict[str, Callable[[], str]] = {
    "compare": lambda: render(*synthetic()),
    "compare, two seeds": lambda: render(*synthetic(seeds=2)),
    "claim": claim_page,
    "claims": summary_page,
    "explain": lambda: render_explanation(made_up(), {}),
    "explain, queries": influence_page,
}
HIDDEN = """
    const sees = e => { const r = e.getBoundingClientRect(); return r.width && r.right <= 390; };
    const told = [...inner.querySelectorAll(".told, .numbers .difference")];
    const out = told.filter(e => !sees(e)).length;
"""


@pytest.fixture(scope="module")
def on_phones(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """All pages, each on a phone of its own."""
    folder, frames = tmp_path_factory.mktemp("phones"), ""
    for name, page in PAGES.items():
        (folder / f"{name}.html").write_text(page(), encoding="utf-8")
        frames += f'<iframe src="{name}.html" width="390" height="800"></iframe>'
    outer = f"""<body>{frames}<script>
        setTimeout(() => document.querySelectorAll("iframe").forEach(frame => {{
          const inner = frame.contentDocument;
          const boxes = [inner.documentElement, inner.querySelector(".scroll")].filter(b => b);
          {HIDDEN}
          frame.dataset.wide = boxes.filter(b => b.scrollWidth > b.clientWidth).length;
          frame.dataset.width = inner.documentElement.clientWidth;
          frame.dataset.hidden = out;
        }}), 2000);
    </script></body>"""
    return open_page(outer, folder, "--allow-file-access-from-files", "--hide-scrollbars")


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_need_not_scroll_sideways(name: str, on_phones: Opened) -> None:
    assert on_phones.console == []
    frame = re.search(f'<iframe src="{name}.html"[^>]*>', on_phones.dom)
    assert frame is not None
    assert 'data-wide="0" data-width="390" data-hidden="0"' in frame[0]


def test_answers_have_their_pictures(tmp_path: Path) -> None:
    script = """
        const seen = [...document.querySelectorAll("main img")];
        const good = seen.filter(i => i.complete && i.naturalWidth === 8 && i.alt).length;
        document.body.dataset.pictures = `${good} of ${seen.length}`;
    """
    page = open_page(with_script(influence_page(), script), tmp_path)
    assert page.console == []
    assert 'data-pictures="41 of 41"' in page.dom  # ten a side, and the one that is asked of
    assert page.drawn() == 1


def test_a_script_error_and_a_fetch_would_be_seen_and_the_fetch_is_refused(tmp_path: Path) -> None:
    script = "const i = new Image(); i.src = 'https://example.com/x.png'; throw new Error('boom');"
    console = open_page(with_script(render(*synthetic(seeds=1)), script), tmp_path).console
    assert any("boom" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
