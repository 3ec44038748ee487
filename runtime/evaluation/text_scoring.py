"""Score text-generation models.

An answer is right if it equals the expected one word by word; numbers are scored by their ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from epmq_deploy.artifacts.manifest import GraphEntry
from epmq_deploy.data.samples import Samples, TextSamples
from epmq_deploy.models.experts import ExpertBackbone
from epmq_deploy.models.text_generation.base import TextGenerationFamily
from epmq_deploy.models.text_generation.special_tokens import (
    SpecialTokens,
    count_endless,
    warn_of_endless,
)
from epmq_deploy.recipe import MetricName
from epmq_deploy.runtime.evaluation.correlation import RankCorrelation
from epmq_deploy.runtime.evaluation.predictions import Predicted, TaskPredictions
from epmq_deploy.runtime.evaluation.report import EXPERTS
from epmq_deploy.runtime.evaluation.scoring import Scorer, raw_samples
from epmq_deploy.runtime.evaluation.significance import Floats
from epmq_deploy.runtime.ort.generation import TextGenerator, text_generator
from epmq_deploy.runtime.ort.sessions import Graph, by_format


class NumberPredictions(TaskPredictions):
    """Numbers, as texts."""

    def _by(self, metric: MetricName, model: str) -> RankCorrelation:
        return RankCorrelation(_numbers(self.predicted[model]), _numbers(self.truth))


@dataclass(frozen=True)
class TextScorer(Scorer[TextGenerator, TextGenerationFamily]):
    """Generates the answers by greedy decoding.

    Attributes:
        max_tokens: longest answer.
        experts: in torch, or None.
        metrics: by task; accuracy where none are given.
    """

    max_tokens: int
    experts: ExpertBackbone | None = None
    metrics: Mapping[str, tuple[MetricName, ...]] = field(default_factory=dict)

    @property
    def special_tokens(self) -> SpecialTokens:
        """Return the ids that steer generation."""
        return self.family.special_tokens(self.folder)

    def open(self, threads: int | None) -> Mapping[str, TextGenerator]:
        """Open every format."""
        return {
            name: open_text_generator(
                self.family,
                self.folder,
                graphs,
                provider=self.provider,
                threads=threads,
                max_tokens=self.max_tokens,
            )
            for name, graphs in by_format(self.entries).items()
        }

    def predict(
        self, models: Mapping[str, TextGenerator], task: str, samples: Samples
    ) -> TaskPredictions:
        """Return predictions; answers as `normalised`."""
        expert = self.experts.become(task) if self.experts else None
        names = [*([EXPERTS] if expert else []), *models]
        generated: dict[str, list[str]] = {name: [] for name in names}
        endless = dict.fromkeys(names, 0)
        truth: list[str] = []
        for start in range(0, len(samples), self.batch_size):
            pairs = samples.inputs(start, min(start + self.batch_size, len(samples)))
            truth += [pair.answer for pair in pairs]
            texts = [pair.text for pair in pairs]
            prompts = self.family.prompts(self.folder, texts)
            for name, generator in models.items():
                answers = torch.from_numpy(generator.write(*prompts))
                generated[name] += self.family.decode(self.folder, answers)
                endless[name] += count_endless(answers, self.special_tokens.end)
            if expert is not None:
                answers = self.family.generate_ids(expert, self.folder, texts, self.max_tokens)
                generated[EXPERTS] += self.family.decode(self.folder, answers)
                endless[EXPERTS] += count_endless(answers, self.special_tokens.end)
        for name, count in endless.items():
            whose = f"task {task!r}, {name}"
            warn_of_endless(count, len(samples), whose, "eval.max_tokens", self.max_tokens)
        predicted = {
            name: np.array(list(map(normalised, texts))) for name, texts in generated.items()
        }
        assert isinstance(samples, TextSamples), "text generation reads texts"
        wanted = np.array(list(map(normalised, truth)))
        metrics = self.metrics.get(task, ("accuracy",))
        listed = samples.prompt_format.answers
        if samples.prompt_format.decimals is not None:
            return NumberPredictions(wanted, predicted, metrics)
        if listed is None or metrics == ("accuracy",):
            return TaskPredictions(wanted, predicted, metrics)
        return TaskPredictions(
            _numbered(wanted, listed),
            {name: _numbered(texts, listed) for name, texts in predicted.items()},
            metrics,
            len(listed) + 1,
        )

    def batch(self, samples: Samples, start: int, size: int) -> tuple[Tensor, ...]:
        """Return a batch of texts with the number of tokens of the longest expected answer.

        So all formats are timed on the same work, whatever they would generate.
        """
        pairs = raw_samples(samples, start, size)
        answers = answer_ids(self.family, self.folder, [pair.answer for pair in pairs])
        # Each with its end.
        length = torch.tensor(1 + max(map(len, answers)))
        return (*self.family.prompts(self.folder, [pair.text for pair in pairs]), length)


def normalised(text: str) -> str:
    """Return an answer in lower case and with single spaces, as answers are compared."""
    return " ".join(text.split()).casefold()


def _numbered(texts: Predicted, answers: Sequence[str]) -> Predicted:
    """Return the numbers of listed answers; that after the last for any other text."""
    places = {normalised(answer): number for number, answer in enumerate(answers)}
    return np.array([places.get(text, len(answers)) for text in texts.tolist()])


def _numbers(texts: Predicted) -> Floats:
    """Numbers that texts are, minus infinity where they are none."""
    return np.array([_number(text) for text in texts.tolist()])


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return -math.inf
    return number if math.isfinite(number) else -math.inf


def open_text_generator(
    family: TextGenerationFamily,
    folder: Path,
    entries: Sequence[GraphEntry],
    *,
    provider: str,
    threads: int | None,
    max_tokens: int,
) -> TextGenerator:
    """Return the text generator that runs the graphs of one format.

    Args:
        family: of the model.
        folder: of the export.
        entries: what its manifest says of these graphs, in the order they run.
        provider: see `epmq_deploy.runtime.ort.sessions.Graph`.
        threads: likewise.
        max_tokens: longest answer.
    """
    graphs = [
        Graph.exported(folder, entry, provider=provider, threads=threads) for entry in entries
    ]
    return text_generator(graphs, family.special_tokens(folder), max_tokens)


def answer_ids(
    family: TextGenerationFamily, folder: Path, answers: Sequence[str]
) -> list[list[int]]:
    """Token ids of answers, without their ends."""
    ids: list[list[int]] = family.tokenizer(folder)(list(answers), add_special_tokens=False)[
        "input_ids"
    ]
    return ids
