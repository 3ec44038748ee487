"""Render single letters of free fonts, for the `letters` and `scripts` tasks of the zoo."""

from __future__ import annotations

import hashlib
import re
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

SIDE = 32
_MISSING = "\U0010fffe"  # a noncharacter: every font draws its "no such glyph" box for it
_STYLE_WORDS = re.compile(
    r"\b(thin|hairline|extralight|ultralight|light|regular|book|medium|demi|demibold|semibold|bold"
    r"|extrabold|heavy|black|condensed|semicondensed|extracondensed|italic|oblique|std|ui|display"
    r"|caption|slanted|inclined|upright)\b",
    re.IGNORECASE,
)


def _span(first: int, last: int) -> str:
    return "".join(chr(code) for code in range(first, last + 1))


# Some letters of each script, without those that look the same in two of them (A, B, Γ, Π ...).
SCRIPTS = {
    "Latin": "abdefgkmnqrtwzRG",
    "Greek": "ΔΘΛΞΣΨΩβγδζθλξψω",
    "Cyrillic": "БДЖИЙЦЧШЩЫЭЮЯжфю",
    "Hebrew": "אבגדהזחטלמנפצקשת",
    "Arabic": "بتثجحخدرسشصطعفقك",
    "Armenian": _span(0x0531, 0x0538) + _span(0x0561, 0x0568),
    "Georgian": _span(0x10D0, 0x10DF),
    "Devanagari": _span(0x0915, 0x0924),
    "Thai": "กขคงจฉชญฎฐดถทนบพ",
    "Ethiopic": "ሀለሐመሠረሰሸቀበተነአከወዘ",
}


@dataclass(frozen=True)
class Face:
    path: Path
    family: str

    @property
    def held_out(self) -> bool:
        """Whether this family belongs to the test side, in every task that uses fonts."""
        return int(hashlib.sha1(f"1{self.family}".encode()).hexdigest(), 16) % 10 < 3


def find_faces(folders: list[Path], per_family: int = 4) -> list[Face]:
    """Every readable font file, at most ``per_family`` of one family (weights, slants)."""
    faces: list[Face] = []
    seen: dict[str, int] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.[to]tf")):
            try:
                name = ImageFont.truetype(path, SIDE).getname()[0] or path.stem
            except OSError:
                continue
            family = " ".join(_STYLE_WORDS.sub(" ", name).split())
            seen[family] = seen.get(family, 0) + 1
            if seen[family] <= per_family:
                faces.append(Face(path, family))
    return faces


def _ink(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """Return the glyph cropped to its ink, or None where the font draws nothing."""
    mask = font.getmask(character, mode="L")
    if 0 in mask.size:
        return None
    glyph = Image.frombytes("L", mask.size, bytes(mask))
    box = glyph.getbbox()
    return glyph.crop(box) if box else None


def draw(face: Face, characters: str, rng: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """Each character the face really has, as light ink on black, placed with some play."""
    try:
        font = ImageFont.truetype(face.path, 48)
        missing = _ink(font, _MISSING)
    except OSError:
        return []
    drawn = []
    for character in characters:
        try:
            glyph = _ink(font, character)
        except OSError:
            continue
        if glyph is None or (missing is not None and glyph.tobytes() == missing.tobytes()):
            continue
        longest = int(rng.integers(20, 28))
        scale = longest / max(glyph.size)
        width, height = (max(2, round(edge * scale)) for edge in glyph.size)
        x = int(np.clip((SIDE - width) // 2 + rng.integers(-2, 3), 0, SIDE - width))
        y = int(np.clip((SIDE - height) // 2 + rng.integers(-2, 3), 0, SIDE - height))
        canvas = Image.new("L", (SIDE, SIDE))
        canvas.paste(glyph.resize((width, height), Image.Resampling.LANCZOS), (x, y))
        drawn.append((character, np.asarray(canvas)))
    return drawn


LETTERS = string.ascii_uppercase + string.ascii_lowercase
