"""Weight files written tensor by tensor, and read once."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from epmq_deploy.checkpoints.tensors import stored_tensors
from epmq_deploy.checkpoints.weight_scan import is_finite, scan
from epmq_deploy.checkpoints.writing import write_tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def mixed() -> dict[str, Tensor]:
    """Widths in an order that would leave some of them at odd places."""
    generator = torch.Generator().manual_seed(0)
    return {
        "bytes": torch.randint(0, 9, (3,), dtype=torch.uint8, generator=generator),
        "half": torch.randn(5, generator=generator).half(),
        "ids": torch.arange(7)[None],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "brain": torch.randn(3, 3, generator=generator).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 6, generator=generator).T,
        "double": torch.randn(2, dtype=torch.float64, generator=generator),
    }


def write(file: Path, tensors: dict[str, Tensor]) -> None:
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    write_tensors(file, layout, tensors.items())


def test_files_are_those_safetensors_reads(tmp_path: Path) -> None:
    tensors, file = mixed(), tmp_path / "model.safetensors"
    write(file, tensors)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    for name, info in stored_tensors([file]).items():
        assert info.offset % info.dtype.itemsize == 0, name  # type: ignore[attr-defined]


def test_a_tensor_that_is_not_as_announced_is_an_error(tmp_path: Path) -> None:
    layout = {"w": (torch.float32, (2,))}
    with pytest.raises(AssertionError, match="w is not as announced"):
        write_tensors(tmp_path / "f", layout, [("w", torch.zeros(3))])


@pytest.mark.parametrize("writer", [write, save_file])
def test_scanning_gives_the_file_s_hash(tmp_path: Path, writer: object) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {name: value.contiguous() for name, value in mixed().items()}
    # Longer than what is read at a time, and no multiple of it.
    tensors["long"] = torch.randn(2**21 + 2**20 + 5)
    assert callable(writer)
    if writer is write:
        write(file, tensors)
    else:
        save_file(tensors, file)
    found = scan(file)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.not_finite == frozenset()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scanning_names_tensors_that_are_not_finite(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    long = torch.zeros(2**22 + 3, dtype=dtype)
    long[-1] = value
    last = torch.ones(3, 3, dtype=dtype)
    last[1, 1] = value
    ids = torch.full((4,), 2**62)
    tensors = {"fine": torch.full((5,), 60000.0, dtype=dtype), "long": long, "last": last}
    write(tmp_path / "f.safetensors", tensors | {"ids": ids})
    assert scan(tmp_path / "f.safetensors").not_finite == {"long", "last"}


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "a", "b")])
def test_tensors_that_were_checked_one_by_one_give_the_same_scan(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    file = tmp_path / "f.safetensors"
    values = {"a": 1.0, "b": float("inf"), "c": 2.0}
    write(file, {name: torch.full((2**19,), value) for name, value in values.items()})
    stored = stored_tensors([file])
    assert [is_finite(stored[name]) for name in order] == [name != "b" for name in order]
    found = scan(file)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.not_finite == {"b"}


def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    write(file, {"w": torch.ones(4)})
    first = scan(file)
    assert scan(file) is first
    write(file, {"w": torch.full((4,), float("nan"))})
    second = scan(file)
    assert second.not_finite == {"w"}
    assert second.sha256 != first.sha256
