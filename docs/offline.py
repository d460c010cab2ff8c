"""What the pages need and would otherwise fetch: formulas as MathML, and links to other manuals.

``setup`` also writes the reference of the command line from the commands themselves.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.config import Config

MANUALS = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "numpy": "https://numpy.org/doc/stable/",
}
SIMPLER = ((r"\\[Bb]igg?(?![a-z])|\\textstyle", ""), (r"\\mathrel\{(.)\}", r"\1"))
"""Commands that docutils does not know, and what is nearly the same."""


def setup(app: Sphinx, docs: Path) -> None:
    """Register the renderer; write inventories and the commands' page into ``docs``."""
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.setup_extension("sphinx.ext.intersphinx")
    app.connect("config-inited", lambda app, config: use_inventories(config, docs), priority=1)
    app.connect("source-read", show_tutorials)
    app.connect("builder-inited", lambda app: write_commands(docs / "reference" / "commands.inc"))


def inline_math(writer: Any, node: nodes.math) -> None:
    """A formula in a line, as MathML, which browsers show without a script."""
    writer.body.append(mathml(node.astext(), block=False))
    raise nodes.SkipNode


def block_math(writer: Any, node: nodes.math_block) -> None:
    """A formula on lines of its own."""
    writer.body.append(f'<div class="math">{mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def mathml(formula: str, *, block: bool) -> str:
    """A LaTeX formula as MathML.

    Raises:
        ValueError: for what docutils does not know.
    """
    plain = formula.strip()
    for pattern, instead in SIMPLER:
        plain = re.sub(pattern, instead, plain)
    if block and re.search(r"\\\\|(?<!\\)&", plain) and r"\begin" not in plain:
        plain = rf"\begin{{aligned}}{plain}\end{{aligned}}"
    try:
        return str(latex2mathml.tex2mathml(plain, as_block=block))
    except (MathError, AttributeError) as error:  # it stumbles over what it cannot parse
        raise ValueError(f"no MathML for {formula!r}: {error}") from error


def show_tutorials(app: Sphinx, page: str, source: list[str]) -> None:
    """Have links to a tutorial's script, which work in a checkout, lead to the page made of it."""
    source[0] = re.sub(r"\(((?:\.\./)*)tutorials/(plot_\w+)\.py\)", r"(\1gallery/\2)", source[0])


def use_inventories(config: Config, docs: Path) -> None:
    """Point intersphinx at inventories made from ``inventory.txt``: ``manual role name page``."""
    entries: dict[str, list[str]] = {manual: [] for manual in MANUALS}
    for line in (docs / "inventory.txt").read_text(encoding="utf-8").splitlines():
        manual, role, name, page = line.split()
        entries[manual].append(f"{name} {role} 1 {page} -")
    for manual, lines in entries.items():
        path = docs / "_build" / f"{manual}.inv"
        path.parent.mkdir(exist_ok=True)
        head = f"# Sphinx inventory version 2\n# Project: {manual}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        path.write_bytes(head.encode() + zlib.compress("\n".join(lines).encode() + b"\n"))
        config.intersphinx_mapping[manual] = (MANUALS[manual], (str(path),))


def write_commands(path: Path) -> None:
    """Arguments and options of every command, as Typer lists them."""
    import typer.main
    from typer.cli import get_docs_for_click

    from poprisk_lab.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="poprisk")
    text = re.sub(r"^# .*\n", "", text, count=1)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
