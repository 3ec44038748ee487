"""Which layers of a low-bit graph differ most from fp32 merged, measured in the deployed graphs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from epmq_deploy.errors import MismatchError
from epmq_deploy.runtime.evaluation.layer_values import (
    FloatLayer,
    LayerValues,
    quantized_layers,
    tap,
)
from epmq_deploy.runtime.ort.sessions import Graph

# A layer stands out when its own error has twice the amplitude of the typical layer's.
_STANDS_OUT_DB = 20 * math.log10(2)
# Of equal outputs; no float32 signal is known better.
_LARGEST_DB = 150.0

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerNoise:
    """How far one layer is from fp32 merged, in decibels; the higher, the closer.

    Attributes:
        layer: dotted name.
        output_db: signal-to-noise ratio of the layer's output in the deployed graph, with all that
            earlier layers have added.
        own_db: the same of what the layer itself makes of the inputs it gets there, against what
            the float layer would make of them; equal to ``output_db`` for layers that read the
            graph's inputs.
    """

    layer: str
    output_db: float
    own_db: float


@dataclass(frozen=True)
class Diagnosis:
    """One graph's layers.

    Attributes:
        layers: in running order.
        blamed: those whose own error has at least twice the amplitude of the median layer's, the
            worst first.
        missing: quantized layers that fp32 merged has no node for, as it holds their constant
            results (look-ups of positions).
        samples: number of samples measured on.
    """

    layers: tuple[LayerNoise, ...]
    blamed: tuple[str, ...]
    missing: tuple[str, ...]
    samples: int

    @property
    def worst_first(self) -> tuple[LayerNoise, ...]:
        """All layers by their own error."""
        return tuple(sorted(self.layers, key=lambda noise: noise.own_db))


class _Ratio:
    """Sums up signal and noise."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, actual: Array, expected: Array) -> None:
        self._signal += float(np.square(expected, dtype=np.float64).sum())
        self._noise += float(np.square(actual.astype(np.float64) - expected).sum())

    @property
    def decibels(self) -> float:
        if self._noise == 0:
            return _LARGEST_DB
        ratio = self._signal / self._noise
        # Infinite or undefined values are no signal.
        if not ratio > 0:
            return -_LARGEST_DB
        return max(-_LARGEST_DB, min(_LARGEST_DB, 10 * math.log10(ratio)))


def diagnose(
    fp32: Path,
    files: Mapping[str, Path],
    session_configs: Mapping[str, Mapping[str, str]],
    samples: Sequence[tuple[Tensor, ...]],
    tasks: Sequence[str | None] = (),
    task_inputs: Mapping[str, Sequence[str]] | None = None,
    **session: Any,
) -> dict[str, Diagnosis]:
    """Compare each layer of some graphs with the same layer of fp32 merged, on the same samples.

    The graphs run as they are deployed, with layers' inputs and outputs as further outputs. Methods
    that move layers away from fp32 merged on purpose, towards the experts, show here as noise: it
    is to blame only where accuracy drops.

    Args:
        fp32: the fp32 merged graph.
        files: other graphs by format.
        session_configs: of those graphs, by format.
        samples: model inputs, batches of one (so that nothing is padded).
        tasks: of the samples, where graphs have corrections for tasks.
        task_inputs: tasks that the graphs' inputs ``task`` number, by format.
        session: other options of `epmq_deploy.runtime.ort.sessions.Graph`.

    Raises:
        MismatchError: a graph has no layer that fp32 merged has too.
    """
    names = {name: quantized_layers(file) for name, file in files.items()}
    reference_values = tap(fp32, {layer for layers in names.values() for layer in layers})
    reference = _graph(reference_values, fp32, session)
    expected = [reference.run(inputs) for inputs in samples]
    diagnoses = {}
    for name, file in files.items():
        linear = {
            key for key, layer in reference_values.layers.items() if isinstance(layer, FloatLayer)
        }
        values = tap(file, reference_values.layers.keys() & set(names[name]), linear)
        if not values.layers:
            raise MismatchError(
                "diagnosis", [f"{file}: no layer is named as in {fp32}; export it again"]
            )
        own = {"session_config": session_configs[name], "tasks": (task_inputs or {}).get(name, ())}
        graph = _graph(values, file, {**session, **own})
        pairs = zip(samples, tasks or [None] * len(samples), strict=True)
        actual = (graph.run(inputs, task=task) for inputs, task in pairs)
        noises = _noises(values, reference_values, zip(actual, expected, strict=True))
        missing = tuple(layer for layer in names[name] if layer not in values.layers)
        diagnoses[name] = Diagnosis(noises, _blamed(noises), missing, len(samples))
    return diagnoses


def _graph(values: LayerValues, file: Path, session: Mapping[str, Any]) -> Graph:
    with values.saved() as tapped:
        return Graph(tapped, name=str(file), **session)


def _noises(
    values: LayerValues, reference_values: LayerValues, runs: Any
) -> tuple[LayerNoise, ...]:
    cumulative = {name: _Ratio() for name in values.layers}
    alone = {name: _Ratio() for name in values.layers}
    for actual, expected in runs:
        for name, layer in values.layers.items():
            reference_layer, output = reference_values.layers[name], actual[layer.output]
            cumulative[name].add(output, _laid_out(expected[reference_layer.output], output))
            if isinstance(reference_layer, FloatLayer) and layer.input is not None:
                alone[name].add(
                    output, reference_layer.apply(_unsmoothed(actual[layer.input], layer.factors))
                )
            else:
                alone[name].add(output, _laid_out(expected[reference_layer.output], output))
    return tuple(
        LayerNoise(name, cumulative[name].decibels, alone[name].decibels) for name in values.layers
    )


def _unsmoothed(inputs: Array, factors: Array | None) -> Array:
    """Return what a layer would have received had its input, ``[..., K]``, not been divided."""
    return inputs if factors is None else inputs * factors[: inputs.shape[-1]]


def _laid_out(expected: Array, actual: Array) -> Array:
    """Return a convolution's ``[B, N, h, w]`` as ``[B, h * w, N]`` where patches are multiplied."""
    if expected.ndim == 4 and actual.ndim == 3:
        return expected.reshape(*expected.shape[:2], -1).swapaxes(1, 2)
    return expected


def _blamed(noises: Sequence[LayerNoise]) -> tuple[str, ...]:
    limit = statistics.median(noise.own_db for noise in noises) - _STANDS_OUT_DB
    worst = sorted((noise.own_db, noise.layer) for noise in noises if noise.own_db <= limit)
    return tuple(layer for _, layer in worst)
