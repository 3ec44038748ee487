"""Reading a weight file once for what is asked of all its bytes: its hash, and NaN or infinity."""

import hashlib
import io
import math
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from epmq_deploy.checkpoints.tensors import StoredTensor, tensors_of_file

# A multiple of every dtype's size; what was read is still in the processor's cache when hashed.
_BLOCK = 2**20
# Threads that read and check files side by side; more of them read no faster.
READERS = 4


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
    """Read a safetensors file to its end; what was read before, only when it has changed since.

    Raises:
        RecipeError: it cannot be read, or ends within a tensor.
    """
    return _reader(file).result()


def is_finite(tensor: StoredTensor) -> bool:
    """Whether a file's tensor holds neither NaN nor infinity.

    Its file is read on to the end of the tensor, for ``scan`` too: who takes tensors in the order
    of the file finds each in the page cache, and reads the file once.

    Raises:
        RecipeError: the file cannot be read, or ends within a tensor.
    """
    return _reader(tensor.file).is_finite(tensor.key)


def _reader(file: Path) -> "_Reader":
    found = file.stat()
    return _known_reader(file, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=1024)
def _known_reader(file: Path, *identity: int) -> "_Reader":
    return _Reader(file)


class _Reader:
    """Reads a file tensor by tensor, from its beginning to wherever was asked for."""

    def __init__(self, file: Path) -> None:
        self._file = file
        # Tensors lie one after the other and fill the file behind its header.
        self._left = deque(sorted(tensors_of_file(file), key=lambda one: (one.offset, one.nbytes)))
        self._position = 0
        self._digest = hashlib.sha256()
        self._finite: dict[str, bool] = {}
        self._result: Scan | None = None
        self._lock = Lock()

    def is_finite(self, key: str) -> bool:
        while key not in self._finite:
            self._read_next()
        return self._finite[key]

    def result(self) -> Scan:
        while self._left:
            self._read_next()
        with self._lock:
            if self._result is None:
                with self._file.open("rb") as handle:
                    handle.seek(self._position)
                    self._digest.update(handle.read())
                bad = frozenset(key for key, finite in self._finite.items() if not finite)
                self._result = Scan(self._digest.hexdigest(), bad)
        return self._result

    def _read_next(self) -> None:
        with self._lock:
            if not self._left:
                return
            tensor = self._left[0]
            with self._file.open("rb", buffering=0) as handle:
                handle.seek(self._position)
                digest = self._digest.copy()
                digest.update(handle.read(tensor.offset - self._position))
                finite = _read(handle, tensor, digest)
            self._digest, self._position = digest, tensor.offset + tensor.nbytes
            self._finite[tensor.key] = finite
            self._left.popleft()


def _read(handle: io.FileIO, tensor: StoredTensor, digest: "hashlib._Hash") -> bool:
    """Add a tensor's bytes to the digest; whether its values are all finite."""
    finite, left = True, tensor.nbytes
    block = memoryview(bytearray(min(_BLOCK, left)))
    while left:
        view = block[:left]
        _fill(handle, view, tensor)
        digest.update(view)
        left -= len(view)
        if tensor.dtype.is_floating_point and finite:
            finite = all_finite(torch.frombuffer(view, dtype=tensor.dtype))
    return finite


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
