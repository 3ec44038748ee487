"""Opening data sources: what is said of those that cannot be."""

from pathlib import Path

import pytest

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
    (tmp_path / "a.csv").write_text("text,label\na,1\n")
    (tmp_path / "b.csv").write_text("text,score\na,1\n")
    with pytest.raises(RecipeError, match=r"label: int64 .*score: int64"):
        load_rows("t", DataSource(path=str(tmp_path)))
