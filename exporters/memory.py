"""Return memory to the system: freed memory, and pages that can be read from files again."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from epmq_deploy.checkpoints.memory_map import MappedFile, release_mapped
from epmq_deploy.checkpoints.tensors import StoredTensor, TensorInfo

# Of glibc's mallopt; from this size on, blocks are mapped one by one and unmapped when freed.
_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK = 2**20
# Where glibc's own adjustment ends.
_LARGEST_THRESHOLD = 2**25

# Set once by the program that owns the process (`allow_allocator_settings`), never by a library
# call: glibc has no way to read a setting, so that what the program had cannot be restored.
_allocator_settings_allowed = False


def allow_allocator_settings() -> None:
    """Let `eager_free` change glibc's allocator from now on; for programs that own the process."""
    global _allocator_settings_allowed
    _allocator_settings_allowed = True


def release_memory() -> None:
    """Collect cycles, which onnx-ir's graphs are, and return freed and mapped pages."""
    release_mapped()
    gc.collect()
    _call_glibc("malloc_trim", 0)


@contextlib.contextmanager
def frozen_gc() -> Iterator[None]:
    """Exclude objects that are alive already from garbage collection during the work within.

    Modules and what torch keeps of its traces are by far the most objects of the process, so that
    looking through them takes most of every collection's time. Does nothing if the caller has
    frozen objects: they cannot be told apart afterwards, and would be thawed with the others.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def eager_free() -> Iterator[None]:
    """Return freed tensors to the system at once instead of keeping their memory for later ones.

    For work that replaces one large tensor after another: what glibc keeps would add up to another
    model. Costs time, as every new page is cleared. Does nothing before
    `allow_allocator_settings`.
    """
    if not _allocator_settings_allowed:
        yield
        return
    _call_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE_BLOCK)
    try:
        yield
    finally:
        _call_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)


def map_weights(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> None:
    """Leave large parameters in their files (`epmq_deploy.checkpoints.memory_map`).

    Args:
        model: holds the tensors' values already.
        tensors: by parameter name; those in another dtype than the model's are left in memory.
    """
    files: dict[Path, MappedFile] = {}
    for name, parameter in model.named_parameters():
        info = tensors.get(name)
        if not isinstance(info, StoredTensor) or info.dtype != parameter.dtype:
            continue
        if parameter.nbytes >= _LARGE_BLOCK:
            files[info.file] = files.get(info.file) or MappedFile(info.file)
            parameter.data = files[info.file].tensor(info)


@contextlib.contextmanager
def release_weights_after_use(model: nn.Module) -> Iterator[None]:
    """Release the mapped weights of each module when it has run."""
    handles = [
        module.register_forward_hook(lambda *_: release_mapped())
        for module in model.modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call_glibc(function: str, *arguments: int) -> None:
    """Call a function of glibc, if this is the system's C library; leave others alone."""
    if sys.platform != "linux":
        return
    address = getattr(ctypes.CDLL(None), function, None)
    if address is not None:
        address(*arguments)
