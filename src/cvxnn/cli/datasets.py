"""``cvxnn datasets``."""

from __future__ import annotations

from typing import Annotated

import typer

from cvxnn.cli.report import Report
from cvxnn.datasets import DATASETS

__all__ = ["app"]

app = typer.Typer(no_args_is_help=False)


@app.callback()
def _datasets() -> None:
    """Data sets that need no file."""


@app.command("list")
def list_datasets(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Show the names that DATA can be."""
    report = Report(as_json)
    report.table(
        ("name", "task", "what it is"),
        ((name, source.task, source.description) for name, source in DATASETS.items()),
    )
    report.finish(
        {
            "command": "datasets list",
            "datasets": [
                {"name": name, "task": source.task, "description": source.description}
                for name, source in DATASETS.items()
            ],
        }
    )
