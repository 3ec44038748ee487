"""Reading a weight file once for both its hash and the check for NaN and infinity."""

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

# A multiple of every dtype's size; small enough to stay in the processor's cache for hashing.
_BLOCK = 2**20
# Threads that read and check files in parallel; more of them are not faster.
READERS = 4


@dataclass(frozen=True)
class Scan:
    """The result of reading a whole safetensors file.

    Attributes:
        sha256: of the file.
        not_finite: keys of the tensors that hold NaN or infinite values.
    """

    sha256: str
    not_finite: frozenset[str]


def scan(file: Path) -> Scan:
    """Read the rest of a safetensors file; all of it where it has changed since it was read.

    Raises:
        RecipeError: it cannot be read, or ends within a tensor.
    """
    return _reader(file).result()


def is_finite(tensor: StoredTensor) -> bool:
    """Tell whether a stored tensor holds neither NaN nor infinity.

    Reads the file up to the end of the tensor, on behalf of ``scan`` as well: consumers that take
    tensors in file order hit the page cache, so the file is read once.

    Raises:
        RecipeError: the file cannot be read, or ends within a tensor.
    """
    return _reader(tensor.file).is_finite(tensor.key)


def _reader(file: Path) -> "_Reader":
    state = file.stat()
    return _reader_of_state(file, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=1024)
def _reader_of_state(file: Path, *state: int) -> "_Reader":
    return _Reader(file)


class _Reader:
    """Reads a file tensor by tensor, from its beginning as far as needed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        # Tensors lie one after the other and fill the file after its header.
        self._unread = deque(
            sorted(tensors_of_file(file), key=lambda one: (one.offset, one.nbytes))
        )
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
        while self._unread:
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
            if not self._unread:
                return
            tensor = self._unread[0]
            with self._file.open("rb", buffering=0) as handle:
                handle.seek(self._position)
                digest = self._digest.copy()
                digest.update(handle.read(tensor.offset - self._position))
                finite = _read(handle, tensor, digest)
            self._digest, self._position = digest, tensor.offset + tensor.nbytes
            self._finite[tensor.key] = finite
            self._unread.popleft()


def _read(handle: io.FileIO, tensor: StoredTensor, digest: "hashlib._Hash") -> bool:
    """Add a tensor's bytes to the digest; tell whether its values are all finite."""
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
    """Tell whether values ``[*]`` hold neither NaN nor infinity, without temporaries."""
    if not values.numel():
        return True
    if values.dtype.itemsize == 1:
        # 8-bit floats have no minimum and maximum.
        values = values.to(torch.float32)
    low, high = values.aminmax()
    # NaN anywhere makes both NaN.
    return math.isfinite(float(low)) and math.isfinite(float(high))
