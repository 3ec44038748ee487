"""CSV files as programs in the wild write them: any separator, old encodings, cells as written.

``datasets`` would read ``null`` and ``NA`` as missing and knows commas and UTF-8 only.
"""

import csv
import logging
from pathlib import Path
from typing import Any

from epmq_deploy.errors import RecipeError

log = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv")
_SEPARATORS = (",", ";", "\t", "|")
_BLOCK = 2**24


def read_csv(file: Path, where: str) -> Any:
    """Read a CSV file with a header as a ``datasets.Dataset``.

    Args:
        file: with any of the usual separators, in UTF-8 or Latin-1.
        where: what to call the data in messages.

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
    try:
        table = arrow_csv.read_csv(
            file,
            read_options=arrow_csv.ReadOptions(encoding=encoding, block_size=_BLOCK),
            parse_options=arrow_csv.ParseOptions(
                delimiter=_separator(header), newlines_in_values=True
            ),
            convert_options=arrow_csv.ConvertOptions(
                null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        raise RecipeError(f"{where} is no table ({str(error).splitlines()[0]})") from error
    names = [name.strip() for name in table.column_names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"{where} has two columns {twice[0]!r}; rename one")
    return Dataset(table.rename_columns(names))


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
    try:
        with file.open(encoding="utf-8-sig") as handle:
            while handle.read(_BLOCK):
                pass
    except UnicodeDecodeError:
        log.warning("%s is not UTF-8; reading it as Latin-1 (Windows-1252)", where)
        return "cp1252"
    return "utf-8-sig"
