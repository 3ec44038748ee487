"""Private or unstable interfaces of other libraries, one function each.

Everything the project uses that another library does not promise to keep is reached through this
file, so that an upgrade that breaks something breaks it here. Libraries are imported inside the
functions: importing this file loads none of them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

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
