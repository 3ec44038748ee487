"""CSV files as programs in the wild write them: any separator, old encodings, cells as written.

``datasets`` would read ``null`` and ``NA`` as missing and knows commas and UTF-8 only.
"""

import csv
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from epmq_deploy.errors import RecipeError

log = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv")
_SEPARATORS = (",", ";", "\t", "|")
_BLOCK = 2**24
_OTHER_TABLES = (".parquet", ".json", ".jsonl", ".ndjson", ".arrow")
_SHARD = re.compile(r"-\d+-of-\d+$")


def read_csv(file: Path, where: str, numeric: Collection[str] | None = None) -> Any:
    """Read a CSV file with a header as a ``datasets.Dataset``.

    Args:
        file: with any of the usual separators, in UTF-8 or Latin-1.
        where: what to call the data in messages.
        numeric: columns that hold numbers if they can be read as such; all others are texts, even
            those that look like numbers. None for all columns.

    Raises:
        RecipeError: it is empty or no table.
    """
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import csv as arrow_csv

    encoding = _encoding(file, where)
    with file.open(encoding=encoding, newline="") as handle:
        header = handle.readline().strip("\r\n")
    if not header:
        raise RecipeError(f"{where} has no header with the names of its columns")
    separator = _separator(header)
    texts = [] if numeric is None else next(csv.reader([header], delimiter=separator))
    try:
        table = arrow_csv.read_csv(
            file,
            read_options=arrow_csv.ReadOptions(encoding=encoding, block_size=_BLOCK),
            parse_options=arrow_csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                column_types={
                    name: pa.string() for name in texts if name.strip() not in (numeric or ())
                },
            ),
        )
    except pa.ArrowInvalid as error:
        raise RecipeError(f"{where} is no table ({str(error).splitlines()[0]})") from error
    names = [name.strip() for name in table.column_names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"{where} has two columns {twice[0]!r}; rename one")
    return Dataset(table.rename_columns(names))


def csv_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the CSV files of a folder by split: the file's name without shard number and suffix.

    Empty where the folder holds other tables too, which ``datasets`` knows how to read.
    """
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.parts[len(folder.parts) :])
    ]
    if any(file.suffix.lower() in _OTHER_TABLES for file in files):
        return {}
    splits: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in SUFFIXES:
            splits.setdefault(_SHARD.sub("", file.stem), []).append(file)
    return splits


def _separator(header: str) -> str:
    """Return the separator that splits a header into the most columns; a comma if none does."""
    counts = {
        separator: len(next(csv.reader([header], delimiter=separator))) for separator in _SEPARATORS
    }
    return max(_SEPARATORS, key=lambda separator: counts[separator])


def _encoding(file: Path, where: str) -> str:
    """Return UTF-8 (a byte order mark is no text), else what Windows calls Latin-1."""
    with file.open("rb") as handle:
        start = handle.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if not_utf8(file):
        log.warning("%s is not UTF-8; reading it as Latin-1 (Windows-1252)", where)
        return "cp1252"
    return "utf-8-sig"


def not_utf8(file: Path) -> str:
    """Say which byte of a file is no UTF-8; empty where all are."""
    try:
        with file.open(encoding="utf-8-sig") as handle:
            while handle.read(_BLOCK):
                pass
    except UnicodeDecodeError as error:
        return str(error)
    return ""
