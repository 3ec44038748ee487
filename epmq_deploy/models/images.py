"""Images of every mode and bit depth as the RGB that image processors expect.

The one place where images are opened and converted: for calibration, evaluation and applications.
Values that fit 8 bits and have no transparency are converted as Pillow does, which is what image
processors do; ICC profiles are not applied, as processors do not either.
"""

import io
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels: TypeAlias = npt.NDArray[np.generic]

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_BYTE, _WORD = 255, 65535
# What is assumed about floats, by their largest value.
FLOATS_TO_1 = "floats are read as black to white from 0 to 1"
FLOATS_TO_255 = "floats are read as black to white from 0 to 255"
# Formats whose values Pillow scales to 16 bits, whatever their mode is called.
_SCALED_TO_16_BITS = frozenset(("PNG", "PPM"))
# Pictures of one shot in several sizes; the first one is the picture.
_ONE_PICTURE = frozenset(("MPO",))


class RgbImage(NamedTuple):
    """An image as models read it.

    Attributes:
        image: mode RGB, the right way up.
        assumption: what was assumed about values that no standard defines; None where nothing was.
    """

    image: Image.Image
    assumption: str | None


def read_rgb(source: str | Path | bytes) -> RgbImage:
    """Open and convert an image; see ``to_rgb``.

    Args:
        source: a file, or the content of one.

    Raises:
        ValueError: it is no image, is damaged, has more pixels than Pillow opens, or see
            ``to_rgb``; does not name the file.
        OSError: it cannot be read.
    """
    if (len(source) if isinstance(source, bytes) else Path(source).stat().st_size) == 0:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            several = getattr(opened, "is_animated", False) and opened.format not in _ONE_PICTURE
            image, assumption = to_rgb(opened)
            frames = "the first of several frames or pages is read" if several else None
            return RgbImage(image, "; ".join(filter(None, (frames, assumption))) or None)
    except UnidentifiedImageError as error:
        raise ValueError("not an image that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error}; make it smaller") from error
    except (ValueError, OSError):
        raise
    except Exception as error:  # what else Pillow's decoders raise for damage
        raise ValueError(str(error) or type(error).__name__) from error


def to_rgb(image: Image.Image) -> RgbImage:
    """Convert an image of any mode to RGB, 8 bits, the way up its camera says.

    - Of several frames or pages the current one counts, which is the first after opening.
    - 16 bits are scaled to 8 by their full range, which may be 12 bits in a TIFF.
    - Floats are black to white from 0 to 1; where any exceeds 1, from 0 to 255.
    - 32-bit integers are 8-bit values where they fit; others have no known range.
    - Transparent pixels are laid on white, or on black where all that is visible is white.

    Raises:
        ValueError: the mode's values have no known range, or only hidden pixels differ.
        ValueError, OSError: its content is damaged.
    """
    try:
        image.load()
    except (ValueError, OSError):
        raise
    except Exception as error:  # what else Pillow's decoders raise for damage
        raise ValueError(str(error) or type(error).__name__) from error
    upright, damage = image, None
    try:
        if image.getexif().get(_ORIENTATION, 1) != 1:
            upright = ImageOps.exif_transpose(image)
    except Exception:  # Pillow's reader of EXIF raises anything
        damage = "EXIF data are damaged, so the image is not turned"
    converted, assumption = _converted(upright, image)
    return RgbImage(converted, "; ".join(filter(None, (damage, assumption))) or None)


def _converted(image: Image.Image, opened: Image.Image) -> tuple[Image.Image, str | None]:
    """Return an upright image as RGB; ``opened`` is the same with its format and tags."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image, None
    if image.mode.startswith("I;16"):
        return _of_words(np.asarray(image), image, opened), None
    if image.mode == "I":
        if opened.format in _SCALED_TO_16_BITS:
            return _of_words(np.asarray(image), image, opened), None
        return _of_integers(np.asarray(image))
    if image.mode == "F":
        return _of_floats(np.asarray(image), opened)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        return _without_transparency(image.convert("RGBA"))
    return image.convert("RGB"), None


def _of_words(values: Pixels, image: Image.Image, opened: Image.Image) -> Image.Image:
    """Return 16-bit gray values ``[H, W]``, or those of fewer bits in 16, as RGB."""
    words = values.astype(np.int64)
    bits = _tag(opened, _BITS_PER_SAMPLE, 16)
    white = _WORD if bits > 16 else 2**bits - 1
    gray = _inverted((words * _BYTE + white // 2) // white, opened)
    key = image.info.get("transparency")
    converted = _gray(gray)
    if isinstance(key, int):  # of a PNG: this value is transparent
        alpha = Image.fromarray(np.where(words == key, 0, _BYTE).astype(np.uint8))
        converted.putalpha(alpha)
        return _without_transparency(converted)[0]
    return converted


def _of_integers(values: Pixels) -> tuple[Image.Image, str | None]:
    integers = values.astype(np.int64)
    low, high = int(integers.min()), int(integers.max())
    if low < 0 or high > _BYTE:
        raise ValueError(
            f"mode I has 32-bit integers, here from {low} to {high}, and nothing says what is "
            "white; save it with 8 or 16 bits"
        )
    return _gray(integers), "32-bit integers from 0 to 255 are read as 8-bit values"


def _of_floats(values: Pixels, opened: Image.Image) -> tuple[Image.Image, str | None]:
    floats = values.astype(np.float64)
    if not np.isfinite(floats).all():
        raise ValueError("mode F has floats, here NaN or infinite ones; save it with 8 or 16 bits")
    low, high = float(floats.min()), float(floats.max())
    if low < 0 or high > _BYTE:
        raise ValueError(
            f"mode F has floats, here from {low:g} to {high:g}; they are read from 0 to 1 or from "
            "0 to 255: scale them, or save it with 8 or 16 bits"
        )
    scale = _BYTE if high <= 1 else 1
    gray = _gray(_inverted(np.rint(floats * scale), opened))
    if high == 0:  # black either way
        return gray, None
    return gray, FLOATS_TO_1 if high <= 1 else FLOATS_TO_255


def _without_transparency(image: Image.Image) -> tuple[Image.Image, str | None]:
    """Return RGBA on white, or on black where nothing would be seen on white.

    Raises:
        ValueError: all is transparent, but hidden colours differ.
    """
    pixels = np.asarray(image)
    colours, alpha = pixels[..., :3], pixels[..., 3]
    if alpha.min() == _BYTE:
        return image.convert("RGB"), None
    if alpha.max() == 0 and (colours != colours[0, 0]).any():
        raise ValueError(
            f"mode {image.mode} is transparent everywhere, though its colours differ; save it "
            "without transparency"
        )
    on_white = _laid_on(image, "white")
    if alpha.max() > 0 and np.asarray(on_white).min() == _BYTE:
        return _laid_on(image, "black"), "white on transparent is laid on black"
    return on_white, "transparent pixels are laid on white"


def _laid_on(image: Image.Image, colour: str) -> Image.Image:
    background = Image.new("RGBA", image.size, colour)
    return Image.alpha_composite(background, image).convert("RGB")


def _inverted(gray: Pixels, opened: Image.Image) -> Pixels:
    """Return gray values, inverted where 0 is white in a TIFF; Pillow inverts those of 8 bits."""
    white_is_zero = _tag(opened, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO
    return _BYTE - gray.astype(np.int64) if white_is_zero else gray


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """Return the value of a TIFF's tag."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _gray(values: Pixels) -> Image.Image:
    """Return gray values ``[H, W]`` from 0 to 255 as RGB."""
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")
