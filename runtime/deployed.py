"""An exported model in an application: images or texts in, labels and scores per task out.

    from epmq_deploy.runtime import load

    model = load("onnx")
    model("cat.jpg")["animals"].label

Needs onnxruntime and what preprocesses inputs: transformers, torch and Pillow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.models import ModelFamily, family_of
from epmq_deploy.runtime.providers import AUTO
from epmq_deploy.runtime.report import REFERENCES
from epmq_deploy.runtime.sessions import Graph
from epmq_deploy.stage import read_manifest

_LOGITS = "logits_"


@dataclass(frozen=True)
class Prediction:
    """What a model says of one input for one task.

    Attributes:
        label: name of the most likely class; its number as text where neither recipe nor expert
            names it.
        score: its probability.
        scores: probabilities of all classes, float32 ``[C]``.
        labels: their names.
    """

    label: str
    score: float
    scores: npt.NDArray[np.float32]
    labels: tuple[str, ...]


class DeployedModel:
    """One graph of an export with its preprocessing; see ``load``.

    Args:
        graph: the graph.
        family: of the model.
        folder: of the export.
        classes: names of each task's classes, where they are known.
        batch_size: inputs per run.
    """

    def __init__(
        self,
        graph: Graph,
        family: ModelFamily,
        folder: Path,
        classes: Mapping[str, Sequence[str] | None],
        batch_size: int,
    ) -> None:
        self._graph, self._family, self._folder = graph, family, folder
        self._batch_size = batch_size
        self._names: dict[str, tuple[str, ...] | None] = {}
        for output in graph.output_names:
            if output.startswith(_LOGITS):
                name = output.removeprefix(_LOGITS)
                names = classes.get(name)
                self._names[name] = None if names is None else tuple(names)
        self.provider = graph.provider

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self._names)

    def __call__(self, inputs: Any, tasks: Sequence[str] | None = None) -> Any:
        """Classify.

        Args:
            inputs: one input or a sequence of them. Images are PIL images, files (path or text) or
                uint8 arrays ``[H, W]`` or ``[H, W, 3]``; texts are texts.
            tasks: names of the tasks wanted; all when absent.

        Returns:
            A ``Prediction`` by task, or a list of such dictionaries for a sequence of inputs.

        Raises:
            MismatchError: an unknown task, or inputs the model cannot take; names every one.
        """
        wanted = self.tasks if tasks is None else tuple(tasks)
        unknown = [name for name in wanted if name not in self._names]
        if unknown:
            known = ", ".join(self.tasks)
            raise MismatchError(
                "tasks", [f"no task {name!r}; there is {known}" for name in unknown]
            )
        several = _is_sequence(inputs)
        samples = self._read(list(inputs) if several else [inputs])
        found: list[dict[str, Prediction]] = []
        for start in range(0, len(samples), self._batch_size):
            batch = self._family.collate(self._folder, samples[start : start + self._batch_size])
            logits = self._graph.run(batch, [_LOGITS + name for name in wanted])
            for row in range(len(batch[0])):
                found.append(
                    {name: self._predict(name, logits[_LOGITS + name][row]) for name in wanted}
                )
        return found if several else found[0]

    def _predict(self, task: str, logits: npt.NDArray[np.float32]) -> Prediction:
        scores = np.exp(logits.astype(np.float64) - logits.max())
        scores /= scores.sum()
        best = int(logits.argmax())
        labels = self._names[task] or tuple(str(index) for index in range(len(logits)))
        return Prediction(labels[best], float(scores[best]), scores.astype(np.float32), labels)

    def _read(self, inputs: Sequence[Any]) -> list[Any]:
        """Inputs as the family takes them."""
        read: Callable[[Any], Any] = _text if self._family.modality == "text" else _image
        samples, problems = [], []
        for index, item in enumerate(inputs):
            try:
                samples.append(read(item))
            except (ValueError, OSError) as error:
                problems.append(f"input {index}: {error}")
        if problems:
            raise MismatchError("inputs", problems)
        return samples


def load(
    folder: str | Path,
    *,
    format: str | None = None,
    provider: str = AUTO,
    threads: int | None = None,
    batch_size: int = 32,
) -> DeployedModel:
    """Open an exported model.

    Args:
        folder: output of ``epmq export``.
        format: graph to run, e.g. ``matmulnbits``; when absent the one ``epmq eval`` recommended,
            or the first low-bit one where nothing was evaluated.
        provider: see `epmq_deploy.runtime.providers.provider_named`.
        threads: intra-op threads; onnxruntime's default when absent.
        batch_size: inputs per run.

    Raises:
        RecipeError: no export, no such format, an evaluation that recommends none, a model that
            writes texts, or the provider is not there or not really used.
        NumericsError: onnxruntime cannot load the graph.
    """
    place = Path(folder)
    made = read_manifest(place, "export")
    family = family_of(place)
    if family.writes_texts:
        raise RecipeError(f"{place} holds a model that writes texts; load opens classifiers")
    entries = {entry["format"]: entry for entry in made.details["graphs"]}
    chosen = entries.get(format or _recommended(place, entries))
    if chosen is None:
        raise RecipeError(f"{place} has no graph of format {format!r}; it has {', '.join(entries)}")
    graph = Graph.exported(place, chosen, provider=provider, threads=threads)
    if not any(name.startswith(_LOGITS) for name in graph.output_names):
        raise RecipeError(f"{place / chosen['file']} gives no logits of any task")
    return DeployedModel(graph, family, place, made.details["classes"], batch_size)


def _recommended(folder: Path, entries: Mapping[str, Any]) -> str:
    """The format the evaluation in the folder recommends, or the first low-bit one there is."""
    from epmq_deploy.runtime.eval_json import read_report
    from epmq_deploy.runtime.gates import NONE_RECOMMENDED, recommend

    report = read_report(folder / "eval.json")
    low_bit = [name for name in entries if name not in REFERENCES]
    if report is None or not low_bit:
        return next(iter(low_bit or entries))
    advice = recommend(report)
    if advice is None:
        raise RecipeError(f"{folder / 'eval.json'}: {NONE_RECOMMENDED}; choose one with format=...")
    return advice.format


def _is_sequence(inputs: Any) -> bool:
    if isinstance(inputs, np.ndarray):
        return inputs.ndim == 4
    return not isinstance(inputs, str | Path | Image.Image)


def _text(item: Any) -> str:
    if not isinstance(item, str):
        raise ValueError(f"expected a text, found {type(item).__name__}")
    return item


def _image(item: Any) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim not in (2, 3) or item.shape[2:] not in ((), (3,)):
            raise ValueError(
                f"expected a uint8 array [H, W] or [H, W, 3], found {item.dtype} {item.shape}"
            )
        return Image.fromarray(item)
    if not isinstance(item, str | Path):
        raise ValueError(f"expected an image, a file or an array, found {type(item).__name__}")
    try:
        with Image.open(item) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{item} is no image") from error
