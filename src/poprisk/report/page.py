"""What every page shares: how templates are read, and how a page gets onto the disk."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2

from poprisk.report import formats


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
    return engine.get_template(name)


def write_page(path: Path, text: str) -> None:
    """Write a page, atomically: a reader sees the old one or the new one.

    Raises:
        OSError: if it cannot be written; an existing file is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
