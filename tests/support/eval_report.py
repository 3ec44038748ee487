"""A small evaluation report, made from predictions as the stage makes one."""

from collections.abc import Mapping

import numpy as np

from epmq_deploy.quantization.results import LayerReport
from epmq_deploy.runtime.evaluation.diagnosis import Diagnosis, LayerNoise
from epmq_deploy.runtime.evaluation.evaluate import row_of
from epmq_deploy.runtime.evaluation.latency import Timing
from epmq_deploy.runtime.evaluation.predictions import TaskPredictions
from epmq_deploy.runtime.evaluation.report import EvalReport, Gates, Row
from epmq_deploy.runtime.evaluation.significance import Interval
from epmq_deploy.runtime.ort.footprint import Footprint

TASKS = {"cars": 400, "traffic_signs": 300}
KINDS = ("self_attn.q_proj", "fc1")
# Share of correct predictions, latency relative to fp32 and megabytes by model.
MODELS = {
    "experts": (0.9, 1.0, 0),
    "fp32": (0.7, 1.0, 400),
    "better": (0.8, 0.9, 60),
    "faster": (0.7, 0.3, 61),
    "equal": (0.7, 0.31, 59),
    "worse": (0.5, 0.2, 50),
}


def predictions(tasks: Mapping[str, int] = TASKS) -> dict[str, TaskPredictions]:
    """Class 1 is true; each model gets its share of the first samples right."""
    found = {}
    for task, count in tasks.items():
        predicted = {
            name: (np.arange(count) < share * count).astype(np.int64)
            for name, (share, _, _) in MODELS.items()
        }
        found[task] = TaskPredictions(np.ones(count, np.int64), predicted)
    return found


def build_report(tasks: Mapping[str, int] = TASKS, blocks: int = 4) -> EvalReport:
    """A report with two timings a graph, a diagnosis and layers of a quantization."""
    rows = tuple(_row(name, tasks) for name in MODELS)
    layers = ["vision_model.embeddings.patch_embedding"]
    layers += [
        f"vision_model.encoder.layers.{block}.{kind}" for block in range(blocks) for kind in KINDS
    ]
    noises = tuple(LayerNoise(name, 20.0 - i, 25.0 - i) for i, name in enumerate(layers))
    reports = [
        LayerReport(name, "solved", "", 4, 64, 0.02 + 0.001 * i, 0.01 + 0.001 * i)
        for i, name in enumerate(layers)
    ]
    return EvalReport(
        rows=rows,
        samples=tasks,
        provider="CPUExecutionProvider",
        gates=Gates(),
        margin=1.0,
        fingerprint="mark",
        diagnoses={"worse": Diagnosis(noises, tuple(layers[-2:]), (), 16)},
        layers=(LayerReport("embeddings.table", "kept", "too small"), *reports),
    )


def _row(name: str, tasks: Mapping[str, int]) -> Row:
    _, ratio, megabytes = MODELS[name]
    if name == "experts":
        return row_of(name, predictions(tasks), 1.0)
    seen = Interval(0.99 * ratio, 1.01 * ratio)
    timings = tuple(
        Timing(
            batch, None, 10 * batch * ratio, 12 * batch * ratio, 15 * batch * ratio, 1, ratio, seen
        )
        for batch in (1, 8)
    )
    return row_of(
        name,
        predictions(tasks),
        1.0,
        files=(f"onnx/model_{name}.onnx",),
        bytes=megabytes * 1_000_000,
        timings=timings,
        footprint=Footprint(12.5, 1_500_000 * megabytes),
    )
