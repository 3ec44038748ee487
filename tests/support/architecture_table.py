"""The table of architectures in the docs; run this file to print it."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from tiny_architectures import ARCHITECTURES, REFUSED, Architecture
from transformers import AutoConfig, AutoModel

from epmq_deploy.errors import RecipeError
from epmq_deploy.models import MODEL_FAMILIES, family_of

_REFUSAL = "the generic one cannot take it: "
_PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}


def table() -> str:
    """Return a row for every architecture, in the order of their names."""
    architectures = sorted(
        (*ARCHITECTURES.values(), *REFUSED.values()), key=lambda one: one.called.lower()
    )
    rows = [
        f"| {one.called} | `{one.model_type}` | {'text' if one.processor is None else 'image'} | "
        f"{support_of(one)} |"
        for one in architectures
    ]
    head = ["| architecture | `model_type` | reads | support |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def support_of(architecture: Architecture) -> str:
    """Return how an architecture is supported, or why it is not."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder, architecture)
        try:
            family = family_of(folder)
            family.blocks(family.load(folder))
        except RecipeError as error:
            return f"refused: {str(error).partition(_REFUSAL)[2]}"
    registered = family.name in MODEL_FAMILIES and MODEL_FAMILIES[family.name] is family
    return f"first-class, family `{family.name}`" if registered else "generic"


def write_base(folder: Path, architecture: Architecture) -> None:
    """Write a tiny random model without a head, and preprocessor settings."""
    config = AutoConfig.for_model(architecture.model_type, **architecture.settings)
    AutoModel.from_config(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR))


if __name__ == "__main__":
    print(table())
