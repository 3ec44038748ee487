"""Scoring models that write texts: an answer is right when it is the wanted one, word by word."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from epmq_deploy.device import DeviceName
from epmq_deploy.experts import ExpertBackbone
from epmq_deploy.models.writer import WriterFamily
from epmq_deploy.runtime.generation import TextWriter, text_writer
from epmq_deploy.runtime.report import EXPERTS
from epmq_deploy.runtime.sessions import Graph
from epmq_deploy.tasks.data import Samples


@dataclass(frozen=True)
class TextScorer:
    """Lets all models answer a task's samples.

    Attributes:
        family: of the model.
        folder: of the export, for the tokenizer.
        batch_size: samples per run.
        max_tokens: longest answer.
        writers: by model name.
        experts: in torch, or None.
    """

    family: WriterFamily
    folder: Path
    batch_size: int
    max_tokens: int
    writers: Mapping[str, TextWriter]
    experts: ExpertBackbone | None = None

    def answers(self, task: str, samples: Samples) -> tuple[list[str], dict[str, list[str]]]:
        """The wanted answers, and what every model writes, by its name; all as `normalised`."""
        expert = self.experts.become(task) if self.experts else None
        names = [*([EXPERTS] if expert else []), *self.writers]
        written: dict[str, list[str]] = {name: [] for name in names}
        truth: list[str] = []
        for start in range(0, len(samples), self.batch_size):
            pairs = samples.inputs(start, min(start + self.batch_size, len(samples)))
            truth += [normalised(pair.answer) for pair in pairs]
            texts = [pair.text for pair in pairs]
            prompts = self.family.prompts(self.folder, texts)
            for name, writer in self.writers.items():
                found = self.family.decode(self.folder, writer.write(*prompts))
                written[name] += [normalised(text) for text in found]
            if expert is not None:
                found = self.family.write(expert, self.folder, texts, self.max_tokens)
                written[EXPERTS] += [normalised(text) for text in found]
        return truth, written

    def accuracies(self, task: str, samples: Samples) -> dict[str, float]:
        """Percent of answers that are the wanted ones, by model name."""
        truth, written = self.answers(task, samples)
        return {
            name: 100.0 * sum(map(str.__eq__, texts, truth)) / len(truth)
            for name, texts in written.items()
        }

    def batches(self, samples: Samples, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Token ids and mask of texts to answer."""
        for start in range(0, len(samples), size):
            pairs = samples.inputs(start, min(start + size, len(samples)))
            yield self.family.prompts(self.folder, [pair.text for pair in pairs])


def normalised(text: str) -> str:
    """An answer without what does not count: case, and how words are spaced."""
    return " ".join(text.split()).casefold()


def open_writers(
    family: WriterFamily,
    exported: Path,
    entries: Sequence[Mapping[str, Any]],
    max_tokens: int,
    *,
    provider: DeviceName = "auto",
    threads: int | None = None,
) -> dict[str, TextWriter]:
    """What writes with each format of an export.

    Args:
        family: of the model.
        exported: folder of the export.
        entries: what its manifest says of each graph.
        max_tokens: longest answer.
        provider: see `Graph`.
        threads: see `Graph`.
    """
    parts: dict[str, dict[str, Graph]] = {}
    for entry in entries:
        parts.setdefault(entry["format"], {})[entry["part"]] = Graph(
            exported / entry["file"],
            provider=provider,
            threads=threads,
            session_config=entry["session_config"],
        )
    return {
        name: text_writer(family, exported, graphs, max_tokens) for name, graphs in parts.items()
    }
