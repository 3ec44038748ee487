"""A cache for activations between steps of calibration: in memory up to a limit, then on disk."""

import itertools
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Integers of the same width: NumPy reads and writes them where it lacks the float type.
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class CachedTensor:
    """One tensor in an ``ActivationCache``; its memory or file is freed with this object."""

    def __init__(self, load: Callable[[], Tensor], dtype: torch.dtype) -> None:
        self._load = load
        self._dtype = dtype

    def value(self) -> Tensor:
        """Return a copy in the dtype and on the device the tensor had; the caller may change it."""
        stored = self._load()
        return stored.to(self._dtype, copy=True)

    def peek(self) -> Tensor:
        """Return the tensor in the dtype it is stored in; the caller must not change it."""
        return self._load()


class ActivationCache:
    """Keeps tensors until they are no longer referenced.

    Args:
        limit: bytes to hold in memory; tensors beyond it are written to files. None for no limit.
        folder: where those files go; default: the system's temporary folder. They are deleted
            with the tensors.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit = limit
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers = itertools.count()
        self.in_memory = 0
        self.on_disk = 0

    def keep(
        self, tensor: Tensor, dtype: torch.dtype | None = None, *, owned: bool = False
    ) -> CachedTensor:
        """Keep a floating-point tensor.

        Args:
            tensor: to keep.
            dtype: to store it in; default: its own.
            owned: nobody else will change it, so it need not be copied.
        """
        stored = tensor.detach().to(dtype or tensor.dtype)
        size = stored.numel() * stored.element_size()
        if self._limit is None or self.in_memory + size <= self._limit:
            shared = stored.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            if shared and not owned:
                # The caller may change it, and a view would keep the whole viewed tensor alive.
                stored = stored.clone()
            cached = CachedTensor(lambda: stored, tensor.dtype)
            self.in_memory += size
            weakref.finalize(cached, self._forget, size)
            return cached
        file = self._write(stored)
        shape, device, width = stored.shape, stored.device, stored.dtype

        def load() -> Tensor:
            content = bytearray(file.read_bytes())
            flat = torch.frombuffer(content, dtype=width)
            return flat.reshape(shape).to(device)

        cached = CachedTensor(load, tensor.dtype)
        self.on_disk += size
        weakref.finalize(cached, self._delete, file, size)
        return cached

    def _write(self, stored: Tensor) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="epmq-", dir=self._parent)
        file = Path(self._folder.name) / str(next(self._numbers))
        flat = stored.cpu().contiguous().reshape(-1)
        flat.view(_BITS[stored.dtype]).numpy().tofile(file)
        return file

    def _forget(self, size: int) -> None:
        self.in_memory -= size

    def _delete(self, file: Path, size: int) -> None:
        self.on_disk -= size
        file.unlink(missing_ok=True)
