"""Signs that an expert was made from another base: what it says, and how far away it is."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.files import CONFIG_FILE
from epmq_deploy.checkpoints.hub import hub_id
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.errors import EpmqError
from epmq_deploy.models.experts import Sources

log = logging.getLogger(__name__)

# Matrices that are compared, evenly spaced among those to merge, and the largest of them.
_SAMPLED = 8
_LARGEST = 2**26
# Norm of a task vector relative to that of the weights: fine-tuning leaves it far below, and models
# trained from different starts are at 1.4.
_FAR = 0.7
# Distance that copies in 16 bits keep.
_ROUNDING = 0.02
# Where older versions of transformers kept the name a model was loaded by.
_NAME = "_name_or_path"
_SNAPSHOT = re.compile(r"models--.+--(.+)")
# What is added to a model's name when it is quantized for training adapters.
_QUANTIZED = re.compile(
    r"[-_.](unsloth|bnb|nf4|4bit|8bit|int4|int8|gptq|awq|fp8)\b.*", re.IGNORECASE
)


def warn_about_origins(sources: Sources, names: Sequence[str]) -> None:
    """Warn about experts that seem to come from another base of the same shape.

    Args:
        sources: base and experts; a few of their matrices are read.
        names: of the tensors to merge.
    """
    for task, expert in sources.experts.items():
        if expert.source.layout.is_whole_model:
            _check_distance(sources.base, expert, names, f"expert {task!r}")
        else:
            _check_name(sources, expert.source, names, f"expert {task!r}")


def relative_distance(base: Checkpoint, other: Checkpoint, names: Sequence[str]) -> float | None:
    """Return the norm of the difference of some matrices, relative to that of the base's.

    Args:
        base: its matrices are the unit.
        other: of the same canonical names.
        names: of the tensors to choose from.

    Returns:
        None where there are no matrices to compare, or values that are not finite.
    """
    matrices = [name for name in names if _is_comparable(base, other, name)]
    step = max(1, -(-len(matrices) // _SAMPLED))
    difference = norm = 0.0
    for name in matrices[::step]:
        start = base.load(name).to(torch.float32)
        difference += float((other.load(name).to(torch.float32) - start).square().sum())
        norm += float(start.square().sum())
    ratio = (difference / norm) ** 0.5 if norm > 0 else float("nan")
    return ratio if torch.isfinite(torch.tensor(ratio)) else None


def _is_comparable(base: Checkpoint, other: Checkpoint, name: str) -> bool:
    one, tuned = base.tensors.get(name), other.tensors.get(name)
    if one is None or tuned is None or one.shape != tuned.shape or len(one.shape) < 2:
        return False
    return one.dtype.is_floating_point and one.nbytes // one.dtype.itemsize <= _LARGEST


def _check_distance(base: Checkpoint, expert: Checkpoint, names: Sequence[str], label: str) -> None:
    ratio = relative_distance(base, expert, names)
    if ratio is not None and ratio >= _FAR:
        log.warning(
            "%s: the norm of its task vector is %.2f of that of the weights (in a sample of them), "
            "where fine-tuning leaves it far below %.1f; was it made from another base than %s?",
            label,
            ratio,
            _FAR,
            base.folder,
        )


def _check_name(sources: Sources, adapter: ModelFolder, names: Sequence[str], label: str) -> None:
    """Compare the base that an adapter names with the given one; its factors do not tell."""
    declared, folder = adapter.declared_base, sources.base.folder
    if declared is None:
        return
    local = _local_folder(declared)
    ratio = None if local is None else _distance_of(sources, local, names)
    if ratio is not None:
        if ratio >= _ROUNDING:
            log.warning(
                "%s: its adapter was made for %s, whose weights differ from those of the base %s "
                "by %.2f of their norm",
                label,
                declared,
                folder,
                ratio,
            )
        return
    given = {_short(_hub_name(folder)), _short((sources.base.source.config or {}).get(_NAME))}
    if _short(declared) not in given:
        log.warning(
            "%s: its adapter was made for %s, and the base is %s; unless that is another name of "
            "the same weights, the expert is not what was trained",
            label,
            declared,
            folder,
        )


def _distance_of(sources: Sources, folder: Path, names: Sequence[str]) -> float | None:
    """Return how far a model is from the base; None where they cannot be compared."""
    family = sources.family
    try:
        source = ModelFolder.at(folder)
        other = Checkpoint.open(source, family.canonical_key, family.tied, family.is_known)
    except EpmqError:
        return None
    return relative_distance(sources.base, other, names)


def _local_folder(declared: str) -> Path | None:
    """Return the folder of a model by path or hub id; None where it is not on this machine."""
    if Path(declared).is_absolute():
        return Path(declared) if Path(declared).is_dir() else None
    if hub_id(declared) is None:
        return None
    cached = try_to_load_from_cache(declared, CONFIG_FILE)
    return Path(cached).parent if isinstance(cached, str) else None


def _hub_name(folder: Path) -> str:
    """Return the hub's name of a snapshot's folder; of others their last name."""
    match = _SNAPSHOT.fullmatch(folder.parent.parent.name)
    return match[1] if match else folder.name


def _short(name: object) -> str:
    """Return a model's name without owner, case and additions for quantized copies."""
    last = str(name).replace("\\", "/").rstrip("/").rpartition("/")[2]
    return _QUANTIZED.sub("", last).lower()
