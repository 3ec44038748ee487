"""Images of every mode and bit depth, against values known beforehand and Pillow's conversion."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from epmq_deploy.models.images import read_rgb, to_rgb

GRAY = np.linspace(0, 255, 12 * 10).round().astype(np.uint8).reshape(12, 10)
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as a file of that format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array(content: bytes) -> np.ndarray:
    """Pixels as they are read."""
    image = read_rgb(content).image
    assert image.mode == "RGB"
    return np.asarray(image)


def as_rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


WORDS = GRAY.astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("content", "tolerance"),
    [
        (encoded(Image.fromarray(WORDS), "PNG"), 0),
        (encoded(Image.fromarray(WORDS), "TIFF"), 0),
        (encoded(Image.fromarray(WORDS), "TIFF", compression="tiff_lzw"), 0),
        (encoded(Image.fromarray(WORDS.astype(">u2")), "TIFF"), 0),
        (encoded(Image.fromarray(65535 - WORDS), "TIFF", tiffinfo={262: 0}), 0),
        (encoded(Image.fromarray(WORDS), "JPEG2000", irreversible=False), 1),
        (b"P5 10 12 65535\n" + WORDS.astype(">u2").tobytes(), 0),
        (b"P5 10 12 4095\n" + (GRAY * (4095 / 255)).astype(">u2").tobytes(), 1),
        (encoded(Image.fromarray((GRAY / 255).astype(np.float32)), "TIFF"), 0),
        (encoded(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), 0),
        (encoded(Image.fromarray(GRAY.astype(np.int32)), "TIFF"), 0),
        (encoded(Image.fromarray(GRAY), "TIFF"), 0),
        (encoded(Image.fromarray(GRAY), "PNG"), 0),
    ],
)
def test_gray_values_of_any_depth_are_those_of_8_bits(content: bytes, tolerance: int) -> None:
    difference = array(content).astype(int) - as_rgb(GRAY)
    assert np.abs(difference).max() <= tolerance


def twelve_bits() -> bytes:
    """A TIFF of two 12-bit values a row: black and white."""
    content = encoded(Image.fromarray(np.zeros((2, 3), np.uint8)), "TIFF")
    with Image.open(io.BytesIO(content)) as opened:
        (offset,) = opened.tag_v2[273]
        order = opened.tag_v2.prefix
    assert order == b"II"
    content = bytearray(content)
    # 3 bytes a row: 0x000, 0xFFF; and 0xFFF, 0x000.
    content[offset : offset + 6] = bytes((0x00, 0x0F, 0xFF, 0xFF, 0xF0, 0x00))
    count = int.from_bytes(content[8:10], "little")
    for entry in range(10, 10 + 12 * count, 12):
        tag = int.from_bytes(content[entry : entry + 2], "little")
        if tag in (256, 258):  # width, bits
            content[entry + 8 : entry + 10] = (2 if tag == 256 else 12).to_bytes(2, "little")
    return bytes(content)


def test_12_bits_are_scaled_by_12_bits() -> None:
    assert array(twelve_bits())[..., 0].tolist() == [[0, 255], [255, 0]]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bits_in_memory(mode: str) -> None:
    image = Image.frombytes(mode, (10, 12), WORDS.astype(">u2" if mode == "I;16B" else "<u2"))
    assert np.array_equal(np.asarray(to_rgb(image).image), as_rgb(GRAY))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_8_bits_without_transparency_are_converted_as_image_processors_do(mode: str) -> None:
    image = Image.fromarray(COLOURS)
    if mode == "LAB":
        image = Image.frombytes("LAB", (10, 12), COLOURS.tobytes())
    image = image.convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image).image), np.asarray(image.convert("RGB")))
    assert to_rgb(image).assumption is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[-1, 3]], np.int32), "mode I has 32-bit integers, here from -1 to 3"),
        (np.array([[0, 256]], np.int32), "mode I .* from 0 to 256, and nothing says what is white"),
        (np.array([[0, 256]], np.float32), "mode F has floats, here from 0 to 256"),
        (np.array([[-0.5, 0.5]], np.float32), "mode F has floats, here from -0.5 to 0.5"),
        (np.array([[0, np.nan]], np.float32), "mode F has floats, here NaN"),
    ],
)
def test_values_without_a_known_range_are_refused(values: np.ndarray, message: str) -> None:
    for read in (
        lambda: to_rgb(Image.fromarray(values)),
        lambda: read_rgb(encoded(Image.fromarray(values), "TIFF")),
    ):
        with pytest.raises(ValueError, match=message):
            read()


def disc(colour: tuple[int, int, int]) -> Image.Image:
    """A disc of one colour on transparency of the same colour."""
    image = Image.new("RGBA", (32, 32), (*colour, 0))
    ImageDraw.Draw(image).ellipse((8, 8, 24, 24), (*colour, 255))
    return image


def with_palette(image: Image.Image) -> Image.Image:
    return image.quantize(8)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 60)])
@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P"])
def test_a_shape_in_the_alpha_channel_is_seen(mode: str, colour: tuple[int, int, int]) -> None:
    image = disc(colour)
    if mode in ("LA", "La"):
        image = image.convert("LA")
    image = with_palette(image) if mode == "P" else image
    image = image.convert("P").convert("PA") if mode == "PA" else image
    image = image.convert(mode)
    if mode == "PA":
        image.putalpha(disc(colour).getchannel("A"))
    pixels = np.asarray(to_rgb(image).image).astype(int)
    shape = np.asarray(disc(colour))[..., 3] > 0
    background = 0 if colour == (255, 255, 255) else 255
    assert (pixels[~shape] == background).all()
    wanted = np.asarray(
        disc(colour).convert("LA" if mode in ("LA", "La") else "RGB").convert("RGB")
    )
    assert np.abs(pixels[shape] - wanted[shape]).max() <= 8
    assert "transparent" in str(to_rgb(image).assumption)


def test_files_with_transparency(tmp_path: Path) -> None:
    shape = np.asarray(disc((0, 0, 0)))[..., 3] > 0
    for kind in ("PNG", "WEBP", "TIFF", "GIF"):
        pixels = array(
            encoded(disc((0, 0, 0)), kind, **({"lossless": True} if kind == "WEBP" else {}))
        )
        assert (pixels[shape] == 0).all(), kind
        assert (pixels[~shape] == 255).all(), kind


@pytest.mark.parametrize("depth", [8, 16])
def test_a_value_of_a_png_may_be_transparent(depth: int) -> None:
    gray = np.array([[10, 20], [30, 10]], np.uint8)
    image = Image.fromarray(gray if depth == 8 else gray.astype(np.uint16) * 257)
    content = encoded(image, "PNG", transparency=10 if depth == 8 else 2570)
    assert array(content)[..., 0].tolist() == [[255, 20], [30, 255]]


def test_opaque_alpha_changes_nothing() -> None:
    image = Image.fromarray(COLOURS)
    image.putalpha(255)
    assert np.array_equal(np.asarray(to_rgb(image).image), COLOURS)
    assert to_rgb(image).assumption is None


def test_colours_that_are_all_hidden_are_refused() -> None:
    image = Image.fromarray(COLOURS)
    image.putalpha(0)
    with pytest.raises(ValueError, match="transparent everywhere"):
        to_rgb(image)
    assert np.asarray(to_rgb(Image.new("RGBA", (3, 3))).image).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_images_stand_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for depth in (8, 16) if kind in ("PNG", "TIFF") else (8,):
        image = Image.fromarray(GRAY if depth == 8 else WORDS)
        content = encoded(image, kind, exif=exif)
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            wanted = ImageOps.exif_transpose(opened)
            assert (wanted.size == (10, 12)) == (orientation < 5)
            if depth == 16:
                pixels = as_rgb((np.asarray(wanted) // 257).astype(np.uint8))
            else:
                pixels = np.asarray(wanted.convert("RGB"))
        assert np.array_equal(array(content), pixels)
        # A second conversion, of what is upright by now, turns nothing.
        upright = read_rgb(content).image
        assert np.array_equal(np.asarray(to_rgb(upright).image), pixels)


def test_damaged_exif_data_are_said() -> None:
    image = Image.fromarray(COLOURS)
    image.info["exif"] = b"Exif\0\0nonsense"
    converted, assumption = to_rgb(image)
    assert np.array_equal(np.asarray(converted), COLOURS)
    assert "EXIF data are damaged" in str(assumption)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_read_and_said(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert array(content)[3, 3].tolist() == [255, 0, 0]
    assert read_rgb(content).assumption == "the first of several frames or pages is read"


def test_images_with_more_pixels_than_pillow_opens_are_named(tmp_path: Path) -> None:
    header = encoded(Image.new("1", (8, 8)), "PNG")
    size = struct.pack(">II", 20_000, 20_000)
    chunk = b"IHDR" + size + header[24:29]
    bomb = header[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + header[33:]
    with pytest.raises(ValueError, match=r"400000000 pixels.*make it smaller"):
        read_rgb(bomb)
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"400000000 pixels.*make it smaller"):
        read_rgb(tmp_path / "bomb.png")


def test_what_is_no_image_is_said() -> None:
    with pytest.raises(ValueError, match="is empty"):
        read_rgb(b"")
    with pytest.raises(ValueError, match="not an image that Pillow reads"):
        read_rgb(b"hello")
    with pytest.raises(OSError, match="truncated"):
        read_rgb(encoded(Image.fromarray(COLOURS), "PNG")[:-60])


@pytest.mark.filterwarnings("ignore")
def test_damage_of_any_kind_is_an_error_that_callers_expect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files with bytes changed, cut and put in: either pixels, or an error that is caught."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    rng = np.random.default_rng(0)
    kinds = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "PPM", "AVIF", "DDS", "ICO")
    files = [encoded(Image.fromarray(COLOURS), kind) for kind in kinds]
    outcomes = set()
    for turn in range(1500):
        content = bytearray(files[turn % len(files)])
        for _ in range(rng.integers(1, 6)):
            where = rng.integers(min(len(content), rng.choice([40, 200, 10_000])))
            content[where : where + rng.integers(3)] = rng.bytes(rng.integers(4))
        try:
            outcomes.add(read_rgb(bytes(content)).image.mode)
        except (ValueError, OSError):
            outcomes.add("error")
    assert outcomes == {"RGB", "error"}


def test_damage_is_met_as_well_in_images_that_an_application_opened() -> None:
    content = encoded(Image.fromarray(COLOURS), "AVIF")
    with Image.open(io.BytesIO(content[:-40])) as opened, pytest.raises((ValueError, OSError)):
        to_rgb(opened)
