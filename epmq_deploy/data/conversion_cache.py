"""Where ``datasets`` keeps files that it has converted."""

import logging
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

log = logging.getLogger(__name__)


def cache_folder() -> str | None:
    """Return where ``datasets`` may keep what it converts; None for the folder of its settings.

    Where nothing can be written there, a temporary folder serves until the process ends.
    """
    from datasets import config

    try:
        Path(config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=config.HF_DATASETS_CACHE):
            return None
    except OSError:
        return _temporary_cache().name


@cache
def _temporary_cache() -> "TemporaryDirectory[str]":
    folder = TemporaryDirectory(prefix="epmq-data-")
    log.info("converted data are kept in %s until the end: no cache can be written", folder.name)
    return folder
