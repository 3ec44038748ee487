"""How images become pixel values."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from epmq_deploy.checkpoints.files import (
    IMAGE_SECTION,
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    usable_settings,
)
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.compat import runs_on_pillow
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.images import to_rgb
from epmq_deploy.models.inputs import ModelInputs


class ImageInputs(ModelInputs):
    """Images, at the size the base's preprocessor settings give."""

    modality = "image"
    input_names = ("pixel_values",)

    def collate(self, folder: Path, samples: Sequence[Any]) -> tuple[Tensor, ...]:
        """Turn images of any mode into ``pixel_values [B, 3, H, W]``.

        Raises:
            RecipeError: see ``image_processor``.
            ValueError: see ``to_rgb``.
        """
        return (pixel_values(image_processor(folder), samples),)

    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Return random pixels of the size that images have after preprocessing."""
        return (example_pixels(folder, batch),)


def pixel_values(processor: Any, samples: Sequence[Any]) -> Tensor:
    """Return ``[B, 3, H, W]``, float32, of Pillow's images of any mode."""
    images = [to_rgb(sample).image for sample in samples]
    pixels: Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
    return pixels


def example_pixels(folder: Path, batch: int) -> Tensor:
    """Return random ``[batch, 3, H, W]`` of the size to which the folder's preprocessor resizes.

    Raises:
        RecipeError: it does not resize all images to one size; see also ``image_processor``.
    """
    # The preprocessor decides, not config.json: some models take other sizes than that names.
    shapes = {
        tuple(pixel_values(image_processor(folder), [Image.new("RGB", size)]).shape[1:])
        for size in ((64, 96), (96, 64))
    }
    if len(shapes) != 1:
        raise RecipeError(
            f"{folder}: its preprocessor settings do not make all images one size; set size to "
            "height and width, or crop"
        )
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *shapes.pop(), generator=generator)


@lru_cache(maxsize=4)
def image_processor(folder: Path) -> Any:
    """Return the folder's image processor, on Pillow: the same pixels on every machine.

    Raises:
        RecipeError: there are no settings for one, or none that runs on Pillow.
    """
    from transformers import AutoImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    file = folder / PREPROCESSOR_FILE
    model_folder = ModelFolder.at(folder)
    settings = model_folder.preprocessor_config
    if settings is None:
        raise RecipeError(
            f"{file} is missing, and there is no {PROCESSOR_FILE} with {IMAGE_SECTION}; one of "
            "them has to say how images become pixel_values"
        )
    with usable_settings(folder, file.name):
        if model_folder.layout.translates_settings:
            return CLIPImageProcessorPil.from_dict(settings)
        processor = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
        if not runs_on_pillow(processor):
            raise RecipeError(f"{file}: {type(processor).__name__} does not run on Pillow")
        _try(processor, file)
    return processor


def _try(processor: Any, file: Path) -> None:
    """Make sure that a processor makes numbers of an image.

    Raises:
        RecipeError: it does not; or anything else.
    """
    pixels = pixel_values(processor, [Image.new("RGB", (64, 96))])
    if pixels.dim() != 4 or not pixels.is_floating_point() or not bool(pixels.isfinite().all()):
        raise RecipeError(f"{file}: its settings do not turn an image into finite pixel values")
