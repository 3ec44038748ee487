"""Checks every expert against the base before any work, and names all problems at once."""

from collections.abc import Mapping

import torch

from epmq_deploy.checkpoints import Checkpoint
from epmq_deploy.errors import MismatchError


def shared_tensors(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> tuple[str, ...]:
    """Floating-point tensors of the base that the experts hold: what gets merged, base order.

    Integer tensors (position ids and the like) are no weights and stay the base's.
    """
    held = set().union(*(expert.tensors for expert in experts.values()))
    return tuple(
        name for name, info in base.tensors.items() if name in held and info.dtype.is_floating_point
    )


def check_experts(
    base: Checkpoint, experts: Mapping[str, Checkpoint], *, mixed_dtypes: bool = False
) -> tuple[str, ...]:
    """Check keys, shapes, dtypes and values.

    Args:
        base: the base model.
        experts: task name to expert, canonical tensor names.
        mixed_dtypes: accept floating-point tensors of another dtype than the base's.

    Returns:
        The names of the tensors to merge.

    Raises:
        MismatchError: with every problem of every expert.
    """
    names = shared_tensors(base, experts)
    problems = []
    if not names:
        problems.append("the experts share no floating-point tensor with the base")
    for task, expert in experts.items():
        problems += [f"expert {task!r}: {text}" for text in _problems(base, expert, names)]
        unmixed = sorted(
            name
            for name in names
            if name in expert.tensors
            and expert.tensors[name].dtype.is_floating_point
            and expert.tensors[name].dtype != base.tensors[name].dtype
        )
        if unmixed and not mixed_dtypes:
            first = unmixed[0]
            problems.append(
                f"expert {task!r}: {_listed(unmixed)} stored as {expert.tensors[first].dtype}, the "
                f"base as {base.tensors[first].dtype}; convert one of them or set "
                "merge.mixed_dtypes: true (--mixed-dtypes)"
            )
    for label, checkpoint in {
        "base": base,
        **{f"expert {k!r}": v for k, v in experts.items()},
    }.items():
        bad = [
            name for name in names if name in checkpoint.tensors and not _finite(checkpoint, name)
        ]
        if bad:
            problems.append(f"{label}: NaN or infinite values in {_listed(bad)}")
    if problems:
        raise MismatchError(f"the experts do not fit the base {base.folder}", problems)
    return names


def _problems(base: Checkpoint, expert: Checkpoint, names: tuple[str, ...]) -> list[str]:
    problems = []
    missing = [name for name in names if name not in expert.tensors]
    extra = [
        name
        for name, info in expert.tensors.items()
        if name not in base.tensors and info.dtype.is_floating_point
    ]
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


def _listed(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more tensor(s)" if rest > 0 else "")


def _finite(checkpoint: Checkpoint, name: str) -> bool:
    if not checkpoint.tensors[name].dtype.is_floating_point:
        return True
    return bool(torch.isfinite(checkpoint.load(name)).all())
