"""Six tasks on images of 56 pixels: photos, drawings on photos, and printed words.

None is a task of the bundled zoo. Training and test images share no part of a photo, no drawing and
no word.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

SIDE = 56
TRAIN, CALIBRATION, TEST = 1000, 256, 400
_PHOTOS = ["Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow"]
_PHOTOS += ["LadyBird", "RainDrops", "Storm", "TwoWings", "Wood", "YellowFlower"]
_TYPEFACES = ["adventor", "bonum", "chorus", "cursor", "heros", "pagella", "schola", "termes"]
# Of a photo's width, what training images are cut from; test images are cut from the rest.
_TRAIN_SHARE = 0.6
_TEST_DRAWINGS = 0.35
_TURNS = ("upright", "left", "upside down", "right")
_CELLS = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in "123")
_MOST = 6

T = TypeVar("T")
Draw = Callable[[int, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class Images:
    """Images uint8 ``[n, 56, 56, 3]`` and class numbers int64 ``[n]``."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class VisionTask:
    """One task's images, as many of each class as of any other."""

    name: str
    classes: tuple[str, ...]
    train: Images
    calibration: Images
    test: Images


@dataclass(frozen=True)
class Material:
    """What images of one side of the split are made of."""

    photos: list[Image.Image]
    drawings: list[Image.Image]
    words: list[str]
    typefaces: list[list[Path]]


def load_materials(photos: Path, drawings: Path, fonts: Path) -> tuple[Material, Material]:
    """Return what training and test images are made of, from the packages' folders."""
    wide = [_photo(photos / f"usr/share/backgrounds/mate/nature/{name}.jpg") for name in _PHOTOS]
    stamps: tuple[list[Image.Image], list[Image.Image]] = ([], [])
    names: tuple[list[str], list[str]] = ([], [])
    for file in sorted((drawings / "usr/share/tuxpaint/stamps").rglob("*.png")):
        side = _share(file.stem) < _TEST_DRAWINGS
        with Image.open(file) as opened:
            stamp = opened.convert("RGBA")
        stamp.thumbnail((96, 96))
        box = stamp.getchannel("A").getbbox()
        if box is not None and "symbols" not in file.parts:
            stamps[side].append(stamp.crop(box))
        names[side].extend(part for part in file.stem.split("_") if part.isalpha())
    typefaces = [
        sorted(fonts.glob(f"usr/share/texmf/fonts/opentype/public/tex-gyre/*{name}-*.otf"))
        for name in _TYPEFACES
    ]
    sides = []
    for side, (start, stop) in enumerate(((0.0, _TRAIN_SHARE), (_TRAIN_SHARE, 1.0))):
        cut = [
            photo.crop((round(start * photo.width), 0, round(stop * photo.width), photo.height))
            for photo in wide
        ]
        words = sorted(set(names[side]) - set(names[1 - side] if side else ()))
        sides.append(Material(cut, stamps[side], words, typefaces))
    return sides[0], sides[1]


def make_tasks(train: Material, test: Material) -> list[VisionTask]:
    """Draw all tasks' images; the same for the same materials."""
    tasks = []
    for number, (name, (classes, painter)) in enumerate(_TASKS.items()):
        rng = np.random.default_rng(number)
        pool = _drawn(painter(train), len(classes), TRAIN + CALIBRATION, rng)
        tasks.append(
            VisionTask(
                name,
                classes,
                Images(pool.images[CALIBRATION:], pool.labels[CALIBRATION:]),
                Images(pool.images[:CALIBRATION], pool.labels[:CALIBRATION]),
                _drawn(painter(test), len(classes), TEST, rng),
            )
        )
    return tasks


def _drawn(draw: Draw, classes: int, count: int, rng: np.random.Generator) -> Images:
    labels = rng.permutation(np.arange(count) % classes)
    images = [np.asarray(draw(int(label), rng).convert("RGB")) for label in labels]
    return Images(np.stack(images), labels.astype(np.int64))


def _scenes(material: Material) -> Draw:
    """Ask which photo a piece is from."""
    return lambda label, rng: _piece(material.photos[label], rng)


def _turns(material: Material) -> Draw:
    """Ask how far a drawing is turned."""

    def draw(label: int, rng: np.random.Generator) -> Image.Image:
        image = Image.new("RGB", (SIDE, SIDE), "white")
        _paste(image, _any(material.drawings, rng), (SIDE // 2, SIDE // 2), SIDE - 8)
        return image.rotate(90 * label)

    return draw


def _counts(material: Material) -> Draw:
    """Ask how many drawings lie on a photo."""

    def draw(label: int, rng: np.random.Generator) -> Image.Image:
        image = _piece(_any(material.photos, rng), rng)
        stamp = _any(material.drawings, rng)
        for cell in rng.permutation(9)[: label + 1]:
            _paste(image, stamp, _middle(int(cell), rng), int(rng.integers(13, 18)))
        return image

    return draw


def _positions(material: Material) -> Draw:
    """Ask in which of nine cells of a photo a drawing lies."""

    def draw(label: int, rng: np.random.Generator) -> Image.Image:
        image = _piece(_any(material.photos, rng), rng)
        stamp = _any(material.drawings, rng)
        _paste(image, stamp, _middle(label, rng), int(rng.integers(12, 20)))
        return image

    return draw


def _distortions(material: Material) -> Draw:
    """Ask what was done to a photo."""

    def draw(label: int, rng: np.random.Generator) -> Image.Image:
        image = _piece(_any(material.photos, rng), rng)
        return list(_DISTORTIONS.values())[label](image, rng)

    return draw


def _typefaces(material: Material) -> Draw:
    """Ask in which family of typefaces a word is printed, whatever its weight and slant."""

    def draw(label: int, rng: np.random.Generator) -> Image.Image:
        size = int(rng.integers(15, 22))
        font = ImageFont.truetype(_any(material.typefaces[label], rng), size)
        ink, paper = (int(rng.integers(0, 110)), int(rng.integers(170, 256)))
        image = Image.new("L", (SIDE, SIDE), paper)
        pen = ImageDraw.Draw(image)
        for line in range(2):
            place = int(rng.integers(-6, 5)), 4 + line * 26 + int(rng.integers(-3, 4))
            pen.text(place, _any(material.words, rng).capitalize(), fill=ink, font=font)
        return image

    return draw


def _noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    noise = rng.normal(0, rng.uniform(8, 20), (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def _compressed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(8, 20)))
    return Image.open(buffer)


def _pixelated(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    small = image.resize((SIDE // 2, SIDE // 2), Image.Resampling.BOX)
    return small.resize((SIDE, SIDE), Image.Resampling.NEAREST)


_DISTORTIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "none": lambda image, rng: image,
    "blurred": lambda image, rng: image.filter(ImageFilter.GaussianBlur(rng.uniform(0.7, 1.5))),
    "sharpened": lambda image, rng: image.filter(ImageFilter.UnsharpMask(2, 150, 0)),
    "noisy": _noisy,
    "compressed": _compressed,
    "pixelated": _pixelated,
    "few colours": lambda image, rng: ImageOps.posterize(image, 3),
    "mirrored halves": lambda image, rng: _mirrored(image),
}


def _mirrored(image: Image.Image) -> Image.Image:
    half = image.crop((0, 0, SIDE // 2, SIDE))
    image = image.copy()
    image.paste(ImageOps.mirror(half), (SIDE // 2, 0))
    return image


_TASKS: dict[str, tuple[tuple[str, ...], Callable[[Material], Draw]]] = {
    "scenes": (tuple(_PHOTOS), _scenes),
    "turns": (_TURNS, _turns),
    "counts": (tuple(f"{number} drawings" for number in range(1, _MOST + 1)), _counts),
    "positions": (_CELLS, _positions),
    "distortions": (tuple(_DISTORTIONS), _distortions),
    "typefaces": (tuple(_TYPEFACES), _typefaces),
}


def _photo(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        photo = opened.convert("RGB")
    photo.thumbnail((640, 640))
    return photo


def _piece(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut a square from a photo, of 0.25 to 0.9 of its shorter side."""
    edge = round(min(photo.size) * rng.uniform(0.25, 0.9))
    left = int(rng.integers(0, photo.width - edge + 1))
    top = int(rng.integers(0, photo.height - edge + 1))
    piece = photo.crop((left, top, left + edge, top + edge))
    return piece.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _paste(image: Image.Image, stamp: Image.Image, middle: tuple[int, int], longest: int) -> None:
    scale = longest / max(stamp.size)
    small = stamp.resize((max(3, round(stamp.width * scale)), max(3, round(stamp.height * scale))))
    image.paste(small, (middle[0] - small.width // 2, middle[1] - small.height // 2), small)


def _middle(cell: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return a point near the middle of one of nine cells."""
    row, column = divmod(cell, 3)
    x, y = (round((place + 0.5) * SIDE / 3) + int(rng.integers(-2, 3)) for place in (column, row))
    return x, y


def _any(things: list[T], rng: np.random.Generator) -> T:
    return things[int(rng.integers(len(things)))]


def _share(name: str) -> float:
    """Return a number from 0 to 1 that is always the same for a name."""
    return int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) / 0x100000000
