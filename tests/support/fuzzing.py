"""Running something on thousands of odd inputs: it succeeds, or raises one of our errors."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

from epmq_deploy.errors import EpmqError

# Multiplies the number of cases; 1 is what fits into the time of a usual test run.
_FACTOR = float(os.environ.get("EPMQ_FUZZ", "1"))


def cases(count: int) -> settings:
    """That many cases, the same ones in every run, without a database of failures."""
    return settings(
        max_examples=max(1, int(count * _FACTOR)),
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def succeeds_or_explains(action: Callable[[], object]) -> bool:
    """Run it; tell whether it succeeded. Any error that is not ours goes through.

    Raises:
        AssertionError: our error says nothing.
    """
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        action()
    except EpmqError as error:
        assert str(error).strip()
        return False
    finally:
        logging.disable(previous)
    return True


@contextmanager
def changed_copy(folder: Path, file: Path, content: bytes) -> Iterator[Path]:
    """A copy of a folder of models and data in which one file has another content."""
    copy = Path(tempfile.mkdtemp(prefix="fuzz-", dir=folder.parent))
    try:
        shutil.copytree(folder, copy, copy_function=os.link, dirs_exist_ok=True)
        changed = copy / file
        changed.unlink()
        changed.write_bytes(content)
        yield copy
    finally:
        shutil.rmtree(copy)
