"""Checking every expert against the base; one error names all problems."""

import logging
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.files import usable_settings
from epmq_deploy.checkpoints.tensors import StoredTensor, TensorInfo
from epmq_deploy.checkpoints.weight_scan import READERS, is_finite
from epmq_deploy.errors import EpmqError, MismatchError, joined
from epmq_deploy.merging.origins import warn_about_origins
from epmq_deploy.models.experts import BASE, Sources
from epmq_deploy.models.input_settings import input_differences
from epmq_deploy.recipe import Task

log = logging.getLogger(__name__)


def check_experts(
    sources: Sources, *, mixed_dtypes: bool = False, missing_experts: bool = False
) -> tuple[str, ...]:
    """Check architecture, keys, shapes, dtypes and values.

    Args:
        sources: base and experts.
        mixed_dtypes: accept floating-point tensors of another dtype than the base's.
        missing_experts: see ``ExpertCheck``.

    Returns:
        The names of the tensors to merge; see ``ExpertCheck``.

    Raises:
        MismatchError: with every problem of every expert.
    """
    with ExpertCheck(sources, mixed_dtypes=mixed_dtypes, missing_experts=missing_experts) as check:
        check.check_remaining()
    warn_about_origins(sources, check.names)
    warn_about_unmerged_changes(sources)
    return check.names


class ExpertCheck:
    """Checks base and experts: their layout at once, their values while they are used.

    Checking values means reading all weights, which merging does anyway; a tensor that is merged
    right after it was checked comes from the page cache, and every file is read from disk once. A
    merge therefore calls, within ``with``:

    1. ``check_layout``, before any weight is read;
    2. ``check_tensor`` before reading a tensor (``CheckpointTaskVectors`` does that);
    3. ``check_remaining``, before a result that rests on unchecked values is used or kept.

    Whatever is wrong first, the error names all problems of all experts.

    Args:
        sources: base and experts.
        mixed_dtypes: accept floating-point tensors of another dtype than the base's.
        missing_experts: some could not be opened, so that problems of all experts together are not
            reported.

    Attributes:
        names: the tensors to merge: those of the merged part, floating-point and held by an
            expert, in the base's order. Integer tensors (such as position ids) are not weights.
    """

    def __init__(
        self, sources: Sources, *, mixed_dtypes: bool, missing_experts: bool = False
    ) -> None:
        self._sources = sources
        self.names, self._layout = _layout_problems(sources, mixed_dtypes=mixed_dtypes)
        if missing_experts:
            self._layout[BASE] = []
        self._other_errors: tuple[EpmqError, ...] = ()
        self._finite: dict[TensorInfo, bool] = {}
        self._background = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._background.shutdown(cancel_futures=True)

    def check_layout(self, other_errors: Sequence[EpmqError] = ()) -> None:
        """Make sure that everything is right that can be known without reading values.

        Otherwise all values are read, so that the one error names their problems too.

        Args:
            other_errors: what else is wrong with the recipe's inputs.

        Raises:
            MismatchError: with every problem of every expert, and ``other_errors``.
            EpmqError: the only one of ``other_errors``, where nothing else is wrong.
        """
        self._other_errors = tuple(other_errors)
        if other_errors or any(self._layout.values()):
            self.check_remaining()

    def check_tensor(self, checkpoint: Checkpoint, name: str) -> None:
        """Check the values of one tensor.

        Raises:
            MismatchError: with every problem of every expert, where it has one.
        """
        if not self._is_finite(checkpoint.tensors[name]):
            self.check_remaining()

    def check_soon(self, checkpoint: Checkpoint) -> None:
        """Begin in the background to check all values of a checkpoint."""
        self._background.submit(self._value_problems, checkpoint)

    def check_remaining(self) -> None:
        """Check all values that have not been checked yet.

        Raises:
            MismatchError: with every problem of every expert.
            EpmqError: see ``check_layout``.
        """
        sources, problems = self._sources, list(self._layout[BASE])
        with ThreadPoolExecutor(READERS) as threads:
            of_base, *of_experts = threads.map(
                self._value_problems, (sources.base, *sources.experts.values())
            )
        for task, of_values in zip(sources.experts, of_experts, strict=True):
            problems += [f"expert {task!r}: {text}" for text in self._layout[task] + of_values]
        problems += [f"base: {text}" for text in of_base]
        errors = list(self._other_errors)
        if problems:
            subject = f"the experts do not fit the base {sources.base.folder}"
            errors.append(MismatchError(subject, problems))
        if errors:
            raise joined("the recipe's inputs", errors)

    def _value_problems(self, checkpoint: Checkpoint) -> list[str]:
        # Tensors that are not merged are copied from the base, so experts' are not read.
        names = checkpoint.tensors if checkpoint is self._sources.base else self.names
        held = [name for name in names if name in checkpoint.tensors]
        bad = [name for name in held if not self._is_finite(checkpoint.tensors[name])]
        merged = [name for name in bad if self._sources.family.is_merged(name)]
        copied = [name for name in bad if not self._sources.family.is_merged(name)]
        problems = [f"NaN or infinite values in {_listed(merged)}"] if merged else []
        if copied:
            problems.append(
                f"NaN or infinite values in {_listed(copied)}, which merging copies unchanged"
            )
        return problems

    def _is_finite(self, tensor: TensorInfo) -> bool:
        if isinstance(tensor, StoredTensor):
            return is_finite(tensor)
        if tensor not in self._finite:
            self._finite[tensor] = _all_finite(tensor)
        return self._finite[tensor]


def _layout_problems(
    sources: Sources, *, mixed_dtypes: bool
) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """Return the tensors to merge; also problems of all experts (key ``BASE``) and of each."""
    base, experts, family = sources.base, sources.experts, sources.family
    held = set().union(*(expert.tensors for expert in experts.values()))
    names = tuple(
        name
        for name, info in base.tensors.items()
        if name in held and family.is_merged(name) and info.dtype.is_floating_point
    )
    problems = {BASE: _common_problems(sources, names, held)}
    for task, expert in experts.items():
        if other := _other_vocabulary(sources, expert, names):
            # What follows from it would only be repeated tensor by tensor.
            problems[task] = [other]
            continue
        with usable_settings(expert.folder):
            problems[task] = family.config_problems(
                base.source.config or {}, expert.source.config or {}
            )
        problems[task] += _tensor_problems(sources, expert, names)
        if not mixed_dtypes:
            problems[task] += _dtype_problems(base, expert, names)
    return names, problems


def _common_problems(sources: Sources, names: Sequence[str], held: Collection[str]) -> list[str]:
    """Return what all experts lack, given the tensors to merge and those that experts hold."""
    family = sources.family
    if problems := family.part_problems(held):
        return problems
    if not names:
        return ["the experts share no floating-point tensor with the base"]
    absent = [
        name
        for name, info in sources.base.tensors.items()
        if name not in held
        and family.is_merged(name)
        and not family.is_optional(name)
        and info.dtype.is_floating_point
    ]
    return [f"no expert has {_listed(absent)}, which the base has"] if absent else []


def _other_vocabulary(sources: Sources, expert: Checkpoint, names: Sequence[str]) -> str:
    """Return one sentence where an expert has a row for other numbers of tokens than the base."""
    vocabulary = (sources.base.source.config or {}).get("vocab_size")
    shapes = [
        (sources.base.tensors[name].shape, expert.tensors[name].shape)
        for name in names
        if name in expert.tensors
    ]
    sizes = {
        tuned[0]
        for original, tuned in shapes
        if original != tuned and original[:1] == (vocabulary,) and original[1:] == tuned[1:]
    }
    if len(sizes) != 1:
        return ""
    (size,) = sizes
    return (
        f"its vocabulary has {size} tokens, the base's has {vocabulary}, and only models with the "
        "same tokens can be merged: resize its embeddings to the base's "
        f"(resize_token_embeddings({vocabulary})) where it needs no others, or fine-tune it from "
        "a base with the added tokens"
    )


def _tensor_problems(sources: Sources, expert: Checkpoint, names: Sequence[str]) -> list[str]:
    base, family = sources.base, sources.family
    missing = [
        name for name in names if name not in expert.tensors and not family.is_optional(name)
    ]
    extra = [
        name
        for name, info in expert.tensors.items()
        if name not in base.tensors and family.is_merged(name) and info.dtype.is_floating_point
    ]
    problems = []
    if missing:
        problems.append(f"lacks {_listed(missing)}, which other experts have")
    if extra:
        problems.append(f"has {_listed(extra)}, which the base lacks")
    for name in names:
        if name not in expert.tensors:
            continue
        original, tuned = base.tensors[name], expert.tensors[name]
        if original.shape != tuned.shape:
            problems.append(
                f"{name} has shape {list(tuned.shape)}, the base has {list(original.shape)}"
            )
        if not tuned.dtype.is_floating_point:
            problems.append(f"{name} is stored as {tuned.dtype}, the base has {original.dtype}")
    return problems


def _dtype_problems(base: Checkpoint, expert: Checkpoint, names: Sequence[str]) -> list[str]:
    different = [
        name
        for name in names
        if name in expert.tensors
        and expert.tensors[name].dtype.is_floating_point
        and expert.tensors[name].dtype != base.tensors[name].dtype
    ]
    if not different:
        return []
    expert_dtype, base_dtype = (held.tensors[different[0]].dtype for held in (expert, base))
    return [
        f"{_listed(different)} stored as {expert_dtype}, the base as {base_dtype}; convert one of "
        "them or set merge.mixed_dtypes: true"
    ]


def other_inputs(sources: Sources, tasks: Mapping[str, Task]) -> dict[str, tuple[str, ...]]:
    """Return how experts' own tokenizers or processors make other inputs than the base's, and log.

    Args:
        sources: base and experts.
        tasks: the recipe's, which say whose are used.

    Returns:
        By task, one phrase for each difference; only tasks with any.
    """
    base, family = sources.base.folder, sources.family
    kind = "tokenizer" if family.modality == "text" else "image processor"
    differences = {}
    for task, expert in sources.experts.items():
        phrases = input_differences(family, base, expert.folder)
        if not phrases:
            continue
        differences[task] = tuple(phrases)
        listed = ", ".join(phrases)
        if tasks[task].inputs_from == "expert":
            log.info("task %r: inputs are made with its expert's %s: %s", task, kind, listed)
            continue
        log.warning(
            "expert %r was fine-tuned with another %s: %s; the base's is used for this task, so "
            "its accuracy can be lower than it was; set tasks.%s.inputs_from: expert, or, if all "
            "experts share the other one, put its files into the base's folder",
            task,
            kind,
            listed,
            task,
        )
    return differences


def warn_about_unmerged_changes(sources: Sources) -> None:
    """Warn about expert weights that differ from the base but are not merged."""
    for task, expert in sources.experts.items():
        changed = [
            name
            for name in expert.tensors
            if name in sources.base.tensors
            and not sources.family.is_merged(name)
            and not sources.family.is_head(name)
            and not torch.equal(expert.load(name), sources.base.load(name))
        ]
        if changed:
            log.warning(
                "expert %r differs from the base in %s, which is not merged: the base's is used",
                task,
                _listed(changed),
            )


def _listed(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more tensor(s)" if rest > 0 else "")


def _all_finite(tensor: TensorInfo) -> bool:
    return not tensor.dtype.is_floating_point or bool(torch.isfinite(tensor.load()).all())
