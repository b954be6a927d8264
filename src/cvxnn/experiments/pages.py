"""Pages of results in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cvxnn.files import write_atomically

__all__ = ["finite", "listing", "markdown_table", "write_page"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def listing(values: Iterable[Any]) -> str:
    """Numbers and words with commas between them."""
    return ", ".join(f"{value:g}" if isinstance(value, (int, float)) else str(value) for value in values)


def finite(value: Any) -> Any:
    """None in place of infinities and NaN, as JSON has neither."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_page(path: Path, text: str) -> None:
    """Write a text in one step."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)
