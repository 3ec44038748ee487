"""Private or unstable interfaces of other libraries, one function each.

Everything the project uses that another library does not promise to keep is reached through this
file, so that an upgrade that breaks something breaks it here. Libraries are imported inside the
functions: importing this file loads none of them.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def map_instances(kind: type[T], function: Callable[[T], Any], tree: Any) -> Any:
    """Return a copy of nested containers in which a function was applied to instances of a type.

    Containers are those that torch knows, registered ones such as ``transformers``' outputs too.
    ``torch.utils._pytree`` is private, and there is no public equivalent; checked with torch 2.13.

    Args:
        kind: type of the leaves to map; other leaves stay as they are.
        function: applied to each of them.
        tree: nested tuples, lists, dicts and registered containers.
    """
    from torch.utils._pytree import tree_map_only

    return tree_map_only(kind, function, tree)


def has_bfloat16_units() -> bool:
    """Return whether this processor multiplies bfloat16 matrices faster than float32 ones.

    ``torch.cpu`` has no public query for instruction sets; checked with torch 2.13.
    """
    import torch

    avx512, amx = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    return bool(avx512 or amx)


def tensor_version(tensor: "Tensor") -> int:
    """Return how often a tensor was changed in place.

    ``Tensor._version`` is what autograd goes by; checked with torch 2.13.
    """
    return int(tensor._version)


def classifier_modalities(model_type: object) -> set[str]:
    """Return what ``transformers``' classifiers of a model type read: ``text``, ``image``.

    Empty where there is no plain ``AutoModel`` of that type. The tables are not documented; checked
    with transformers 5.23.
    """
    from transformers.models.auto import modeling_auto as auto

    if model_type not in auto.MODEL_MAPPING_NAMES:
        return set()
    tables = {
        "text": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    return {modality for modality, names in tables.items() if model_type in names}


def weight_renamings(model: Any) -> tuple[Any, ...] | None:
    """Return ``transformers``' steps from names in files to those of the loaded model.

    None where its files store several of its tensors as one. Not documented; checked with
    transformers 5.23.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    current = get_model_conversion_mapping(model, add_legacy=False)
    if not all(isinstance(step, WeightRenaming) for step in current):
        return None
    steps = get_model_conversion_mapping(model)
    return tuple(step for step in steps if isinstance(step, WeightRenaming))


def renamed(name: str, renamings: tuple[Any, ...]) -> str:
    """Return the loaded model's name for a stored tensor; see ``weight_renamings``."""
    from transformers.core_model_loading import apply_renamings

    return str(apply_renamings(name, list(renamings)))


def runs_on_pillow(processor: Any) -> bool:
    """Return whether an image processor of ``transformers`` computes with Pillow.

    The backends' module is not documented; checked with transformers 5.23.
    """
    from transformers.image_processing_backends import PilBackend

    return isinstance(processor, PilBackend)


def adapter_prefix(kind: str) -> str:
    """Return what names of an adapter's tensors begin with, for a ``peft_type`` of ``peft``.

    ``prefix`` of its tuners is not documented; checked with peft 0.21.
    """
    from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType

    return str(PEFT_TYPE_TO_TUNER_MAPPING[PeftType(kind)].prefix)


def matching_patterns(patterns: Mapping[str, Any], module: str) -> dict[str, Any]:
    """Return the one of an adapter's patterns of module names, if any, that ``peft`` goes by.

    ``get_pattern_key`` is not documented; checked with peft 0.21.

    Args:
        patterns: values by regular expression, as ``rank_pattern``.
        module: its dotted name.
    """
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(patterns.keys(), module)
    return {key: patterns[key]} if key in patterns else {}
