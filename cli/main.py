"""The ``epmq`` command."""

import sys
from typing import Annotated

import typer

from epmq_deploy.cli import demo, evaluate, export, merge, quantize, run
from epmq_deploy.cli.command import Command
from epmq_deploy.cli.console import print_error
from epmq_deploy.cli.errors import USAGE, error_text, exit_code, exit_codes_text
from epmq_deploy.cli.process import prepare_process
from epmq_deploy.errors import EpmqError
from epmq_deploy.version import __version__

app = typer.Typer(
    name="epmq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=exit_codes_text(),
)
app.command("merge", cls=Command)(merge.command)
app.command("quantize", cls=Command)(quantize.command)
app.command("export", cls=Command)(export.command)
app.command("eval", cls=Command)(evaluate.command)
app.command("run", cls=Command)(run.command)
app.command("demo", cls=Command)(demo.command)


def _print_version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Merge fine-tuned experts, quantize the result, deploy it as ONNX and measure its accuracy."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its documented code.

    Args:
        arguments: of the command line; None takes the process's own.
    """
    prepare_process()
    try:
        app(arguments)
    except EpmqError as error:
        command = next(iter(sys.argv[1:] if arguments is None else arguments), "")
        print_error(error_text(error, command))
        sys.exit(exit_code(error))
    except OSError as error:
        if error.filename is None:
            raise
        print_error(f"{error.filename}: {error.strerror}")
        sys.exit(USAGE)
