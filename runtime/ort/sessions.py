"""Creating onnxruntime sessions."""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from epmq_deploy.artifacts.manifest import GraphEntry
from epmq_deploy.cpu import usable_cores
from epmq_deploy.errors import NumericsError
from epmq_deploy.runtime.ort.providers import AUTO, RECORD_ASSIGNMENT, check_used, provider_named


class Graph:
    """One exported graph, ready to run.

    Args:
        file: the ONNX file; or a whole model's bytes, which ``name`` then names.
        provider: see `epmq_deploy.runtime.ort.providers.provider_named`.
        threads: intra-op threads; default: see `usable_cores`.
        session_config: session options the graph was exported for.
        name: what messages call it; default: the file.
        tasks: in the order that its input ``task`` numbers them; none where it has no such input.

    Raises:
        RecipeError: the provider that was asked for is not there or not really used.
        NumericsError: onnxruntime cannot load the file.
    """

    def __init__(
        self,
        file: Path | bytes,
        *,
        provider: str = AUTO,
        threads: int | None = None,
        session_config: Mapping[str, str] | None = None,
        name: str = "",
        tasks: Sequence[str] = (),
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        threads = usable_cores() if threads is None else threads
        if threads is not None:
            options.intra_op_num_threads = threads
        # Several sessions live side by side here; idle ones must not keep cores busy.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
        for key, value in (session_config or {}).items():
            options.add_session_config_entry(key, value)
        requested = provider_named(provider)
        named = name or str(file)
        try:
            # It prints when it falls back, which is noticed below; stdout is for results.
            with contextlib.redirect_stdout(io.StringIO()):
                self._session = ort.InferenceSession(file, options, providers=[requested])
        except Exception as error:  # onnxruntime raises many types
            raise NumericsError(f"{named}: onnxruntime cannot load it ({error})") from error
        self.tasks = tuple(tasks)
        self.provider = check_used(self._session, named, requested, strict=provider != AUTO)
        self.input_names = tuple(item.name for item in self._session.get_inputs())
        self.output_names = tuple(item.name for item in self._session.get_outputs())
        # Open axes by their names.
        self.input_shapes = {item.name: tuple(item.shape) for item in self._session.get_inputs()}

    @classmethod
    def exported(
        cls, folder: Path, entry: GraphEntry, *, provider: str, threads: int | None
    ) -> "Graph":
        """Return a graph of an export, with the session options it was exported for.

        Args:
            folder: of the export.
            entry: what its manifest says of the graph.
            provider: see class.
            threads: see class.
        """
        return cls(
            folder / entry.file,
            provider=provider,
            threads=threads,
            session_config=entry.session_options,
            tasks=entry.task_input,
        )

    def run(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[str] | None = None,
        *,
        task: str | None = None,
    ) -> Mapping[str, np.ndarray[Any, Any]]:
        """Run a batch.

        Args:
            inputs: without ``task``.
            outputs: names of the outputs to compute; default: all.
            task: that the samples belong to, where the graph asks; default: its first, which takes
                as long as any.

        Returns:
            Arrays by output name.
        """
        names = list(outputs or self.output_names)
        if self.tasks:
            number = 0 if task is None else self.tasks.index(task)
            inputs = (*inputs, task_numbers(number, len(inputs[0])))
        return dict(zip(names, self._session.run(names, self.feed(inputs)), strict=True))

    def compute(self, feed: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """All outputs by name, from arrays by input name."""
        return dict(zip(self.output_names, self._session.run(None, dict(feed)), strict=True))

    def feed(self, inputs: Sequence[Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        """Arrays by input name, as onnxruntime takes them."""
        return {name: value.numpy() for name, value in zip(self.input_names, inputs, strict=True)}


def task_numbers(number: int, samples: int) -> Tensor:
    """Return the input ``task`` of a batch whose samples belong to one task, int64 ``[batch]``."""
    return torch.full((samples,), number, dtype=torch.int64)


def by_format(entries: Iterable[GraphEntry]) -> dict[str, tuple[GraphEntry, ...]]:
    """Return the graphs of each format, in the order they run."""
    graphs: dict[str, tuple[GraphEntry, ...]] = {}
    for entry in entries:
        graphs[entry.format] = (*graphs.get(entry.format, ()), entry)
    return graphs
