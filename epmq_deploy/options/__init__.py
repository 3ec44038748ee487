"""Option models: frozen, typed once; recipe keys, flags, keywords and docs come from them."""

from epmq_deploy.options.base import (
    Options,
    given_for,
    in_bytes,
    shared_fields,
    union_by_method,
    without_effect,
)
from epmq_deploy.options.text import (
    SEVERAL,
    layers_from_text,
    numbers_from_text,
    split_entries,
    texts_read_by,
)

__all__ = [
    "SEVERAL",
    "Options",
    "given_for",
    "in_bytes",
    "layers_from_text",
    "numbers_from_text",
    "shared_fields",
    "split_entries",
    "texts_read_by",
    "union_by_method",
    "without_effect",
]
