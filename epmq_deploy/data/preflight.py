"""Decoding a task's images before any work, so that no damaged one is met after hours of it."""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from epmq_deploy.cpu import usable_cores
from epmq_deploy.data.image_samples import ImageSamples
from epmq_deploy.data.samples import Samples
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.models.images import FLOATS_TO_1, FLOATS_TO_255
from epmq_deploy.recipe import Preflight

log = logging.getLogger(__name__)

# Up to so many images of a data source are all decoded by default, which takes seconds.
SMALL = 2000
# Of more, so many are.
SAMPLED = 200
# Problems that are listed one by one.
_LISTED = 5


def check_images(samples: Samples, preflight: Preflight) -> None:
    """Decode a task's images, and log what is assumed about them; texts need no decoding.

    Args:
        samples: that will be used.
        preflight: whether all are decoded or some, evenly spaced.

    Raises:
        MismatchError: some cannot be read; names rows and files. Or floats have several ranges.
    """
    if not isinstance(samples, ImageSamples):
        return
    rows = _rows(samples.indices, preflight)
    where = f"task {samples.task!r}: {samples.source.path}"
    if len(rows) < len(samples):
        log.info("%s: decoding %d of %d images beforehand", where, len(rows), len(samples))

    def read(row: int) -> tuple[str | None, str | None]:
        try:
            return None, samples.read(row).assumption
        except RecipeError as error:
            return str(error), None

    with ThreadPoolExecutor(usable_cores() or 1) as threads:
        outcomes = list(threads.map(read, rows))
    if problems := [problem for problem, _ in outcomes if problem]:
        more = len(problems) - _LISTED
        rest = [f"{where}: {more} more images cannot be decoded"] if more > 0 else []
        raise MismatchError(where, problems[:_LISTED] + rest)
    counts = Counter(assumption for _, assumption in outcomes if assumption)
    if FLOATS_TO_1 in counts and FLOATS_TO_255 in counts:
        raise MismatchError(
            where,
            [
                f"{counts[FLOATS_TO_1]} images have floats up to 1, {counts[FLOATS_TO_255]} up to "
                "255, so that it is not clear what is white; save them with 8 or 16 bits"
            ],
        )
    for assumption, count in counts.items():
        log.warning("%s: %d of %d images: %s", where, count, len(rows), assumption)


def _rows(indices: Sequence[int], preflight: Preflight) -> Sequence[int]:
    """Return the rows to decode: all, or some at equal distances, the first and last included."""
    few = preflight == "sampled" or (preflight == "auto" and len(indices) > SMALL)
    if not few or len(indices) <= SAMPLED:
        return indices
    last = len(indices) - 1
    return [indices[last * turn // (SAMPLED - 1)] for turn in range(SAMPLED)]
