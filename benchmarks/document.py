"""Sections of docs/results.md that benchmarks write."""

from __future__ import annotations

import re
from pathlib import Path


def replace_section(path: Path, section: str, begin: str, end: str) -> None:
    """Put ``section`` in the place of the one between the two marks, or at the end; it has the marks."""
    text = path.read_text("utf-8") if path.exists() else "# Results\n"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end) + "\n?", re.DOTALL)
    if pattern.search(text):
        text = pattern.sub(lambda _: section, text, count=1)
    else:
        text = text.rstrip("\n") + "\n\n" + section
    path.write_text(text, "utf-8")
