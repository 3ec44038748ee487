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
    refuse_repeated,
    split_entries,
    texts_read_by,
)
from epmq_deploy.options.yaml_document import YamlDocument, YamlError, read_yaml

__all__ = [
    "SEVERAL",
    "Options",
    "YamlDocument",
    "YamlError",
    "given_for",
    "in_bytes",
    "layers_from_text",
    "numbers_from_text",
    "read_yaml",
    "refuse_repeated",
    "shared_fields",
    "split_entries",
    "texts_read_by",
    "union_by_method",
    "without_effect",
]
