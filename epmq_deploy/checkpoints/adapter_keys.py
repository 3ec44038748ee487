"""What the names of an adapter's tensors mean: which module they change, and how."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from epmq_deploy.checkpoints.tensors import StoredTensor, same_values
from epmq_deploy.checkpoints.wrappers import without_wrappers
from epmq_deploy.errors import MismatchError, RecipeError

# What ``peft`` puts before names of its own tensors and of the model's, and the usual adapter.
ROOT = "base_model."
MODEL_PREFIX = "base_model.model."
DEFAULT_ADAPTER = "default"
_WHOLE_MODULES = "modules_to_save"
# Factors that change rows of an embedding table, within other kinds of adapters too.
TOKENS = "trainable_tokens_"
_TOKEN_WRAPPER = "token_adapter"
_KINDS = ("weight", "bias")
# Parts of the running model's state that say nothing new: modules that were replaced, and a count.
_REPEATED = {"original_module", "ranknum"}


@dataclass
class AdapterTensors:
    """The tensors of one adapter.

    Attributes:
        modules: by dotted name of the module they change, by the key ``peft`` saves them under.
        shared: those that serve all modules, by key.
        whole: those that replace the base's or belong to a head, by the model's name for them.
    """

    modules: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    shared: dict[str, StoredTensor] = field(default_factory=dict)
    whole: dict[str, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Key:
    """One parsed key.

    Attributes:
        module: whose weight is changed; None for shared and whole tensors.
        name: the key without an adapter's name.
        adapter: the adapter's name, where the key has it.
    """

    module: str | None
    name: str
    adapter: str | None


def adapter_tensors(
    stored: Mapping[str, StoredTensor], prefix: str, adapter: str | None, file: str
) -> AdapterTensors:
    """Sort the tensors of a file by what they change.

    Args:
        stored: by key.
        prefix: what names of this kind's factors begin with.
        adapter: which adapter is wanted where keys name several.
        file: named in messages.

    Raises:
        RecipeError: keys name several adapters, and none or another is wanted.
        MismatchError: two keys give one tensor different values; names all.
    """
    names = {DEFAULT_ADAPTER, adapter}
    names |= {_parsed(key, prefix, names).adapter for key in stored}
    keys = [(_parsed(key, prefix, names), info) for key, info in stored.items()]
    chosen = _chosen({key.adapter for key, _ in keys if key.adapter}, adapter, file)
    shared = {key.name.removeprefix(ROOT) for key, _ in keys if not _in_model(key)}
    tensors, problems = AdapterTensors(), []
    for key, info in keys:
        if key.adapter not in (None, chosen):
            continue
        if _in_model(key) and not (shared | _REPEATED).isdisjoint(key.name.split(".")):
            continue
        if key.module is not None:
            group = tensors.modules.setdefault(key.module, {})
        else:
            group = tensors.whole if _in_model(key) else tensors.shared
        name = key.name.removeprefix(MODEL_PREFIX) if key.module is None else key.name
        name = name.replace(".base_layer.", ".")
        other = group.setdefault(name, info)
        # Trained biases are saved a second time where their module is saved whole.
        if other is not info and not same_values(other, info):
            problems.append(f"{other.key} and {info.key} both mean {name}")
    if problems:
        raise MismatchError(f"{file}: keys", problems)
    return tensors


def _in_model(key: _Key) -> bool:
    return key.name.startswith(MODEL_PREFIX)


def _chosen(names: Iterable[str], wanted: str | None, file: str) -> str | None:
    """Return the adapter whose tensors are taken of those that keys name."""
    given = sorted(names)
    if not given:
        if wanted not in (None, DEFAULT_ADAPTER):
            raise RecipeError(
                f"{file}: holds one adapter, without a name; leave out adapter: {wanted}"
            )
        return None
    if wanted is None and len(given) == 1:
        return given[0]
    if wanted not in given:
        asked = "choose one" if wanted is None else f"not {wanted}; choose one of them"
        raise RecipeError(f"{file}: holds the adapters {', '.join(given)}; {asked} with adapter")
    return wanted


def _parsed(stored: str, prefix: str, adapters: Collection[str | None]) -> _Key:
    """Parse a key; ``adapters`` are the names that may follow a module saved whole."""
    parts = [part for part in without_wrappers(stored.split(".")) if part != _TOKEN_WRAPPER]
    if len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    key = ".".join(parts)
    if not key.startswith(ROOT):
        key = MODEL_PREFIX + key
    if not key.startswith(MODEL_PREFIX):
        # Next to the model, such as projections that all modules share.
        name, adapter = _without_adapter(key.split("."), 2)
        return _Key(None, name, adapter)
    parts = key.split(".")
    for index, part in enumerate(parts):
        if part == _WHOLE_MODULES and index > 2:
            return _saved_module(parts, index, adapters)
        if part.startswith((prefix, TOKENS)):
            name, adapter = _without_adapter(parts, index + 1)
            return _Key(".".join(parts[2:index]), name, adapter)
    return _Key(None, key, None)


def _without_adapter(parts: list[str], end: int) -> tuple[str, str | None]:
    """Split the adapter's name off, which stands at ``end`` if it is there."""
    rest = parts[end:]
    if rest and rest[0] not in _KINDS:
        return ".".join(parts[:end] + rest[1:]), rest[0]
    return ".".join(parts), None


def _saved_module(parts: list[str], index: int, adapters: Collection[str | None]) -> _Key:
    """Parse the key of a module that was saved whole."""
    module, rest = parts[:index], parts[index + 1 :]
    named = len(rest) > 1 and rest[0] in adapters
    return _Key(None, ".".join(module + rest[named:]), rest[0] if named else None)
