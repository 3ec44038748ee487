"""Tensors on disk, or computed from such, one at a time; nothing is read until asked for."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from epmq_deploy.errors import RecipeError

# A stored tensor's name to its canonical one; several names cut it into equal parts along the
# first dimension.
Rename = Callable[[str], str | tuple[str, ...]]

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
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo(ABC):
    """What is known of a tensor before it is read.

    Attributes:
        shape: its shape.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @abstractmethod
    def read_into(self, target: Tensor) -> None:
        """Overwrite a contiguous CPU tensor of this shape and dtype."""

    def load(self) -> Tensor:
        """The tensor, CPU."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor in a safetensors file, or a part of one along its first dimension.

    Attributes:
        file: the file.
        key: its name in that file.
        offset: of its first byte in the file.
    """

    file: Path
    key: str
    offset: int

    def read_into(self, target: Tensor) -> None:
        """See base.

        Read straight into memory that is there already: mapping the file anew for every tensor
        takes several times as long, and mapping it once keeps its pages resident.

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
        """The error of a file that ends within the tensor."""
        return RecipeError(f"{self.file}: ends within tensor {self.key!r}")

    def parts(self, count: int) -> "tuple[StoredTensor, ...]":
        """The tensor in equal parts along the first dimension.

        Raises:
            RecipeError: it cannot be cut so.
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
class ComputedTensor(TensorInfo):
    """A tensor that follows from others.

    Attributes:
        compute: gives the tensor, of the shape and dtype told.
    """

    compute: Callable[[], Tensor]

    def read_into(self, target: Tensor) -> None:
        """See base."""
        target.copy_(self.compute())

    def load(self) -> Tensor:
        """See base."""
        return self.compute().to(self.dtype).contiguous()


def stored_tensors(
    files: Iterable[Path], rename: Rename = lambda key: key
) -> dict[str, StoredTensor]:
    """The tensors of safetensors files by canonical name.

    Args:
        files: all of one model.
        rename: stored name to canonical name or names.

    Raises:
        RecipeError: a file cannot be read, holds a dtype that is not supported, or two tensors with
            one canonical name.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            for info in tensors_of_file(file):
                for name, part in renamed(info, rename(info.key)).items():
                    other = tensors.setdefault(name, part)
                    if other is not part:
                        raise RecipeError(
                            f"{file}: tensors {other.key!r} and {info.key!r} both mean {name}"
                        )
        except (OSError, SafetensorError) as error:
            raise RecipeError(f"{file}: not readable as safetensors ({error})") from error
    return tensors


def same_values(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors are copies of each other."""
    return one.shape == other.shape and torch.equal(one.load(), other.load())


def renamed(info: StoredTensor, names: str | tuple[str, ...]) -> dict[str, StoredTensor]:
    """A stored tensor by its canonical name, or its parts by theirs."""
    names = (names,) if isinstance(names, str) else names
    return dict(zip(names, info.parts(len(names)), strict=True))


def tensors_of_file(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file by their own names.

    Raises:
        RecipeError: one has a dtype that is not supported.
    """
    found = []
    with safe_open(file, framework="pt") as handle:
        offsets = _offsets(file)
        for key in handle.keys():  # noqa: SIM118 - no mapping
            view = handle.get_slice(key)
            dtype = DTYPES.get(view.get_dtype())
            if dtype is None:
                raise RecipeError(
                    f"{file}: tensor {key!r} has dtype {view.get_dtype()}, "
                    f"supported: {', '.join(DTYPES)}"
                )
            found.append(StoredTensor(tuple(view.get_shape()), dtype, file, key, offsets[key]))
    return found


def _offsets(file: Path) -> dict[str, int]:
    """Where each tensor begins: the layout of safetensors, whose header ``safe_open`` validates."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
    return {
        key: 8 + size + entry["data_offsets"][0]
        for key, entry in header.items()
        if key != "__metadata__"
    }
