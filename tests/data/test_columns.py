"""Which columns of a data set hold inputs and labels."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_text import TinyText

from epmq_deploy.data.class_labels import HeadClasses
from epmq_deploy.data.loading import load_samples
from epmq_deploy.data.samples import Samples
from epmq_deploy.errors import RecipeError
from epmq_deploy.models import family_of
from epmq_deploy.recipe import DataSource


@pytest.fixture
def texts(tiny_text: TinyText, tmp_path: Path) -> Any:
    """Load rows as a text classifier does."""

    def loaded(rows: list[dict[str, object]], **source: object) -> Samples:
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        data = DataSource.model_validate({"path": str(file)} | source)
        return load_samples("t", data, family_of(tiny_text.base))

    return loaded


@pytest.mark.parametrize("name", ["sentence", "content", "review"])
def test_usual_names_of_a_text_column_are_taken_and_said(
    texts: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with caplog.at_level("INFO", "epmq_deploy"):
        assert texts([{name: "red", "label": 1}]).inputs(0, 1) == ["red"]
    assert f"no column 'text', taking {name!r} for the inputs" in caplog.text


def test_several_candidates_are_refused(texts: Any) -> None:
    with pytest.raises(RecipeError, match="it has sentence, content, label; name the one"):
        texts([{"sentence": "red", "content": "blue", "label": 1}])


@pytest.mark.parametrize("name", ["labels", "label_id", "target"])
def test_usual_names_of_a_label_column_are_taken_and_said(
    texts: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with caplog.at_level("INFO", "epmq_deploy"):
        assert texts([{"text": "red", name: 1}]).labels().numbers == [1]
    assert f"no column 'label', taking {name!r} for the labels" in caplog.text


def test_several_label_columns_and_a_named_one_that_is_missing_are_refused(texts: Any) -> None:
    rows = [{"text": "red", "labels": 1, "target": 0}]
    with pytest.raises(RecipeError, match="no column 'label'"):
        texts(rows).labels()
    with pytest.raises(RecipeError, match="no column 'truth'"):
        texts(rows, label_column="truth").labels()
    assert texts(rows, label_column="target").labels().numbers == [0]


def test_fields_are_named_with_a_dot(texts: Any) -> None:
    rows = [{"data": {"in": {"words": "red"}, "class": "b"}}, {"data": {"in": None, "class": "a"}}]
    samples = texts(rows[:1], input_column="data.in.words", label_column="data.class")
    assert samples.inputs(0, 1) == ["red"]
    assert samples.labels(HeadClasses(2, ("a", "b"))).numbers == [1]
    with pytest.raises(RecipeError, match=r"row 1 holds no text in column 'data\.in\.words'"):
        texts(rows, input_column="data.in.words")
    with pytest.raises(RecipeError, match=r"no column 'data\.in\.letters'"):
        texts(rows, input_column="data.in.letters")
