"""Tensors that stay in their file and take memory only between being read and being released."""

import mmap
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from epmq_deploy.checkpoints.tensors import StoredTensor

# As long as there are tensors of theirs.
_files: WeakSet[mmap.mmap] = WeakSet()


class MappedFile:
    """A safetensors file whose tensors are read when they are used.

    Args:
        file: must stay as it is.
    """

    def __init__(self, file: Path) -> None:
        with file.open("rb") as handle:
            # Writable, as torch wants it; the file would not change, and `release_mapped` undo it.
            self._content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        _files.add(self._content)

    def tensor(self, info: StoredTensor) -> Tensor:
        """One of the file's tensors, CPU; not to be changed in place."""
        count = torch.Size(info.shape).numel()
        if not count:
            return torch.empty(info.shape, dtype=info.dtype)
        flat = torch.frombuffer(self._content, dtype=info.dtype, count=count, offset=info.offset)
        return flat.view(info.shape)


def release_mapped() -> None:
    """Forget what was read of mapped tensors; it is read anew when it is used again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for content in _files:
            content.madvise(mmap.MADV_DONTNEED)
