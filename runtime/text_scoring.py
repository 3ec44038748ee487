"""Scoring models that write texts: an answer is right when it is the wanted one, word by word."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from epmq_deploy.experts import ExpertBackbone
from epmq_deploy.models.writer import WriterFamily
from epmq_deploy.runtime.generation import TextWriter, text_writer
from epmq_deploy.runtime.report import EXPERTS
from epmq_deploy.runtime.scoring import Predictions, Scorer, raw_samples
from epmq_deploy.runtime.sessions import Graph
from epmq_deploy.tasks.data import Samples


@dataclass(frozen=True)
class TextScorer(Scorer[TextWriter, WriterFamily]):
    """Lets models write the answers, greedily.

    Attributes:
        max_tokens: longest answer.
        experts: in torch, or None.
    """

    feeds_graphs: ClassVar[bool] = False
    max_tokens: int
    experts: ExpertBackbone | None = None

    def open(self, threads: int | None) -> Mapping[str, TextWriter]:
        """See base."""
        parts: dict[str, dict[str, Graph]] = {}
        for entry in self.entries:
            parts.setdefault(entry["format"], {})[entry["part"]] = self._graph(entry, threads)
        return {
            name: text_writer(self.family, self.folder, graphs, self.max_tokens)
            for name, graphs in parts.items()
        }

    def predict(self, models: Mapping[str, TextWriter], task: str, samples: Samples) -> Predictions:
        """See base; answers as `normalised`."""
        expert = self.experts.become(task) if self.experts else None
        names = [*([EXPERTS] if expert else []), *models]
        written: dict[str, list[str]] = {name: [] for name in names}
        truth: list[str] = []
        for start in range(0, len(samples), self.batch_size):
            pairs = samples.inputs(start, min(start + self.batch_size, len(samples)))
            truth += [pair.answer for pair in pairs]
            texts = [pair.text for pair in pairs]
            prompts = self.family.prompts(self.folder, texts)
            for name, writer in models.items():
                written[name] += self.family.decode(self.folder, writer.write(*prompts))
            if expert is not None:
                found = self.family.write(expert, self.folder, texts, self.max_tokens)
                written[EXPERTS] += found
        answers = {name: np.array(list(map(normalised, found))) for name, found in written.items()}
        return Predictions(np.array(list(map(normalised, truth))), answers)

    def batch(self, samples: Samples, start: int, size: int) -> tuple[Tensor, ...]:
        """See base; with the number of tokens to write, that of the longest wanted answer.

        So that formats are timed on the same work, whatever they would write.
        """
        pairs = raw_samples(samples, start, size)
        tokenizer = self.family.tokenizer(self.folder)
        answers = tokenizer([pair.answer for pair in pairs], add_special_tokens=False)["input_ids"]
        # Each with its end.
        length = torch.tensor(1 + max(map(len, answers)))
        return (*self.family.prompts(self.folder, [pair.text for pair in pairs]), length)


def normalised(text: str) -> str:
    """An answer without what does not count: case, and how words are spaced."""
    return " ".join(text.split()).casefold()
