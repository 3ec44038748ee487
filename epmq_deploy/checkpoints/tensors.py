"""Tensors on disk, or computed from such tensors; nothing is read until asked for."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from epmq_deploy.errors import RecipeError

# From a stored tensor's name to its canonical one; several names split it into equal parts along
# the first dimension, and a ``Transposed`` one exchanges its dimensions.
Rename = Callable[[str], str | tuple[str, ...]]


class Transposed(str):
    """Canonical name of a matrix that files hold the transpose of, as GPT-2's do."""

    __slots__ = ()


# Dtypes by their names in safetensors files.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U32": torch.uint32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class TensorInfo(ABC):
    """A tensor that has not been read.

    Attributes:
        shape: its shape.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of its values in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in files."""
        return self.shape

    def to_store(self, value: Tensor) -> Tensor:
        """Return a value of this shape as files hold it, in ``stored_shape``."""
        return value

    @abstractmethod
    def read_into(self, target: Tensor) -> None:
        """Overwrite a contiguous CPU tensor of this shape and dtype."""

    @abstractmethod
    def parts(self, count: int) -> "tuple[TensorInfo, ...]":
        """Split the tensor into equal parts along the first dimension.

        Raises:
            RecipeError: the dimension is not a multiple of ``count``.
        """

    def load(self) -> Tensor:
        """Read the tensor, CPU."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor in a safetensors file, or a part of one along its first dimension.

    Attributes:
        file: the file.
        key: its name in that file.
        offset: position of its first byte in that file.
    """

    file: Path
    key: str
    offset: int

    def read_into(self, target: Tensor) -> None:
        """Read from the file straight into the memory of ``target``.

        Mapping the file anew for every tensor takes several times as long, and mapping it once
        keeps its pages resident.

        Raises:
            RecipeError: the file ends before the tensor does.
        """
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            flat: Any = target.detach().reshape(-1).view(torch.uint8).numpy()
            content = memoryview(flat)
            while content:
                read = file.readinto(content)
                if not read:
                    raise self.cut_short()
                content = content[read:]

    def cut_short(self) -> RecipeError:
        """Return the error for a file that ends within the tensor."""
        return RecipeError(f"{self.file}: ends within tensor {self.key!r}")

    def parts(self, count: int) -> "tuple[StoredTensor, ...]":
        """Split the tensor into equal parts along the first dimension.

        Raises:
            RecipeError: the dimension is not a multiple of ``count``.
        """
        if count == 1:
            return (self,)
        if not self.shape or self.shape[0] % count:
            raise RecipeError(
                f"{self.file}: tensor {self.key!r} of shape {list(self.shape)} cannot be cut into "
                f"{count} parts"
            )
        shape = (self.shape[0] // count, *self.shape[1:])
        size = self.nbytes // count
        return tuple(
            StoredTensor(shape, self.dtype, self.file, self.key, self.offset + index * size)
            for index in range(count)
        )


@dataclass(frozen=True)
class TransposedTensor(TensorInfo):
    """The transpose of another matrix.

    Attributes:
        original: the matrix as it is stored.
    """

    original: TensorInfo

    @classmethod
    def of(cls, info: TensorInfo) -> "TransposedTensor":
        """Return a matrix with its dimensions exchanged.

        Raises:
            RecipeError: it is no matrix.
        """
        if len(info.shape) != 2:
            raise RecipeError(f"a tensor of shape {list(info.shape)}, where a matrix is needed")
        return cls(info.shape[::-1], info.dtype, info)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in files."""
        return self.original.shape

    def to_store(self, value: Tensor) -> Tensor:
        """Return the transpose."""
        return value.T.contiguous()

    def read_into(self, target: Tensor) -> None:
        """Read the stored matrix and exchange its dimensions."""
        target.copy_(self.original.load().T)

    def parts(self, count: int) -> "tuple[TensorInfo, ...]":
        """Return the tensor, which is never cut."""
        assert count == 1, "a transposed tensor has one name"
        return (self,)


@dataclass(frozen=True)
class ComputedTensor(TensorInfo):
    """A tensor that is computed from others.

    Attributes:
        compute: returns the tensor, of this shape, in any floating-point dtype.
    """

    compute: Callable[[], Tensor]

    def read_into(self, target: Tensor) -> None:
        """Compute the tensor into ``target``."""
        target.copy_(self.compute())

    def load(self) -> Tensor:
        """Compute the tensor, CPU."""
        return self.compute().to(self.dtype).contiguous()

    def parts(self, count: int) -> "tuple[TensorInfo, ...]":
        """Split the tensor; each part computes all of it."""
        if count == 1:
            return (self,)
        if not self.shape or self.shape[0] % count:
            raise RecipeError(f"shape {list(self.shape)} cannot be cut into {count} parts")
        rows = self.shape[0] // count
        shape = (rows, *self.shape[1:])
        return tuple(
            ComputedTensor(shape, self.dtype, partial(self._rows, index * rows, rows))
            for index in range(count)
        )

    def _rows(self, first: int, rows: int) -> Tensor:
        return self.compute().narrow(0, first, rows)


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """List the tensors of safetensors files by their stored names.

    Args:
        files: all files of one model.

    Raises:
        RecipeError: a file cannot be read, holds a dtype that is not supported, or the name of a
            tensor in another file.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            for info in tensors_of_file(file):
                other = tensors.setdefault(info.key, info)
                if other is not info:
                    raise RecipeError(f"{file}: tensor {info.key!r} is in {other.file}, too")
        except (OSError, SafetensorError) as error:
            raise RecipeError(f"{file}: not readable as safetensors ({error})") from error
    return tensors


def canonical_tensors(
    tensors: Mapping[str, TensorInfo], rename: Rename, source: object
) -> dict[str, TensorInfo]:
    """Return tensors by canonical name.

    Args:
        tensors: by stored name.
        rename: stored name to canonical name or names.
        source: what to call the model in messages.

    Raises:
        RecipeError: two tensors have one canonical name.
    """
    result: dict[str, TensorInfo] = {}
    stored_names: dict[str, str] = {}
    for stored, info in tensors.items():
        for name, part in renamed(info, rename(stored)).items():
            other = stored_names.setdefault(name, stored)
            if other != stored:
                raise RecipeError(f"{source}: tensors {other!r} and {stored!r} both mean {name}")
            result[name] = part
    return result


def concatenated(parts: Sequence[TensorInfo]) -> TensorInfo:
    """Return one tensor made of parts along the first dimension."""
    first, *others = parts
    if not others:
        return first
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return ComputedTensor(shape, first.dtype, lambda: torch.cat([part.load() for part in parts]))


def same_values(one: TensorInfo, other: TensorInfo) -> bool:
    """Tell whether two tensors are copies of each other."""
    return one.shape == other.shape and torch.equal(one.load(), other.load())


def renamed(info: TensorInfo, names: str | tuple[str, ...]) -> dict[str, TensorInfo]:
    """Return a tensor by its canonical name, or its parts by their names."""
    if isinstance(names, Transposed):
        return {str(names): TransposedTensor.of(info)}
    names = (names,) if isinstance(names, str) else names
    return dict(zip(names, info.parts(len(names)), strict=True))


def tensors_of_file(file: Path) -> list[StoredTensor]:
    """List the tensors of one safetensors file.

    Raises:
        RecipeError: a tensor has a dtype that is not supported.
    """
    tensors = []
    with safe_open(file, framework="pt") as handle:
        offsets = _offsets(file)
        for key in handle.keys():  # noqa: SIM118 - not a mapping
            view = handle.get_slice(key)
            dtype = DTYPES.get(view.get_dtype())
            if dtype is None:
                raise RecipeError(
                    f"{file}: tensor {key!r} has dtype {view.get_dtype()}, "
                    f"supported: {', '.join(DTYPES)}"
                )
            tensors.append(StoredTensor(tuple(view.get_shape()), dtype, file, key, offsets[key]))
    return tensors


def _offsets(file: Path) -> dict[str, int]:
    """Read where each tensor begins from the header, which ``safe_open`` has validated."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
    return {
        key: 8 + size + entry["data_offsets"][0]
        for key, entry in header.items()
        if key != "__metadata__"
    }
