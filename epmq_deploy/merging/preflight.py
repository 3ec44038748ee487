"""Checks every expert against the base before any work, and names all problems at once."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch

from epmq_deploy.checkpoints import Checkpoint, model_config
from epmq_deploy.errors import MismatchError
from epmq_deploy.experts import Sources
from epmq_deploy.scan import scan
from epmq_deploy.tensors import StoredTensor

log = logging.getLogger(__name__)

# No task's name: those have no space.
_BASE = "the base"
# Each hashes and checks one file; more of them read no faster.
_THREADS = 4


def check_experts(sources: Sources, *, mixed_dtypes: bool = False) -> tuple[str, ...]:
    """Check architecture, keys, shapes, dtypes and values.

    Args:
        sources: base and experts.
        mixed_dtypes: accept floating-point tensors of another dtype than the base's.

    Returns:
        The names of the tensors to merge; see ``ExpertCheck``.

    Raises:
        MismatchError: with every problem of every expert.
    """
    with ExpertCheck(sources, mixed_dtypes=mixed_dtypes) as check:
        check.finish()
    return check.names


class ExpertCheck:
    """The check of base and experts: by threads, so that experts can be used one after the other.

    Reading the values takes as long as reading the files. Who works on each expert as soon as it
    is checked finds it in the page cache.

    Args:
        sources: base and experts.
        mixed_dtypes: accept floating-point tensors of another dtype than the base's.

    Attributes:
        names: the tensors to merge: those of the merged part, floating-point and held by an
            expert, in the base's order. Integer tensors (position ids and the like) are no weights.

    Raises:
        MismatchError: with every problem of every expert, where some do not need its values.
    """

    def __init__(self, sources: Sources, *, mixed_dtypes: bool) -> None:
        self._sources = sources
        self.names, self._layout = _layout_problems(sources, mixed_dtypes=mixed_dtypes)
        self._threads = ThreadPoolExecutor(min(torch.get_num_threads(), _THREADS))
        self._values = {
            task: self._threads.submit(_value_problems, checkpoint, self.names)
            for task, checkpoint in {_BASE: sources.base, **sources.experts}.items()
        }

    def __enter__(self) -> Self:
        if any(self._layout.values()):
            with self._threads:
                self.finish()
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def wait_for(self, task: str) -> None:
        """Return when the base and one expert have been checked.

        Raises:
            MismatchError: with every problem of every expert, where these have one.
        """
        if self._values[_BASE].result() or self._values[task].result():
            self.finish()

    def finish(self) -> None:
        """Return when everything has been checked.

        Raises:
            MismatchError: with every problem of every expert.
        """
        problems = list(self._layout[_BASE])
        for task in self._sources.experts:
            found = self._layout[task] + self._values[task].result()
            problems += [f"expert {task!r}: {text}" for text in found]
        problems += [f"base: {text}" for text in self._values[_BASE].result()]
        if problems:
            folder = self._sources.base.folder
            raise MismatchError(f"the experts do not fit the base {folder}", problems)
        _warn_about_what_is_not_merged(self._sources)


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
    general = [] if names else ["the experts share no floating-point tensor with the base"]
    problems = {_BASE: general + family.part_problems(held)}
    for task, expert in experts.items():
        problems[task] = family.config_problems(
            model_config(base.folder) or {}, model_config(expert.folder) or {}
        )
        problems[task] += _tensor_problems(sources, expert, names)
        if not mixed_dtypes:
            problems[task] += _dtype_problems(base, expert, names)
    return names, problems


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
        "merge.mixed_dtypes: true (--mixed-dtypes)"
    ]


def _value_problems(checkpoint: Checkpoint, names: Sequence[str]) -> list[str]:
    bad = [name for name in names if name in checkpoint.tensors and not _finite(checkpoint, name)]
    return [f"NaN or infinite values in {_listed(bad)}"] if bad else []


def _warn_about_what_is_not_merged(sources: Sources) -> None:
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


def _finite(checkpoint: Checkpoint, name: str) -> bool:
    info = checkpoint.tensors[name]
    if isinstance(info, StoredTensor):
        return info.key not in scan(info.file).not_finite
    return not info.dtype.is_floating_point or bool(torch.isfinite(info.load()).all())
