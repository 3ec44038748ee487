"""Image folders: one folder for each class, or images without labels.

Every image below a class folder belongs to it, whatever it is called; what is left out is counted
and logged. Splits are folders that are called so (``train/cat``, ``test/cat``), never parts of
file names.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from epmq_deploy.data import csv_table
from epmq_deploy.data.conversion_cache import cache_folder
from epmq_deploy.data.files import files_below
from epmq_deploy.errors import RecipeError

log = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_FILE_COLUMN = "file_name"
# Names that tell a folder of class folders from a class folder.
_SPLITS = frozenset(
    ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")
)
# What ``datasets`` calls data without splits; recipes may name it.
_ONLY_SPLIT = "train"
# Files that hold a data set's rows, not those of one class.
_DATA_FILES = frozenset((".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".tar", ".zip"))
# Formats that Pillow names but cannot decode by itself.
_NOT_DECODED = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))
# Formats that the first bytes of a file tell without doubt.
_RECOGNISED = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")


def class_order(names: Iterable[str]) -> list[str]:
    """Return the names of class folders in label order."""
    return sorted(names)


@dataclass(frozen=True)
class ImageFolder:
    """The files below a folder, told apart; paths are relative to it and sorted.

    Attributes:
        path: of the folder.
        images: files that hold an image.
        others: files that do not.
        leftovers: files and folders that programs leave behind.
        empty: folders directly below that hold no file at all, but for hidden ones.
    """

    path: Path
    images: tuple[PurePath, ...]
    others: tuple[PurePath, ...]
    leftovers: tuple[PurePath, ...]
    empty: tuple[str, ...]

    @classmethod
    def scan(cls, path: Path) -> "ImageFolder":
        """Walk a folder.

        Raises:
            RecipeError: a folder cannot be read.
        """
        files: list[Path] = []
        leftovers: list[Path] = []
        try:
            for file, leftover in files_below(path):
                (leftovers if leftover else files).append(file.relative_to(path))
            folders = [entry.name for entry in os.scandir(path) if entry.is_dir()]
        except OSError as error:
            raise RecipeError(f"{error.filename}: cannot be read ({error.strerror})") from error
        used = {file.parts[0] for file in (*files, *leftovers)}
        images = {file for file in files if _is_image(path / file)}
        return cls(
            path,
            tuple(sorted(images)),
            tuple(sorted(file for file in files if file not in images)),
            tuple(sorted(leftovers)),
            tuple(sorted(name for name in folders if name not in used and name[0] != ".")),
        )

    @property
    def holds_images(self) -> bool:
        """Whether this is a data set of image files; data files may lie next to a few images."""
        stems = {image.with_suffix("") for image in self.images}
        data = [
            file
            for file in self.others
            if file.suffix.lower() in _DATA_FILES
            and file.name not in METADATA_FILES
            and file.with_suffix("") not in stems
        ]
        return len(self.images) > len(data) and not _configured(self.path / "README.md")

    @property
    def metadata(self) -> list[str]:
        """Names of the files directly in this folder that list its images."""
        return [file.name for file in self.others if str(file) in METADATA_FILES]

    @property
    def folders(self) -> list[str]:
        """Names of the folders directly below that hold images."""
        return list(dict.fromkeys(image.parts[0] for image in self.images if len(image.parts) > 1))

    @property
    def direct(self) -> frozenset[str]:
        """Those of ``folders`` that hold images themselves, not only in folders of their own."""
        listed = {file.parts[0] for file in self.others if file.name in METADATA_FILES}
        return frozenset(i.parts[0] for i in self.images if len(i.parts) == 2) - listed

    @property
    def splits(self) -> list[str]:
        """Names of the folders that are splits; empty where they are classes."""
        named = all(name.lower() in _SPLITS for name in self.folders)
        return self.folders if named and self.direct != set(self.folders) else []

    def below(self, name: str) -> "ImageFolder":
        """Return one of the folders directly below."""
        return ImageFolder.scan(self.path / name)

    def split(self, name: str | None, where: str) -> "ImageFolder":
        """Return the folder of a split; without a name this folder, or its only split's.

        Args:
            name: of the split.
            where: what to call the data in messages.

        Raises:
            RecipeError: no such split, or several and none is named.
        """
        splits = self.splits
        if name is None and len(splits) < 2:
            return self.below(splits[0]) if splits else self
        if name in self.folders:
            others = [each for each in self.folders if each.lower() not in _SPLITS]
            if name in self.direct and others:
                raise RecipeError(
                    f"{where}: folder {name!r} holds images next to the class folders "
                    f"{_some(others)}, so it is a class and not a split; leave split out"
                )
            return self.below(name)
        if splits:
            raise RecipeError(
                f"{where}: split {name!r} not found, name one of {', '.join(splits)} as split"
            )
        if name == _ONLY_SPLIT:
            return self
        raise RecipeError(f"{where} has no splits, but split {name!r} was asked for")

    def rows(self, where: str) -> Any:
        """Return a ``datasets.Dataset`` of all images, with labels where there are class folders.

        Args:
            where: what to call the data in messages.

        Raises:
            RecipeError: it is not clear which folders are the classes, or metadata are wrong.
        """
        if self.metadata:
            return self._listed_rows(where)
        if len(self.folders) == 1 and not self.direct and not self._beside_folders:
            inner = self.below(self.folders[0])
            log.info("%s: its only folder is %s, which holds the classes", where, inner.path)
            return inner.rows(where)
        names = self.class_names(where)
        number = {name: label for label, name in enumerate(names)}
        images = [image for image in self.images if len(image.parts) > 1 or not names]
        self._log_left_out(where, self._beside_folders if names else [])
        columns: dict[str, list[Any]] = {"image": [_stored(self.path / image) for image in images]}
        if names:
            columns["label"] = [number[image.parts[0]] for image in images]
        return _dataset(columns, names)

    def class_names(self, where: str) -> list[str]:
        """Return the names of the class folders in label order; empty where there are none.

        A folder without any file is a class without samples, so that the others keep their labels.

        Args:
            where: what to call the data in messages.

        Raises:
            RecipeError: it is not clear which folders are the classes.
        """
        folders = self.folders
        if not folders:
            return []
        if len(folders) > 1 and not self.direct:
            inner = dict.fromkeys(PurePath(*image.parts[:2]).as_posix() for image in self.images)
            raise RecipeError(
                f"{where} holds folders of folders of images ({_some(list(inner))}), so that it is "
                "not clear which are the classes; give each class one folder, or list files and "
                "labels in a CSV file"
            )
        if all(name.lower() in _SPLITS for name in folders):
            log.warning(
                "%s: taking its folders %s for classes, as they hold images themselves; name one "
                "as split to load it alone",
                where,
                ", ".join(folders),
            )
        if self.empty:
            log.warning("%s: no images of class %s", where, ", ".join(self.empty))
        return class_order([*folders, *self.empty])

    @property
    def _beside_folders(self) -> list[PurePath]:
        return [image for image in self.images if len(image.parts) == 1]

    def _listed_rows(self, where: str) -> Any:
        """Return the rows of a metadata file, their files as images."""
        import datasets

        if len(self.metadata) > 1:
            raise RecipeError(f"{where} holds {' and '.join(self.metadata)}; keep one of them")
        file = self.path / self.metadata[0]
        if file.suffix in csv_table.SUFFIXES:
            rows = csv_table.read_csv(file, f"{where}: {file.name}")
        else:
            builder = {".jsonl": "json", ".parquet": "parquet"}[file.suffix]
            files = {"rows": [str(file)]}
            rows = datasets.load_dataset(builder, data_files=files, cache_dir=cache_folder())[
                "rows"
            ]
        if _FILE_COLUMN not in rows.column_names:
            raise RecipeError(
                f"{where}: {file.name} has no column {_FILE_COLUMN!r}, which says which image a "
                f"row belongs to; it has {', '.join(rows.column_names)}"
            )
        names = list(rows[_FILE_COLUMN])
        listed = {PurePath(name) for name in names if name is not None}
        self._log_left_out(where, [image for image in self.images if image not in listed])
        images = [None if name is None else str(self.path / name) for name in names]
        rows = rows.remove_columns([_FILE_COLUMN, *({"image"} & set(rows.column_names))])
        return rows.add_column("image", images).cast_column("image", datasets.Image())

    def _log_left_out(self, where: str, images: list[PurePath]) -> None:
        counts = []
        if images:
            outside = "not listed in its metadata" if self.metadata else "outside its class folders"
            counts.append(f"{len(images)} image(s) {outside} ({_some(list(map(str, images)))})")
        others = [file for file in self.others if str(file) not in METADATA_FILES]
        if others:
            kinds = Counter(file.suffix.lower() or "without a suffix" for file in others)
            shown = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            counts.append(f"{len(others)} file(s) that are not images ({shown})")
        if self.leftovers:
            counts.append(f"{len(self.leftovers)} that programs left there")
        if counts:
            loaded = len(self.images) - len(images)
            log.warning("%s: loading %d image(s); left out: %s", where, loaded, "; ".join(counts))


def _is_image(file: Path) -> bool:
    """Whether a file is called like an image, or begins like one where its name says nothing."""
    from PIL import Image

    suffix = file.suffix.lower()
    if suffix in _image_suffixes():
        return True
    if suffix in _DATA_FILES:
        return False
    try:
        with Image.open(file, formats=_RECOGNISED):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


@cache
def _image_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that Pillow reads, in lower case."""
    from PIL import Image

    suffixes = Image.registered_extensions().items()
    return frozenset(s for s, kind in suffixes if kind in Image.OPEN and kind not in _NOT_DECODED)


def _configured(readme: Path) -> bool:
    """Whether a data set's card says which files belong to which split."""
    if not readme.is_file():
        return False
    head = readme.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    return head.startswith("---") and "\nconfigs:" in head


def _stored(file: Path) -> dict[str, Any]:
    """Return a file as ``datasets`` stores it: by path, by content where that is not Unicode."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return {"path": None, "bytes": file.read_bytes()}
    return {"path": str(file), "bytes": None}


def _dataset(columns: dict[str, list[Any]], names: list[str]) -> Any:
    from datasets import ClassLabel, Dataset, Features, Image

    features: dict[str, Any] = {"image": Image()}
    if names:
        features["label"] = ClassLabel(names=names)
    return Dataset.from_dict(columns, features=Features(features))


def _some(names: list[str]) -> str:
    """Return the first few names."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
