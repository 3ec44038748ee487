"""Whether an expert was fine-tuned on other inputs than the base's settings make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from epmq_deploy.checkpoints.files import PREPROCESSOR_FILE, PROCESSOR_FILE
from epmq_deploy.errors import EpmqError
from epmq_deploy.models.base import ModelFamily
from epmq_deploy.models.image_inputs import image_processor, pixel_values
from epmq_deploy.models.tokenizer import stored_tokenizer

# Letters of both cases, accents, digits, marks and several scripts: what tokenizers differ in.
_TEXTS = (
    "The QUICK brown fox's 12.5 jumps, over naïve cafés!",
    "  two  spaces\nand a line\tand a tab",
    "Größe 東京 Привет 🙂 don't can't",
)
# Above it, model_max_length means that there is none.
_NO_LENGTH = 10**6
_IMAGE_SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
)


def input_differences(family: ModelFamily, base: Path, expert: Path) -> list[str]:
    """Return one phrase for each way in which an expert's folder makes inputs otherwise.

    What the expert's folder lacks, or what cannot be opened there, is not compared.

    Args:
        family: of both.
        base: folder of the base.
        expert: folder of the expert.
    """
    compare: Callable[[Path, Path], list[str]] = (
        _tokenizer_differences if family.modality == "text" else _processor_differences
    )
    try:
        return compare(base, expert)
    except EpmqError:
        return []


def _tokenizer_differences(base: Path, expert: Path) -> list[str]:
    first, second = stored_tokenizer(base), stored_tokenizer(expert)
    if first is None or second is None:
        return []
    differences = []
    if first.get_vocab() != second.get_vocab():
        differences.append("another vocabulary")
    elif _ids(first) != _ids(second):
        differences.append("texts cut into other tokens")
    lengths = [tokenizer.model_max_length for tokenizer in (second, first)]
    if lengths[0] != lengths[1] and lengths[0] < _NO_LENGTH:
        limit = lengths[1] if lengths[1] < _NO_LENGTH else "none"
        differences.append(f"model_max_length {lengths[0]} (the base's: {limit})")
    return differences


def _ids(tokenizer: Any) -> Any:
    return tokenizer(list(_TEXTS))["input_ids"]


def _processor_differences(base: Path, expert: Path) -> list[str]:
    if not any((expert / name).is_file() for name in (PREPROCESSOR_FILE, PROCESSOR_FILE)):
        return []
    first, second = image_processor(base), image_processor(expert)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (97, 131, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    one, other = pixel_values(first, [image]), pixel_values(second, [image])
    if one.shape == other.shape and torch.allclose(one, other, atol=1e-3):
        return []
    # As JSON has them: lists, not tuples.
    base_settings, settings = (json.loads(each.to_json_string()) for each in (first, second))
    named = [
        f"{key} {settings.get(key)} (the base's: {base_settings.get(key)})"
        for key in _IMAGE_SETTINGS
        if base_settings.get(key) != settings.get(key)
    ]
    return named or ["other pixel values"]
