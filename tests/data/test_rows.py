"""Opening data sources: what is said of those that cannot be."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from epmq_deploy.data.rows import load_rows
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import DataSource


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": "b",\n', "JSON parse error: Missing a name"),
        ("x.parquet", b"PAR1 nonsense", "Parquet magic bytes not found"),
    ],
)
def test_the_cause_of_what_datasets_reports_is_shown(
    tmp_path: Path, name: str, content: bytes, cause: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=rf"task 't': .*{name} cannot be loaded \(.*{cause}"):
        load_rows("t", DataSource(path=str(tmp_path / name)))


def test_files_with_other_columns_are_shown_with_them(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"], "label": [1]}).to_parquet(tmp_path / "a.parquet")
    Dataset.from_dict({"text": ["a"], "score": [1]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(RecipeError, match=r"score: int64 .*'label': Value"):
        load_rows("t", DataSource(path=str(tmp_path)))


ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
WITH_FIELDS = [{"text": "a", "label": 0, "spans": [{"start": 1}]}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "content",
    [
        {"data": ROWS},
        {"version": "1.1", "columns": ["text", "label"], "count": 2, "rows": ROWS, "other": []},
    ],
)
def test_rows_below_one_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: dict[str, Any], indent: int | None
) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content, indent=indent))
    with caplog.at_level(logging.INFO):
        rows = load_rows("t", DataSource(path=str(file)))
    assert list(rows) == ROWS
    key = next(key for key, value in content.items() if value == ROWS)
    assert caplog.messages == [
        f"task 't': {file} is one object: its rows are those below key {key!r}"
    ]


@pytest.mark.parametrize(
    ("name", "text", "columns"),
    [
        ("x.json", json.dumps(ROWS), {"text", "label"}),
        ("x.json", "\n".join(map(json.dumps, ROWS)), {"text", "label"}),
        # Two keys could be meant.
        ("x.json", json.dumps({"train": ROWS, "test": ROWS}), {"train", "test"}),
        # Lists of texts are no rows.
        ("x.json", json.dumps({"text": ["a", "b"]}), {"text"}),
        # One row a line, each with a list of objects.
        ("x.json", "\n".join(map(json.dumps, WITH_FIELDS * 2)), {"text", "label", "spans"}),
        ("x.jsonl", json.dumps(WITH_FIELDS[0]), {"text", "label", "spans"}),
    ],
)
def test_other_json_is_read_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, text: str, columns: set[str]
) -> None:
    (tmp_path / name).write_text(text)
    with caplog.at_level(logging.INFO):
        rows = load_rows("t", DataSource(path=str(tmp_path / name)))
    assert set(rows.column_names) == columns
    assert not caplog.messages


def test_a_row_with_the_named_column_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(WITH_FIELDS[0]))
    for named in ({"input_column": "text"}, {}, {"input_columns": ("text", "spans")}):
        rows = load_rows("t", DataSource(path=str(tmp_path / "x.json"), **named))
        assert set(rows.column_names) == {"text", "label", "spans"}
