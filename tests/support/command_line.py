"""The command line, run in the tests' own process."""

import logging

import pytest

from epmq_deploy.cli.main import main


def run(*arguments: object) -> int:
    """Run ``epmq`` with these arguments; its exit code.

    Logging is then as it was: a command sends the package's log to the terminal, and a later
    test of what is logged would find nothing.
    """
    logger = logging.getLogger("epmq_deploy")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    try:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    return int(caught.value.code or 0)
