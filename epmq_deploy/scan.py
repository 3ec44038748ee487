"""Reading a weight file once for what is asked of all its bytes: its hash, and NaN or infinity."""

import hashlib
import io
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from epmq_deploy.tensors import StoredTensor, tensors_of_file

# A multiple of every dtype's size.
_BLOCK = 2**23


@dataclass(frozen=True)
class Scan:
    """What all bytes of a safetensors file tell.

    Attributes:
        sha256: of the file.
        not_finite: keys of the tensors that hold NaN or infinite values.
    """

    sha256: str
    not_finite: frozenset[str]


def scan(file: Path) -> Scan:
    """Read a safetensors file; again only when it has changed since.

    Raises:
        RecipeError: it cannot be read, or ends within a tensor.
    """
    found = file.stat()
    return _scan(file, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=1024)
def _scan(file: Path, *identity: int) -> Scan:
    digest = _Digest()
    bad = set()
    with file.open("rb", buffering=0) as handle, digest:
        # Tensors lie one after the other and fill the file behind its header.
        for tensor in sorted(tensors_of_file(file), key=lambda tensor: tensor.offset):
            digest.update(memoryview(handle.read(tensor.offset - handle.tell())))
            left = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
            while left:
                view = digest.free_block()[: min(left, _BLOCK)]
                _fill(handle, view, tensor)
                digest.update(view)
                left -= len(view)
                if tensor.dtype.is_floating_point and not all_finite(
                    torch.frombuffer(view, dtype=tensor.dtype)
                ):
                    bad.add(tensor.key)
        digest.update(memoryview(handle.read()))
    return Scan(digest.hexdigest(), frozenset(bad))


class _Digest:
    """A sha256 that is computed while the next block is read."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._blocks = [memoryview(bytearray(_BLOCK)) for _ in range(2)]
        self._worker = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self._worker.shutdown()

    def free_block(self) -> memoryview:
        """The block that is not being hashed."""
        self._blocks.reverse()
        return self._blocks[0]

    def update(self, view: memoryview) -> None:
        """Add what must not change until the next call but one has returned."""
        if self._pending is not None:
            self._pending.result()
        self._pending = self._worker.submit(self._digest.update, view)

    def hexdigest(self) -> str:
        """The sha256 of all that was added; after the ``with`` block alone."""
        return self._digest.hexdigest()


def _fill(handle: io.FileIO, view: memoryview, tensor: StoredTensor) -> None:
    while view:
        read = handle.readinto(view)
        if not read:
            raise tensor.cut_short()
        view = view[read:]


def all_finite(values: Tensor) -> bool:
    """Whether floating-point values ``[*]`` hold neither NaN nor infinity, without temporaries."""
    if not values.numel():
        return True
    low, high = values.aminmax()
    # NaN anywhere makes both NaN.
    return math.isfinite(float(low)) and math.isfinite(float(high))
