"""Memory that nothing refers to any more goes back to the system."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

# Of glibc's mallopt; from this size on, blocks are mapped one by one and unmapped when freed.
_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK = 2**20
# Where glibc's own adjustment ends.
_LARGEST_THRESHOLD = 2**25


def release_memory() -> None:
    """Collect cycles, which onnx-ir's graphs are, and return freed pages."""
    gc.collect()
    _call_glibc("malloc_trim", 0)


@contextlib.contextmanager
def living_objects_set_aside() -> Iterator[None]:
    """Have collections pass over what is alive already, which outlives the work within.

    Modules and what torch keeps of its traces are by far the most objects of the process, so that
    looking through them takes most of every collection's time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Have freed tensors returned at once instead of kept for later, smaller ones.

    For work that replaces one large tensor after another: what glibc keeps would add up to another
    model. Costs time, as every new page is cleared.
    """
    _call_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE_BLOCK)
    try:
        yield
    finally:
        _call_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)


def _call_glibc(function: str, *arguments: int) -> None:
    """Where there is glibc; other allocators are left alone."""
    found = getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
    if found is not None:
        found(*arguments)
