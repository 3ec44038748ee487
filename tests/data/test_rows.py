"""Opening data sources: what is said of those that cannot be."""

from pathlib import Path

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
