"""Memory-mapped tensors: they stay in their file, and what was read of them can be released."""

import mmap
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from epmq_deploy.checkpoints.tensors import StoredTensor

# Maps stay open as long as a tensor refers to them.
_files: WeakSet[mmap.mmap] = WeakSet()


class MappedFile:
    """A safetensors file whose tensors are read when they are used.

    Args:
        file: must not change while tensors of it exist.
    """

    def __init__(self, file: Path) -> None:
        with file.open("rb") as handle:
            # Writable, because torch wants it; writes would not reach the file, and
            # `release_mapped` would undo them.
            self._content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        _files.add(self._content)

    def tensor(self, info: StoredTensor) -> Tensor:
        """Return one of the file's tensors, CPU; it must not be changed in place."""
        count = torch.Size(info.shape).numel()
        if not count:
            return torch.empty(info.shape, dtype=info.dtype)
        flat = torch.frombuffer(self._content, dtype=info.dtype, count=count, offset=info.offset)
        return flat.view(info.shape)


def release_mapped() -> None:
    """Release the memory of mapped tensors; they are read anew when they are used again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for content in _files:
            content.madvise(mmap.MADV_DONTNEED)
