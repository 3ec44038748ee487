"""Checks every expert against the base, and names all problems at once."""

import logging
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.tensors import StoredTensor, TensorInfo
from epmq_deploy.checkpoints.weight_scan import READERS, is_finite
from epmq_deploy.errors import EpmqError, MismatchError, joined
from epmq_deploy.models.experts import BASE, Sources

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
        check.finish()
    warn_about_what_is_not_merged(sources)
    return check.names


class ExpertCheck:
    """The check of base and experts: of their layout at once, of their values as they are used.

    Reading the values takes as long as reading the files. Who works on a tensor as soon as it is
    checked finds it in the page cache.

    Args:
        sources: base and experts.
        mixed_dtypes: accept floating-point tensors of another dtype than the base's.
        missing_experts: some could not be opened, so that nothing is said of all together.

    Attributes:
        names: the tensors to merge: those of the merged part, floating-point and held by an
            expert, in the base's order. Integer tensors (position ids and the like) are no weights.
    """

    def __init__(
        self, sources: Sources, *, mixed_dtypes: bool, missing_experts: bool = False
    ) -> None:
        self._sources = sources
        self.names, self._layout = _layout_problems(sources, mixed_dtypes=mixed_dtypes)
        if missing_experts:
            self._layout[BASE] = []
        self._others: tuple[EpmqError, ...] = ()
        self._finite: dict[TensorInfo, bool] = {}
        self._ahead = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._ahead.shutdown(cancel_futures=True)

    def begin(self, others: Sequence[EpmqError] = ()) -> None:
        """Make sure that nothing is wrong that can be known without reading values.

        Where something is, all values are read, so that one error names what is wrong with them
        too.

        Args:
            others: what else is wrong with the recipe's inputs.

        Raises:
            MismatchError: with every problem of every expert, and ``others``.
            EpmqError: the only one of ``others``, where nothing else is wrong.
        """
        self._others = tuple(others)
        if others or any(self._layout.values()):
            self.finish()

    def tensor(self, checkpoint: Checkpoint, name: str) -> None:
        """Check the values of one tensor.

        Raises:
            MismatchError: with every problem of every expert, where it has one.
        """
        if not self._is_finite(checkpoint.tensors[name]):
            self.finish()

    def ahead(self, checkpoint: Checkpoint) -> None:
        """Begin with a checkpoint that will be used next, as a whole."""
        self._ahead.submit(self._value_problems, checkpoint)

    def finish(self) -> None:
        """Check what is left.

        Raises:
            MismatchError: with every problem of every expert.
            EpmqError: see ``begin``.
        """
        sources, problems = self._sources, list(self._layout[BASE])
        with ThreadPoolExecutor(READERS) as threads:
            of_base, *of_experts = threads.map(
                self._value_problems, (sources.base, *sources.experts.values())
            )
        for task, of_values in zip(sources.experts, of_experts, strict=True):
            problems += [f"expert {task!r}: {text}" for text in self._layout[task] + of_values]
        problems += [f"base: {text}" for text in of_base]
        errors = list(self._others)
        if problems:
            subject = f"the experts do not fit the base {sources.base.folder}"
            errors.append(MismatchError(subject, problems))
        if errors:
            raise joined("the recipe's inputs", errors)

    def _value_problems(self, checkpoint: Checkpoint) -> list[str]:
        # What is not merged is copied from the base.
        names = checkpoint.tensors if checkpoint is self._sources.base else self.names
        held = [name for name in names if name in checkpoint.tensors]
        bad = [name for name in held if not self._is_finite(checkpoint.tensors[name])]
        merged = [name for name in bad if self._sources.family.is_merged(name)]
        copied = [name for name in bad if not self._sources.family.is_merged(name)]
        problems = [f"NaN or infinite values in {_listed(merged)}"] if merged else []
        if copied:
            problems.append(
                f"NaN or infinite values in {_listed(copied)}, which merging copies as it is"
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
    """The tensors to merge, and what is wrong with all experts together and each, unread."""
    base, experts, family = sources.base, sources.experts, sources.family
    held = set().union(*(expert.tensors for expert in experts.values()))
    names = tuple(
        name
        for name, info in base.tensors.items()
        if name in held and family.is_merged(name) and info.dtype.is_floating_point
    )
    problems = {BASE: _common_problems(sources, names, held)}
    for task, expert in experts.items():
        problems[task] = family.config_problems(
            base.source.config or {}, expert.source.config or {}
        )
        problems[task] += _tensor_problems(sources, expert, names)
        if not mixed_dtypes:
            problems[task] += _dtype_problems(base, expert, names)
    return names, problems


def _common_problems(sources: Sources, names: Sequence[str], held: Collection[str]) -> list[str]:
    """What no expert has, given the tensors to merge and those that experts hold."""
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
        ours, theirs = base.tensors[name], expert.tensors[name]
        if ours.shape != theirs.shape:
            problems.append(
                f"{name} has shape {list(theirs.shape)}, the base has {list(ours.shape)}"
            )
        if not theirs.dtype.is_floating_point:
            problems.append(f"{name} is stored as {theirs.dtype}, the base has {ours.dtype}")
    return problems


def _dtype_problems(base: Checkpoint, expert: Checkpoint, names: Sequence[str]) -> list[str]:
    unlike = [
        name
        for name in names
        if name in expert.tensors
        and expert.tensors[name].dtype.is_floating_point
        and expert.tensors[name].dtype != base.tensors[name].dtype
    ]
    if not unlike:
        return []
    theirs, ours = expert.tensors[unlike[0]].dtype, base.tensors[unlike[0]].dtype
    return [
        f"{_listed(unlike)} stored as {theirs}, the base as {ours}; convert one of them or set "
        "merge.mixed_dtypes: true"
    ]


def warn_about_what_is_not_merged(sources: Sources) -> None:
    """Say so when an expert was also trained where merging leaves the base as it is."""
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
