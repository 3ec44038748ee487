"""LoRA adapters (Hu et al., arXiv 2106.09685) in the layout of ``peft``, read as whole checkpoints.

An adapted weight is ``W + s B A`` with ``s = alpha / r``, or ``alpha / sqrt(r)`` where ranks are
stabilised (Kalajdzievski, arXiv 2312.03732). It is computed on demand, tensor by tensor, in
float32, and rounded to the base's dtype, as merging the adapter with ``peft`` does.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.checkpoints.tensors import (
    ComputedTensor,
    Rename,
    StoredTensor,
    TensorInfo,
    renamed,
    stored_tensors,
)
from epmq_deploy.errors import MismatchError, RecipeError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
}
# Options that change the formula, and what they are called.
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "biases in the factors",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron layers",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "factors of parameters that are not a module's weight",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal factors",
}
# Initialisations that change the base; the adapter does not hold the changed weights.
_CHANGED_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass
class _Factors:
    """Low-rank factors of one module's weight: ``r`` rows of ``a``, ``r`` columns of ``b``."""

    parts: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def transposed(self) -> bool:
        """Embedding tables hold a row per token: the transpose of a linear layer's weight."""
        return "embedding_a" in self.parts

    @property
    def pair(self) -> tuple[StoredTensor, StoredTensor] | None:
        """``A [r, ...]`` and ``B [..., r]``; None where one is missing."""
        prefix = "embedding_" if self.transposed else ""
        a, b = self.parts.get(f"{prefix}a"), self.parts.get(f"{prefix}b")
        return None if a is None or b is None or len(self.parts) != 2 else (a, b)


def adapted_tensors(
    folder: Path,
    config: Mapping[str, Any],
    base: Mapping[str, TensorInfo],
    rename: Rename,
) -> dict[str, TensorInfo]:
    """List all tensors of the base with an adapter applied, by canonical name.

    Args:
        folder: with ``adapter_model.safetensors``.
        config: its ``adapter_config.json``; the base it names is ignored.
        base: tensors of the base by canonical name.
        rename: stored name to canonical name.

    Raises:
        RecipeError: it is not a plain LoRA adapter.
        MismatchError: it does not fit the base; names every tensor.
    """
    _refuse_other_kinds(folder, config)
    stored = stored_tensors([folder / ADAPTER_FILE])
    factors, whole, problems = _by_kind(stored, config)
    tensors: dict[str, TensorInfo] = dict(base)
    for module, module_factors in factors.items():
        name = rename(f"{module}.weight")
        if not isinstance(name, str):
            problems.append(f"{module} is several of the base's layers, {' and '.join(name)}")
        elif name not in base:
            problems.append(f"{module} is not a layer of the base (no tensor {name})")
        elif module_factors.pair is None:
            parts = ", ".join(module_factors.parts)
            problems.append(f"{module} has {parts}, not one pair A and B")
        else:
            pair = module_factors.pair
            scaling = _scaling(module, pair[0].shape[0], config, problems)
            transposed = module_factors.transposed or bool(config.get("fan_in_fan_out"))
            problems += _shape_problems(module, base[name], pair, transposed)
            compute = partial(_adapted, base[name], pair, scaling, transposed)
            tensors[name] = ComputedTensor(base[name].shape, base[name].dtype, compute)
    for key, info in whole.items():
        tensors |= renamed(info, rename(key))
    if problems:
        raise MismatchError(f"{folder}: the adapter does not fit the base", problems)
    return tensors


def _refuse_other_kinds(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    unsupported = [] if kind == "LORA" else [f"peft_type {kind}"]
    unsupported += [label for option, label in _REFUSED.items() if config.get(option)]
    if config.get("bias", "none") != "none":
        unsupported.append(f"trained biases (bias: {config['bias']})")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        unsupported.append(f"a base changed by init_lora_weights: {start}")
    if not all(isinstance(config.get(option), int | float) for option in ("r", "lora_alpha")):
        unsupported.append("no r or no lora_alpha")
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(option) or {}:
            try:
                re.compile(pattern)
            except re.error:
                unsupported.append(f"{option} {pattern!r}, which is not a regular expression")
    if unsupported:
        raise RecipeError(
            f"{folder}: only plain LoRA adapters are supported, this one has "
            f"{', '.join(unsupported)}; merge it into its base (peft's merge_and_unload) and save "
            "the whole model"
        )


def _by_kind(
    stored: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> tuple[dict[str, _Factors], dict[str, StoredTensor], list[str]]:
    """Sort stored tensors: factors by module, whole tensors by name, and problems with others."""
    factors: dict[str, _Factors] = {}
    whole, problems = {}, []
    saved = tuple(config.get("modules_to_save") or ())
    for key, info in stored.items():
        name = key.removeprefix(_PREFIX)
        ending = next((end for end in _FACTORS if name.endswith(f".{end}")), None)
        if ending is not None:
            module = name.removesuffix(f".{ending}")
            factors.setdefault(module, _Factors()).parts[_FACTORS[ending]] = info
        elif _is_within(name, saved):
            whole[name.replace(".modules_to_save.", ".")] = info
        else:
            problems.append(f"{key} is neither a LoRA factor nor in modules_to_save")
    return factors, whole, problems


def _is_within(name: str, modules: Sequence[str]) -> bool:
    return any(f".{module}." in f".{name}" for module in modules)


def _scaling(module: str, rank: int, config: Mapping[str, Any], problems: list[str]) -> float:
    """Return the module's ``s``; patterns of module names may override rank and alpha."""
    expected = _by_pattern(module, config.get("rank_pattern") or {}, config["r"])
    alpha = _by_pattern(module, config.get("alpha_pattern") or {}, config["lora_alpha"])
    if rank != expected:
        problems.append(f"{module} has rank {rank}, {ADAPTER_CONFIG} makes it {expected}")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the name, as in ``peft``.

    Patterns match whole parts of dotted names.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _shape_problems(
    module: str, weight: TensorInfo, pair: tuple[StoredTensor, StoredTensor], transposed: bool
) -> list[str]:
    a, b = (info.shape for info in pair)
    shape = weight.shape[::-1] if transposed else weight.shape
    fits = len(a) > 1 and len(b) > 1 and b[0] == shape[0] and a[1:] == shape[1:] and b[1] == a[0]
    if fits and math.prod(b[2:]) == 1:
        return []
    return [
        f"{module} has A {list(a)} and B {list(b)}, which do not make a change of the base's "
        f"{list(weight.shape)}"
    ]


def _adapted(
    weight: TensorInfo,
    pair: tuple[StoredTensor, StoredTensor],
    scaling: float,
    transposed: bool,
) -> Tensor:
    """Compute ``W + s B A``, float32.

    A convolution has ``A [r, C, kh, kw]`` and ``B [N, r, 1, 1]``. With ``transposed``, ``W`` is
    stored as ``[in, out]``.
    """
    a, b = (info.load().to(torch.float32) for info in pair)
    change = scaling * (b.flatten(1) @ a.flatten(1))
    change = change.T if transposed else change
    return weight.load().to(torch.float32) + change.reshape(weight.shape)
