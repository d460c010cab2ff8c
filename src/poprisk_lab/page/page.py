"""What every page shares: how templates are read."""

from __future__ import annotations

from pathlib import Path

import jinja2

from poprisk_lab.page import formats
from poprisk_lab.page.series import colour_of


def template(name: str) -> jinja2.Template:
    """A template of this folder; text is escaped, and an unknown name is an error."""
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters["plain"] = formats.plain
    engine.filters["colour"] = colour_of
    engine.filters["mark"] = formats.mark
    engine.filters["signs"] = formats.signs
    return engine.get_template(name)
