"""Private or unstable interfaces of other libraries, one function each.

Everything the project uses that another library does not promise to keep is reached through this
file, so that an upgrade that breaks something breaks it here. Libraries are imported inside the
functions: importing this file loads none of them.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

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


def model_type_of_class(name: str) -> str | None:
    """Return the model type of a model class of ``transformers``, by its name; None for others.

    That classes carry their config's class is not documented; checked with transformers 5.23.
    """
    import transformers

    config_class = getattr(getattr(transformers, name, None), "config_class", None)
    model_type = getattr(config_class, "model_type", None)
    return model_type if isinstance(model_type, str) and model_type else None


def weight_steps(model: Any) -> tuple[Any, ...] | None:
    """Return ``transformers``' steps from names in files to those of the loaded model.

    Steps rename tensors, or cut one into equal parts along its first dimension. None where files
    and model differ in another way. Not documented; checked with transformers 5.23.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not all(map(_is_simple, get_model_conversion_mapping(model, add_legacy=False))):
        return None
    return tuple(filter(_is_simple, get_model_conversion_mapping(model)))


def _is_simple(step: Any) -> bool:
    from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

    if not isinstance(step, WeightConverter):
        return isinstance(step, WeightRenaming)
    (operation, *others) = step.operations
    equal_parts = isinstance(operation, Chunk) and operation.num_shards_attribute is None
    return equal_parts and operation.dim == 0 and not others and len(step.source_patterns) == 1


def renamed(name: str, steps: tuple[Any, ...]) -> str | tuple[str, ...]:
    """Return the loaded model's name for a stored tensor, several for its parts.

    Args:
        name: in a file.
        steps: as ``weight_steps`` returns them.
    """
    from transformers.core_model_loading import WeightConverter, apply_renamings

    converters = [step for step in steps if isinstance(step, WeightConverter)]
    key = str(apply_renamings(name, [step for step in steps if step not in converters]))
    for converter in converters:
        first, pattern = converter.rename_source_key(key)
        if pattern is not None:
            targets = converter.target_patterns
            return tuple(first.replace(targets[0], target, 1) for target in targets)
    return key


def transposed_layers(model: "Module") -> dict[str, Any]:
    """Return the layers, by dotted name, that hold the transpose of a linear layer's weight.

    Where ``transformers`` keeps their class is not documented; checked with transformers 5.23.
    """
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}


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
