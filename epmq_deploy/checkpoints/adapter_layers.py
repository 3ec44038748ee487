"""What an adapter makes of one module of the base, computed by ``peft`` itself.

A model of this one module is built, under its full name, so that ``peft`` finds the ranks, scalings
and targets its settings give it. ``peft`` then merges the adapter into it, as ``merge_and_unload``
does with a whole model, but with one module in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.checkpoints.adapter_keys import DEFAULT_ADAPTER, MODEL_PREFIX, ROOT, TOKENS
from epmq_deploy.checkpoints.adapter_settings import ADAPTER_CONFIG, AdapterSettings
from epmq_deploy.checkpoints.tensors import TensorInfo

_CONVOLUTIONS: Mapping[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
# Building draws random numbers, which the adapter's tensors replace.
_building = Lock()


@dataclass(frozen=True)
class AdaptedModule:
    """A module of the base with an adapter.

    Attributes:
        name: dotted.
        settings: of the adapter.
        weight: the base's.
        bias: the base's; None where it has none.
        factors: the module's and shared tensors of the adapter, by key.
        largest: shapes of the weights that decide the size of shared tensors, by module.
        decomposed: whether loading the adapter takes a part of the weight away.
    """

    name: str
    settings: AdapterSettings
    weight: TensorInfo
    bias: TensorInfo | None
    factors: Mapping[str, TensorInfo]
    largest: Mapping[str, tuple[int, ...]]
    decomposed: bool = False

    def merged_weight(self) -> Tensor:
        """Compute the weight with the adapter merged, float32."""
        weight: Tensor = self._merged().get_parameter("weight").data
        return weight

    def merged_bias(self) -> Tensor:
        """Compute the bias with the adapter merged, float32."""
        bias: Tensor = self._merged().get_parameter("bias").data
        return bias

    def problems(self) -> list[str]:
        """Say where the adapter's tensors are not those its settings make for such a module."""
        try:
            return self._differences()
        except Exception as error:
            # Whatever peft raises while it builds and loads is about the user's files.
            return [f"{self.name}: {' '.join(str(error).split())}"]

    def _differences(self) -> list[str]:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        # Pruning needs values.
        with torch.device("cpu" if self.settings.prunes_ranks else "meta"):
            factors = {
                key: torch.empty(info.shape, dtype=info.dtype) for key, info in self.factors.items()
            }
            weight = torch.zeros(self.weight.shape)
            bias = None if self.bias is None else torch.zeros(self.bias.shape)
            model = self._model(weight, bias, decomposed=False)
        expected = get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
        differences = [
            f"{_plain(key)} has shape {list(info.shape)}, {ADAPTER_CONFIG} and the base make it "
            f"{list(expected[key].shape)}"
            for key, info in self.factors.items()
            if key in expected and expected[key].shape != info.shape
        ]
        # Where ranks were pruned, loading changes shapes.
        if differences and not self.settings.prunes_ranks:
            return differences
        loaded = set_peft_model_state_dict(model, factors)
        missing = [key for key in loaded.missing_keys if self._is_factor(key)]
        return [f"{_plain(key)} is missing" for key in missing] + [
            f"{_plain(key)} is not part of an adapter as {ADAPTER_CONFIG} describes it"
            for key in loaded.unexpected_keys
        ]

    def _is_factor(self, key: str) -> bool:
        part = key.removeprefix(f"{MODEL_PREFIX}{self.name}.")
        # Modules have references to shared tensors.
        shared = f"{ROOT}{part.removesuffix(f'.{DEFAULT_ADAPTER}')}" in self.factors
        return part != key and part.startswith((self.settings.prefix, TOKENS)) and not shared

    def _merged(self) -> nn.Module:
        from peft import set_peft_model_state_dict

        with torch.no_grad():
            weight = self.weight.load().to(torch.float32)
            bias = None if self.bias is None else self.bias.load().to(torch.float32)
            model = self._model(weight, bias, decomposed=self.decomposed)
            set_peft_model_state_dict(
                model, {key: info.load() for key, info in self.factors.items()}
            )
            merged: nn.Module = model.merge_and_unload().get_submodule(self.name)
            return merged

    def _model(self, weight: Tensor, bias: Tensor | None, *, decomposed: bool) -> Any:
        """Build the model of this one module with an adapter of any value.

        Args:
            weight: of the module; it is used, not copied.
            bias: as ``weight``.
            decomposed: whether building may change ``weight``, as the adapter's settings ask for.
        """
        from peft import get_peft_model

        parts = {key.removeprefix(f"{MODEL_PREFIX}{self.name}.") for key in self.factors}
        tokens = any(part.startswith(TOKENS) for part in parts)
        table = tokens or any(part.startswith("lora_embedding_") for part in parts)
        config = self.settings.of_module(self.name, tokens=tokens, decomposed=decomposed)
        transposed = bool(getattr(config, "fan_in_fan_out", False))
        modules = {
            name: _module(torch.zeros(shape), None, table=False, transposed=transposed)
            for name, shape in self.largest.items()
            if name != self.name
        }
        modules[self.name] = _module(weight, bias, table=table, transposed=transposed)
        with _building, torch.random.fork_rng(devices=[]):
            return get_peft_model(_nested(modules), config).eval()


def _plain(key: str) -> str:
    """Return a key without what ``peft`` adds to the model's own names."""
    return key.removeprefix(MODEL_PREFIX).replace(f".{DEFAULT_ADAPTER}", "")


def _module(weight: Tensor, bias: Tensor | None, *, table: bool, transposed: bool) -> nn.Module:
    """Return a module with these parameters, of the kind that the weight's shape tells.

    Args:
        weight: ``[out, in]``, ``[in, out]``, ``[rows, width]``, ``[N, C, ...]`` or ``[width]``.
        bias: ``[out]``.
        table: whether the weight is an embedding's.
        transposed: whether a linear layer's weight is stored as ``[in, out]``.
    """
    shape = weight.shape
    module: nn.Module
    with torch.device("meta"):
        if weight.dim() == 1:
            module = nn.LayerNorm(shape, bias=bias is not None)
        elif table:
            module = nn.Embedding(*shape)
        elif weight.dim() in _CONVOLUTIONS:
            kind = _CONVOLUTIONS[weight.dim()]
            module = kind(shape[1], shape[0], tuple(shape[2:]), bias=bias is not None)
        elif transposed:
            from transformers.pytorch_utils import Conv1D

            module = Conv1D(shape[1], shape[0])
        else:
            module = nn.Linear(shape[1], shape[0], bias=bias is not None)
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if not table:
        given = None if bias is None else nn.Parameter(bias, requires_grad=False)
        module.register_parameter("bias", given)
    return module


def _nested(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a model with these modules under their dotted names."""
    root = nn.Module()
    for name, module in modules.items():
        parent = root
        *path, last = name.split(".")
        for part in path:
            children = dict(parent.named_children())
            if part not in children:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)
    return root
