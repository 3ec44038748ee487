"""Checkpoints with quantized weights: naming them, and computing the weights of 8-bit floats."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.checkpoints.tensors import ComputedTensor, StoredTensor, TensorInfo
from epmq_deploy.errors import RecipeError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# What files of quantized weights hold in addition to, or in place of, weights; and what made them.
_MARKS = (
    (r"(qweight|qzeros|g_idx)", "GPTQ or AWQ"),
    (r"(weight\.)?(absmax|quant_map|nested_absmax|quant_state\..*)", "bitsandbytes in 4 bits"),
    (r"(SCB|weight_format)", "bitsandbytes in 8 bits"),
    (r"weight_(packed|shape)", "compressed-tensors"),
    (r"W_q", "HQQ"),
    (r"weight\._(data|scale)", "quanto"),
    (r"codebooks", "AQLM"),
    (r"\w+_blocks", "MXFP4"),
    (r"weight_scale_2", "ModelOpt in 4 bits"),
    (r"_?weight_(qdata|zero_point)|weight:\w+", "torchao"),
)
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "8-bit floats",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "mxfp4": "MXFP4",
}
# Where a config says how weights were quantized.
_SETTINGS = ("quantization_config", "compression_config", "quantization")
_CODES = (torch.int8, torch.uint8, torch.int32, torch.uint32)
# Names of scales, after that of the tensor or of its module.
_SCALES = ("{tensor}_scale_inv", "{tensor}_scale", "{module}.scale_weight")
# Scales of what a layer takes and gives, for which there is no use.
_OF_ACTIVATIONS = re.compile(r".*\.(input|output|activation|k|v|q|kv)_scale(_ub)?")
_BLOCK = 128


@dataclass(frozen=True)
class _Scaled:
    """Computes a stored tensor times its scales.

    Attributes:
        stored: ``[out, in]`` in 8-bit floats.
        scale: one, one a row, or one a block ``[rows of blocks, columns of blocks]``.
        blocks: rows and columns of a block; None where blocks are no matter.
    """

    stored: StoredTensor
    scale: StoredTensor | None
    blocks: tuple[int, int] | None

    def __call__(self) -> Tensor:
        values = self.stored.load().to(torch.float32)
        if self.scale is None:
            return values
        scale = self.scale.load().to(torch.float32)
        if self.blocks is not None:
            rows, columns = self.blocks
            scale = scale.repeat_interleave(rows, 0)[: values.shape[0]]
            scale = scale.repeat_interleave(columns, 1)[:, : values.shape[1]]
        elif scale.numel() > 1:
            scale = scale.reshape(-1, *[1] * (values.dim() - 1))
        return values.mul_(scale)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without what it, or a part of it, says of quantized weights."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _SETTINGS
    }


def refuse_quantized(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Refuse weights that were quantized, other than to 8-bit floats with their scales.

    Args:
        folder: of the model.
        config: its ``config.json``.
        stored: its tensors by name.

    Raises:
        RecipeError: names how they were quantized.
    """
    by_tensors = next(
        (
            name
            for key in stored
            for pattern, name in _MARKS
            if re.fullmatch(rf"(.*\.)?{pattern}", key)
        ),
        None,
    )
    integers = any(key.endswith(".weight") and info.dtype in _CODES for key, info in stored.items())
    if by_tensors is None and not integers:
        return
    settings: Any = next((config[key] for key in _SETTINGS if config.get(key)), {})
    method = str(settings.get("quant_method", "")) if isinstance(settings, dict) else ""
    name = _NAMES.get(method, method) or by_tensors or "integers"
    raise RecipeError(
        f"{folder}: its weights are quantized ({name}); merging needs the weights they were made "
        "from: give the checkpoint in float32, float16 or bfloat16"
    )


def dequantized(
    folder: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    dtype_of: Callable[[str], torch.dtype | None],
) -> dict[str, TensorInfo]:
    """Return tensors with 8-bit floats multiplied by their scales, and without scales.

    Args:
        folder: of the model, for messages.
        config: its ``config.json``.
        stored: its tensors by name.
        dtype_of: what to round the tensor of a name to; None for what the config says.

    Raises:
        RecipeError: scales do not fit their tensor.
    """
    tensors: dict[str, TensorInfo] = dict(stored)
    eight_bit = [key for key, info in stored.items() if info.dtype in FLOAT8]
    for key in eight_bit:
        info = stored[key]
        module = key.rpartition(".")[0]
        names = [name.format(tensor=key, module=module) for name in _SCALES]
        scale = next((stored[name] for name in names if name in stored), None)
        blocks = None if scale is None else _blocks(folder, config, info, scale)
        dtype = dtype_of(key) or _declared_dtype(config)
        tensors[key] = ComputedTensor(info.shape, dtype, _Scaled(info, scale, blocks))
        for name in names:
            tensors.pop(name, None)
    if not eight_bit:
        return tensors
    return {key: info for key, info in tensors.items() if not _OF_ACTIVATIONS.fullmatch(key)}


def _declared_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that a model is loaded in; bfloat16 where its config does not say."""
    declared = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    return dtypes.get(declared, torch.bfloat16)


def _blocks(
    folder: Path, config: Mapping[str, Any], info: StoredTensor, scale: StoredTensor
) -> tuple[int, int] | None:
    """Return rows and columns of the blocks that share a scale; None for one scale or one a row.

    Raises:
        RecipeError: no such blocks fit.
    """
    rows = info.shape[0] if info.shape else 1
    if scale.shape in ((), (1,), (1, 1), (rows,), (rows, 1)):
        return None
    settings = config.get("quantization_config") or {}
    given = settings.get("weight_block_size") if isinstance(settings, dict) else None
    blocks = tuple(given) if isinstance(given, list) else (_BLOCK, _BLOCK)
    if len(info.shape) == 2 and len(blocks) == 2 and all(isinstance(n, int) for n in blocks):
        counts = tuple(-(-size // max(n, 1)) for size, n in zip(info.shape, blocks, strict=True))
        if scale.shape == counts:
            return blocks[0], blocks[1]
    raise RecipeError(
        f"{folder}: scales {scale.key} of shape {list(scale.shape)} do not fit {info.key} of shape "
        f"{list(info.shape)} in blocks of {list(blocks)}"
    )
