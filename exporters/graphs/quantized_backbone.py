"""A backbone that computes with its quantized layers, few of them in float at a time."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from epmq_deploy.exporters.memory import eager_free
from epmq_deploy.quantization.results import QuantizedLinear
from epmq_deploy.quantization.sequential import apply_quantized


@contextmanager
def quantized_layers(
    backbone: nn.Module, layers: Mapping[str, QuantizedLinear], replaced: Mapping[str, Tensor]
) -> Iterator[None]:
    """Have a backbone compute with its quantized layers.

    Linear layers are dequantized while they run and are what they were afterwards. All else stays
    replaced: embeddings and convolutions, layers that share their weight, ``replaced`` parameters.
    """
    shared = Counter(map(id, (p for _, p in backbone.named_parameters(remove_duplicate=False))))
    modules = {name: backbone.get_submodule(name) for name in layers}
    alone = {
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and shared[id(module.weight)] == 1
    }
    with eager_free():
        rest = {name: layer for name, layer in layers.items() if name not in alone}
        apply_quantized(backbone, rest, replaced)
        handles = [
            handle for name in alone for handle in _dequantize_on_call(modules[name], layers[name])
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _dequantize_on_call(linear: nn.Module, layer: QuantizedLinear) -> tuple[Any, Any]:
    weight = linear.get_parameter("weight")
    given = weight.data

    def before(*_: Any) -> None:
        weight.data = layer.dequantize().to(given)

    def after(*_: Any) -> None:
        weight.data = given

    return (
        linear.register_forward_pre_hook(before),
        linear.register_forward_hook(after, always_call=True),
    )
