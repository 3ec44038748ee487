"""An exported text-generation model in an application."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from epmq_deploy.models.text_generation.base import TextGenerationFamily
from epmq_deploy.recipe import Task
from epmq_deploy.recipe.prompt import Prompt, template_columns
from epmq_deploy.runtime.evaluation.text_scoring import answer_ids, normalised
from epmq_deploy.runtime.inference.base import ExportedModel, text_of
from epmq_deploy.runtime.ort.generation import TextGenerator


@dataclass(frozen=True)
class Answer:
    """What a model generates for one input and one task.

    Attributes:
        text: the generated text, by greedy decoding.
        label: the listed answer that the text equals, ignoring case and whitespace as evaluation
            does; None if it equals none, or if the task lists no answers.
        score: the label's probability; None without a label or scores.
        scores: probabilities of generating exactly the listed answers, float32 ``[C]``, which sum
            to at most 1; None if not asked for, or if the task lists no answers.
        labels: the listed answers; None if the task lists none.
    """

    text: str
    label: str | None
    score: float | None
    scores: npt.NDArray[np.float32] | None
    labels: tuple[str, ...] | None


class ExportedTextGenerator(ExportedModel[Answer]):
    """The graphs of one format, which generate texts together.

    Args:
        generator: the graphs.
        family: of the model.
        folder: of the export.
        tasks: the recipe's.
        batch_size: inputs per run.
        scores: whether probabilities of listed answers are computed.
    """

    def __init__(
        self,
        generator: TextGenerator,
        family: TextGenerationFamily,
        folder: Path,
        tasks: Mapping[str, Task],
        batch_size: int,
        *,
        scores: bool,
    ) -> None:
        super().__init__(tuple(tasks), generator.provider, batch_size)
        self._generator, self._family, self._folder = generator, family, folder
        self._templates = {name: _template(task, family) for name, task in tasks.items()}
        self._labels = {name: (task.prompt or Prompt()).answers for name, task in tasks.items()}
        self._scores = scores

    def write(self, texts: str | Sequence[str]) -> Any:
        """Generate from texts as given, without any task's prompt.

        Args:
            texts: one or several.

        Returns:
            A text, or a list of texts.

        Raises:
            MismatchError: an input is no text; names every one.
        """
        read = self._read([texts] if isinstance(texts, str) else list(texts), ())
        generated: list[str] = []
        for start in range(0, len(read), self._batch_size):
            prompts = self._family.prompts(self._folder, read[start : start + self._batch_size])
            generated += self._decode(self._generator.write(*prompts))
        return generated[0] if isinstance(texts, str) else generated

    def _sample(self, item: Any, tasks: Sequence[str]) -> Any:
        """Return the prompt of each task, or the text itself without tasks."""
        if not tasks:
            return text_of(item)
        return {name: _filled(self._templates[name], item, name) for name in tasks}

    def _answers(self, samples: Sequence[Any], tasks: Sequence[str]) -> list[dict[str, Answer]]:
        by_task = {
            name: self._of_task(name, [sample[name] for sample in samples]) for name in tasks
        }
        return [{name: by_task[name][row] for name in tasks} for row in range(len(samples))]

    def _of_task(self, task: str, texts: Sequence[str]) -> list[Answer]:
        labels = self._labels[task]
        ids, mask = self._family.prompts(self._folder, texts)
        begun = self._generator.begin(ids.numpy(), mask.numpy())
        generated = self._decode(self._generator.write_on(*begun))
        if labels is None:
            return [Answer(text, None, None, None, None) for text in generated]
        scores: Sequence[npt.NDArray[np.float32] | None] = [None] * len(generated)
        if self._scores:
            answers = answer_ids(self._family, self._folder, labels)
            logarithms = self._generator.likelihoods(*begun, answers)
            scores = list(np.exp(logarithms).astype(np.float32))
        return [_answer(text, labels, row) for text, row in zip(generated, scores, strict=True)]

    def _decode(self, ids: npt.NDArray[np.int64]) -> list[str]:
        return self._family.decode(self._folder, torch.from_numpy(ids))


def _answer(text: str, labels: tuple[str, ...], scores: npt.NDArray[np.float32] | None) -> Answer:
    plain = [normalised(label) for label in labels]
    if normalised(text) not in plain:
        return Answer(text, None, None, scores, labels)
    index = plain.index(normalised(text))
    score = None if scores is None else float(scores[index])
    return Answer(text, labels[index], score, scores, labels)


def _template(task: Task, family: TextGenerationFamily) -> str:
    """Return the task's template; without a prompt, the input column alone."""
    if task.prompt is not None and task.prompt.template is not None:
        return task.prompt.template
    source = task.evaluation or task.calibration
    column = source.input_column if source is not None else None
    return f"{{{column or family.modality}}}"


def _filled(template: str, item: Any, task: str) -> str:
    """Return a template with a text in its only column, or with texts by column."""
    columns = dict.fromkeys(template_columns(template))
    if not isinstance(item, Mapping):
        if len(columns) > 1:
            raise ValueError(
                f"task {task!r} reads {' and '.join(columns)}; give a dictionary with a text for "
                "each"
            )
        item = dict.fromkeys(columns, item)
    missing = [name for name in columns if name not in item]
    if missing:
        raise ValueError(f"task {task!r} reads {' and '.join(missing)}, which is not given")
    return template.format_map({name: text_of(item[name]) for name in columns})
