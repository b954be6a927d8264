"""The command line: ``cvxnn fit``, ``predict``, ``certify``, ``reproduce`` and ``datasets``."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from cvxnn._version import __version__
from cvxnn.cli.certify import certify
from cvxnn.cli.datasets import app as datasets_app
from cvxnn.cli.fit import fit
from cvxnn.cli.predict import predict
from cvxnn.cli.report import FAILED, INTERRUPTED, WRONG_USE, print_error
from cvxnn.cli.reproduce import reproduce
from cvxnn.errors import CvxnnError, InvalidInputError, UnsupportedError

__all__ = ["app", "main"]

app = typer.Typer(
    name="cvxnn",
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit status: 0 done, 1 failed, 2 wrong use, 3 done but not certified to the tolerance asked.",
)
app.command()(fit)
app.command()(predict)
app.command()(certify)
app.command()(reproduce)
app.add_typer(datasets_app, name="datasets", help="Data sets that need no file.")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"cvxnn {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _cvxnn(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Two-layer neural networks trained to a certified distance from the global optimum."""
    if context.invoked_subcommand is None:
        raise InvalidInputError("the command is missing; 'cvxnn --help' lists them")


def _drop_output() -> None:
    """What is still to be written to standard output goes nowhere, so that the end of the process cannot fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; errors become one sentence on standard error.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    try:
        status = app(args=arguments, prog_name="cvxnn", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return FAILED
    except (KeyboardInterrupt, typer.Abort):
        return print_error("interrupted before there was a result", INTERRUPTED, as_json)
    except (InvalidInputError, UnsupportedError) as error:
        return print_error(str(error), WRONG_USE, as_json)
    except CvxnnError as error:
        return print_error(str(error), FAILED, as_json)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            _drop_output()
            return print_error(f"cannot write to standard output: {error.strerror}", FAILED, False)
        if hasattr(error, "format_message"):
            return print_error(f"{error.format_message()} See 'cvxnn --help'.", WRONG_USE, as_json)
        if os.environ.get("CVXNN_TRACEBACK"):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        message = f"{type(error).__name__}: {reason} (set CVXNN_TRACEBACK=1 to see where)"
        return print_error(message, FAILED, as_json)
    return status if isinstance(status, int) else 0
