"""Measure how far outputs of exported graphs are from those of torch, on calibration samples."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from epmq_deploy.artifacts.manifest import Parity
from epmq_deploy.data.heads import Reading
from epmq_deploy.data.loading import load_samples
from epmq_deploy.data.samples import TextSamples, batches
from epmq_deploy.errors import EpmqError, NumericsError
from epmq_deploy.exporters.formats import formats_of
from epmq_deploy.exporters.formats.base import INT8_TOLERANCE
from epmq_deploy.exporters.memory import frozen_gc, release_weights_after_use
from epmq_deploy.exporters.verification.graphs import ExportedGraph
from epmq_deploy.models import Deployable, ModelFamily
from epmq_deploy.models.input_sources import written_inputs
from epmq_deploy.recipe import Task
from epmq_deploy.runtime.ort.graph_runs import INT8_LEVEL, run_graph

log = logging.getLogger(__name__)

_SAMPLES = 4

Batches = Sequence[tuple[Tensor, ...]]
Outputs = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True)
class ParityInputs:
    """What graphs are compared on.

    Attributes:
        kind: ``calibration`` samples, or ``example`` inputs where there are none.
        batches: model inputs, as the graph's ``input_names``; ``parity_inputs`` gives the
            family's.
        missing: by task, why it gave no samples.
        real: of each batch, which tokens are no padding, bool ``[B, T]``; None where all count.
    """

    kind: Literal["calibration", "example"]
    batches: Batches
    missing: Mapping[str, str]
    real: Sequence[Tensor | None] = ()


def parity_inputs(
    tasks: Mapping[str, Task], family: ModelFamily, folder: Path, example: tuple[Tensor, ...]
) -> ParityInputs:
    """Return a few calibration samples of every task whose data are there.

    Args:
        tasks: the recipe's.
        family: the model's.
        folder: of the merged model.
        example: what to take where no task has data; a warning says so.
    """
    calibration_batches, missing = [], {}
    inputs = written_inputs(tasks, folder)
    for name, task in tasks.items():
        if task.calibration is None:
            missing[name] = "no calibration data in the recipe"
            continue
        try:
            samples = load_samples(
                name,
                task.calibration,
                family,
                prompt=task.prompt,
                limit=_SAMPLES,
                labelled=False,
                reading=Reading.of_task(task, family),
            )
            samples = replace(samples, inputs_folder=inputs.get(name))
            if isinstance(samples, TextSamples) and samples.lacks_labels:
                # Texts are compared; what is written behind them may be anything.
                samples = replace(samples, pseudo_labels=dict.fromkeys(samples.indices, ""))
            calibration_batches += list(batches(samples, family, folder, _SAMPLES))
        except EpmqError as error:
            missing[name] = str(error)
    if calibration_batches:
        return ParityInputs("calibration", calibration_batches, missing)
    reasons = "; ".join(f"task {name!r}: {reason}" for name, reason in missing.items())
    log.warning(
        "no calibration samples to compare graphs with torch on, random inputs are used: %s",
        reasons,
    )
    return ParityInputs("example", [example], missing)


def torch_outputs(model: Deployable, inputs: Batches) -> Outputs:
    """Return what the model gives per batch, as ``output_names``."""
    model.eval()
    with torch.inference_mode(), release_weights_after_use(model):
        return [model(*batch) for batch in inputs]


@frozen_gc()
def measure_parity(
    graph: ExportedGraph,
    expected: Outputs,
    inputs: Batches,
    accuracy_level: int,
    real: Sequence[Tensor | None] = (),
) -> Parity:
    """Run a graph and compare.

    Args:
        graph: as written.
        expected: torch's outputs, of the merged model for a float format, else of the quantized.
        inputs: batches that gave them.
        accuracy_level: the graph was exported for.
        real: of each batch, which tokens count, bool ``[B, T]``; default: all.

    Raises:
        NumericsError: the graph is further from torch than its format's tolerance.
    """
    actual = run_graph(graph.path, accuracy_level, inputs)
    outputs = list(actual[0])
    counted = real or [None] * len(inputs)
    computed = [_rows([run[name] for run in actual], counted) for name in outputs]
    reference = [
        _rows([part.numpy() for part in parts], counted) for parts in zip(*expected, strict=True)
    ]
    (fmt,) = formats_of([graph.format])
    integer = fmt.low_bit and accuracy_level == INT8_LEVEL
    tolerance = max(fmt.tolerance, INT8_TOLERANCE) if integer else fmt.tolerance
    pairs = list(zip(computed, reference, strict=True))
    hits = [
        one.argmax(1) == other.argmax(1)
        for name, (one, other) in zip(outputs, pairs, strict=True)
        if name.startswith("logits")
    ]
    parity = Parity(
        samples=sum(len(batch[0]) for batch in inputs),
        max_abs=max(float(np.abs(one - other).max()) for one, other in pairs),
        relative=max(_relative(one, other) for one, other in pairs),
        agreement=float(np.concatenate(hits).mean()) if hits else None,
        tolerance=tolerance,
    )
    # Not a number is no parity either.
    if not parity.relative <= tolerance:
        raise NumericsError(
            f"{graph.path.name} differs from torch by {parity.relative:.2g} of its outputs' norm, "
            f"format {graph.format} allows {tolerance:g}"
        )
    return parity


def _rows(batches: Sequence[np.ndarray], real: Sequence[Tensor | None]) -> np.ndarray:
    """Batches of one output, which may differ in length, along their last axis.

    Of outputs for every token, those for padding are left out: they may be anything.
    """
    return np.concatenate(
        [
            batch.reshape(-1, batch.shape[-1])
            if tokens is None or batch.ndim < 3
            else batch[tokens.numpy()]
            for batch, tokens in zip(batches, real, strict=True)
        ]
    )


def _relative(computed: np.ndarray, reference: np.ndarray) -> float:
    return float(
        np.linalg.norm(computed - reference) / max(float(np.linalg.norm(reference)), 1e-30)
    )
