"""Settings of the whole process; only the command line makes them, the library does not."""

import io
import logging
import os
import signal
import sys
import warnings

# Libraries whose notices tell users nothing they can act on.
_CHATTY = ("transformers", "datasets", "torch.onnx", "onnxscript", "onnx_ir")
_FATAL = 4


def prepare_process() -> None:
    """Set up signals, environment, warnings and logs; call before torch is imported."""
    # Ending by an exception lets temporary folders be removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Names of classes and files may have characters that the terminal's encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # Read when torch is imported. Threads that wait by spinning make torch dozens of times slower
    # wherever there are fewer free cores than threads: containers, shared machines.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Read when transformers is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logger = logging.getLogger("epmq_deploy")
    logger.handlers = [_TerminalLog()]
    logger.propagate = False
    logger.setLevel(logging.INFO)


def log_errors_only() -> None:
    """Keep everything but errors out of this package's log, as ``--quiet`` asks."""
    logging.getLogger("epmq_deploy").setLevel(logging.ERROR)


def free_memory_eagerly() -> None:
    """Let exports change this process's allocator, which lowers their peak memory."""
    from epmq_deploy.exporters.memory import allow_allocator_settings

    allow_allocator_settings()


def silence_onnxruntime() -> None:
    """Keep onnxruntime's own log off the terminal; commands report its errors in one sentence."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(_FATAL)


class _TerminalLog(logging.Handler):
    """Writes log lines to stderr with rich, imported at the first of them."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich.logging import RichHandler

        from epmq_deploy.cli.console import stderr_console

        RichHandler(console=stderr_console(), show_path=False, show_time=False).emit(record)
