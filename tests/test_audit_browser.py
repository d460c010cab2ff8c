"""The page of an audit in a real browser: filter, mark by mouse and keyboard, download."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from poprisk.audit import Auditor, AuditResult, Rate
from poprisk_lab.audit.examples import AuditExamples
from poprisk_lab.audit.plan import AUDIT
from poprisk_lab.audit.study import Judgement
from poprisk_lab.page.audit import MOST_TEXT, write_audit
from poprisk_lab.store import FORMAT, Store
from test_report_browser import CHROMIUM, open_page, with_script

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
MARKUP = "</script><img src=x onerror=\"document.body.dataset.hacked='yes'\"><b>&amp;"


def suspects_of(n: int) -> tuple[AuditExamples, AuditResult]:
    """n suspects of three classes, whose names and rows are full of markup."""
    true = torch.arange(n + 300) % 3
    given = true.clone()
    given[:n] = (true[:n] + 1) % 3
    auditor = Auditor(given, plant=0.0, structure=False)
    auditor.update(torch.arange(len(given)), 9 * torch.eye(3)[true], given)
    classes = ("cat", "dog, big", f"x{MARKUP}")
    rows = [{"text": f"{MARKUP} number {i}", "long": "y" * 2000} for i in range(2)]
    examples = AuditExamples(
        torch.zeros(len(given), 1),
        given,
        classes,
        lambda i: f"row {i + 1} {MARKUP}",
        lambda i: dict(rows[i % 2]),
        [MARKUP],
        {MARKUP: MARKUP},
    )
    return examples, auditor.result()


def page_of(folder: Path, n: int) -> str:
    examples, result = suspects_of(n)
    config: dict[str, Any] = {
        "format": FORMAT,
        "audit": {"source": MARKUP},
        "recipe": {},
        "data": {"inputs": "1", "targets": "2"},
    }
    store = Store(folder / "run", AUDIT)
    store.create(config, {})
    epochs = [{"epoch": e, "loss": 1 / e, "agreement": 0.5, "memorization": None} for e in (1, 2)]
    path = folder / "audit.html"
    judged = Judgement(
        result,
        epochs,
        {0: Rate(0.1, 0.02)},
        {
            "planted": 20,
            "change": 0.1,
            "shares": [
                {
                    "name": MARKUP,
                    "kind": "Linear",
                    "shape": [2, 3],
                    "value": 0.1,
                    "standard_error": 0.02,
                }
            ],
        },
    )
    write_audit(path, MARKUP, examples, judged, store, apply=MARKUP, folds=MARKUP)
    return path.read_text(encoding="utf-8")


def seen(dom: str) -> Any:
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found is not None
    return json.loads(base64.b64decode(found[1]))


TELL = """
  const tell = value => {
    document.body.dataset.seen = btoa(unescape(encodeURIComponent(JSON.stringify(value))));
  };
  const list = document.getElementById("list"), get = id => document.getElementById(id);
  const choose = (id, value) => {
    get(id).value = value;
    get(id).dispatchEvent(new Event("input", {bubbles: true}));
  };
  const press = key => (document.activeElement ?? document.body).dispatchEvent(
    new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
"""


def test_ten_thousand_suspects_are_paged_filtered_and_escaped(tmp_path: Path) -> None:
    script = (
        TELL
        + """
      const out = [list.children.length, get("count").textContent, get("where").textContent];
      get("later").click();
      out.push(get("where").textContent);
      choose("by-given", "0");
      out.push(get("count").textContent, get("where").textContent);
      choose("by-given", "");
      choose("by-text", "number 1");
      out.push(get("count").textContent);
      choose("by-text", "no such text");
      out.push(get("count").textContent, list.children.length);
      choose("by-text", "");
      out.push(list.querySelector(".cells dd").textContent.slice(0, 9));
      const long = list.querySelector(".cells div:last-child dd").textContent;
      out.push(document.images.length, long.length);
      tell(out);
    """
    )
    opened = open_page(with_script(page_of(tmp_path, 10_000), script), tmp_path)
    assert opened.console == []
    assert "data-hacked" not in opened.dom
    assert opened.drawn() == 2
    assert seen(opened.dom) == [
        40,
        "10,000 of 10,000 suspects.",
        "1 to 40",
        "41 to 80",
        "3,333 of 10,000 suspects.",
        "1 to 40",
        "5,000 of 10,000 suspects.",
        "0 of 10,000 suspects.",
        0,
        "</script>",
        0,
        MOST_TEXT + 2,
    ]


def test_marks_by_mouse_and_keyboard_are_downloaded(tmp_path: Path) -> None:
    script = (
        TELL
        + """
      let text = null;
      const make = URL.createObjectURL;
      URL.createObjectURL = blob => { blob.text().then(t => { text = t; }); return make(blob); };
      const pressed = i => [...list.children[i].querySelectorAll("button")].map(b => b.ariaPressed);
      const out = [get("download").disabled];
      list.children[0].querySelector("button").click();
      out.push(pressed(0));
      press("j");
      press("x");
      press("j");
      press("u");
      press("j");
      press("f");
      press("f");
      press("ArrowUp");
      out.push(pressed(1), pressed(2), pressed(3));
      out.push([...list.children].indexOf(document.activeElement));
      const other = list.children[4].querySelector("select");
      other.value = "1";
      other.dispatchEvent(new Event("change"));
      out.push(get("kept").textContent, get("download").disabled);
      choose("by-mark", "keep");
      out.push(get("count").textContent);
      choose("by-mark", "none");
      out.push(get("count").textContent);
      addEventListener("click", event => event.preventDefault(), {once: true});
      get("download").click();
      setTimeout(() => { tell([...out, text]); }, 500);
    """
    )
    opened = open_page(with_script(page_of(tmp_path, 50), script), tmp_path)
    assert opened.console == []
    (*out, text) = seen(opened.dom)
    assert out == [
        True,
        ["true", "false", "false"],
        ["false", "true", "false"],
        ["false", "false", "true"],
        ["false", "false", "false"],
        2,
        "4 marked, kept in this browser.",
        False,
        "1 of 50 suspects.",
        "46 of 50 suspects.",
    ]
    lines = text.splitlines()
    assert lines[0] == "index,name,given,label,mark"
    assert [line.rsplit(",", 1)[1] for line in lines[1:]] == ["fix", "keep", "unsure", "fix"]
    assert '"dog, big"' in text


def test_a_phone_need_not_scroll_sideways(tmp_path: Path) -> None:
    (tmp_path / "inner.html").write_text(page_of(tmp_path, 50), encoding="utf-8")
    outer = """<body><iframe src="inner.html" width="390" height="800"></iframe><script>
      setTimeout(() => {
        const inner = document.querySelector("iframe").contentDocument.documentElement;
        document.body.dataset.seen = btoa(JSON.stringify([inner.scrollWidth, inner.clientWidth]));
      }, 2000);
    </script></body>"""
    opened = open_page(outer, tmp_path, "--allow-file-access-from-files", "--hide-scrollbars")
    assert opened.console == []
    assert seen(opened.dom) == [390, 390]
