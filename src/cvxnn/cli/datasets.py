"""``cvxnn datasets``."""

from __future__ import annotations

from typing import Annotated

import typer

from cvxnn.cli.options import Json
from cvxnn.cli.report import Report
from cvxnn.datasets import DATASETS
from cvxnn.images import IMAGE_SOURCES, fetch_images

__all__ = ["app"]

app = typer.Typer(no_args_is_help=False)


@app.callback()
def _datasets() -> None:
    """Data sets: bundled ones, and images to fetch."""


@app.command("list")
def list_datasets(as_json: Json = False) -> None:
    """Show the names that DATA can be, and those of image data sets."""
    report = Report(as_json)
    report.table(
        ("name", "task", "what it is"),
        ((name, source.task, source.description) for name, source in DATASETS.items()),
    )
    report.say("\nImages, after 'cvxnn datasets fetch NAME' (once):\n")
    report.table(
        ("name", "MB", "what it is"),
        (
            (name, str(images.download.megabytes), f"{images.title}: {images.description}")
            for name, images in IMAGE_SOURCES.items()
        ),
        right=(1,),
    )
    report.finish(
        {
            "command": "datasets list",
            "datasets": [
                {"name": name, "task": source.task, "description": source.description}
                for name, source in DATASETS.items()
            ],
            "images": [
                {
                    "name": name,
                    "title": images.title,
                    "description": images.description,
                    "megabytes": images.download.megabytes,
                }
                for name, images in IMAGE_SOURCES.items()
            ],
        }
    )


@app.command("fetch")
def fetch(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help=f"One of: {', '.join(IMAGE_SOURCES)}.", show_default=False)
    ],
    data_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder that has the official files already: they are checked, nothing is downloaded.",
            show_default="CVXNN_DATA_DIR, if they are there",
        ),
    ] = None,
    cache_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder to keep downloads in.", show_default="CVXNN_CACHE_DIR, or the user's cache"
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Folder of a mirror; hashes are checked.", show_default="the official address"
        ),
    ] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no report.")] = False,
) -> None:
    """Download a data set of images, checked by its hashes, unless its files are here."""
    report = Report(as_json, quiet=quiet)
    fetched = fetch_images(name, data_dir=data_dir, cache_dir=cache_dir, base_url=base_url, progress=not quiet)
    for warning in fetched.warnings:
        report.warn(warning)
    report.rows(
        [
            ("data set", IMAGE_SOURCES[name].title),
            ("downloaded", f"{len(fetched.downloaded)} of {len(fetched.files)} files"),
            ("files", "\n".join(map(str, fetched.files))),
            *([("note", fetched.note)] if fetched.note else []),
        ]
    )
    report.finish(
        {
            "command": "datasets fetch",
            "name": name,
            "files": [str(path) for path in fetched.files],
            "downloaded": list(fetched.downloaded),
            "note": fetched.note,
            "warnings": list(fetched.warnings),
        }
    )
