"""Prefixes that other modules around a model leave in the names of its tensors."""

import logging
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache

from epmq_deploy.checkpoints.tensors import Rename

# Around the model: torch's own wrappers, training frameworks, and what people call a model within
# theirs.
_AROUND = {"module", "model", "base_model", "net", "network", "backbone", "auto_model", "0"}
_AROUND |= {"_forward_module"}
# Around any module: compiled, sharded, recomputed.
_INSIDE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

log = logging.getLogger(__name__)


def unwrapped(
    keys: Collection[str], rename: Rename, is_known: Callable[[str], bool], source: object
) -> Rename:
    """Return ``rename`` without the prefix that keeps stored names from being known.

    The prefix is taken off if more names are known without it; that is said in the log.

    Args:
        keys: stored names of all tensors.
        rename: stored name to canonical name or names.
        is_known: whether the model has a tensor of a canonical name.
        source: what to call the model in the log.
    """
    prefixes = {prefix for key in keys for prefix in _prefixes(_without_inner(key))}
    inner = {f"{part}." for key in keys for part in key.split(".") if part in _INSIDE}

    def known(prefix: str) -> int:
        names = (rename(_plain(key, prefix)) for key in keys)
        return sum(is_known(name if isinstance(name, str) else name[0]) for name in names)

    # The shortest of those that make most names known; without one, if none helps.
    prefix = max(["", *sorted(prefixes, key=len)], key=known) if prefixes else ""
    if not (inner or prefix):
        return rename
    _say(source, " and ".join([*sorted(inner), *[prefix] * bool(prefix)]))
    return lambda key: rename(_plain(key, prefix))


def without_wrappers(parts: Iterable[str]) -> list[str]:
    """Return the parts of a name without those that stand for wrappers of any module."""
    return [part for part in parts if part not in _INSIDE]


def _plain(key: str, prefix: str) -> str:
    return _without_inner(key).removeprefix(prefix)


def _without_inner(key: str) -> str:
    return ".".join(without_wrappers(key.split(".")))


def _prefixes(key: str) -> list[str]:
    """Return every prefix of a name that consists of wrappers."""
    prefixes: list[str] = []
    for part in key.split(".")[:-1]:
        if part not in _AROUND:
            break
        prefixes.append(f"{prefixes[-1] if prefixes else ''}{part}.")
    return prefixes


@lru_cache(maxsize=256)
def _say(source: object, removed: str) -> None:
    log.info("%s: names of tensors are read without %s", source, removed)
