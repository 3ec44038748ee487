"""The ``epmq`` command.

Exit codes: 0 done, 1 unexpected error, 2 usage or recipe, 3 inputs do not fit together,
4 numbers do not agree, 5 no low-bit graph meets the gates.
"""

import signal
import sys
from typing import Annotated

import typer

from epmq_deploy.cli import demo, evaluate, export, merge, quantize, run
from epmq_deploy.cli.console import fail
from epmq_deploy.errors import EpmqError, RecipeError
from epmq_deploy.version import __version__

app = typer.Typer(
    name="epmq",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("merge")(merge.command)
app.command("quantize")(quantize.command)
app.command("export")(export.command)
app.command("eval")(evaluate.command)
app.command("run")(run.command)
app.command("demo")(demo.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Merge fine-tuned experts, quantize the result, deploy it as ONNX and prove its accuracy.

    Exit codes: 0 done, 1 unexpected error, 2 usage or recipe, 3 inputs do not fit together,
    4 numbers do not agree, 5 no low-bit graph meets the gates.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its documented code."""
    # Ending by an exception lets temporary folders be removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app(arguments)
    except EpmqError as error:
        fail(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}")
        sys.exit(RecipeError.exit_code)
