"""CSV files in every shape in which spreadsheets and scripts save them."""

import csv
from pathlib import Path

import pytest

from epmq_deploy.data.csv_table import csv_splits, read_csv
from epmq_deploy.data.rows import load_rows
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import DataSource

ROWS = [("red; or, blue", 0), ('a "quoted"\nline', 1), ("tab\there | bar", 2)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_any_usual_separator_is_recognised(tmp_path: Path, separator: str, ending: str) -> None:
    file = tmp_path / "x.csv"
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle, delimiter=separator, lineterminator=ending)
        writer.writerows([("text", "label"), *ROWS])
    rows = read_csv(file, "x")
    assert rows.column_names == ["text", "label"]
    assert list(zip(rows["text"], rows["label"], strict=True)) == ROWS


def test_words_for_nothing_are_texts_and_empty_cells_are_not(tmp_path: Path) -> None:
    words = ["null", "NA", "None", "nan", "N/A", "", "#N/A"]
    (tmp_path / "x.csv").write_text("text,label\n" + "".join(f"{word},1\n" for word in words))
    rows = read_csv(tmp_path / "x.csv", "x")
    assert list(rows["text"]) == [word or None for word in words]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "latin-1", "utf-16"])
def test_encodings(tmp_path: Path, caplog: pytest.LogCaptureFixture, encoding: str) -> None:
    (tmp_path / "x.csv").write_text("text;label\nschön à la carte;1\n", encoding=encoding)
    rows = read_csv(tmp_path / "x.csv", "data x")
    assert rows[0] == {"text": "schön à la carte", "label": 1}
    said = "data x is not UTF-8; reading it as Latin-1" in caplog.text
    assert said == (encoding in ("cp1252", "latin-1"))


def test_a_late_byte_decides_the_encoding(tmp_path: Path) -> None:
    content = b"text,label\n" + b"red,0\n" * 400_000 + "bleu é,1\n".encode("cp1252")
    (tmp_path / "x.csv").write_bytes(content)
    rows = read_csv(tmp_path / "x.csv", "x")
    assert rows[len(rows) - 1]["text"] == "bleu é"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "x has no header"),
        ("text,label\nred,1,2\n", "x is no table .*Expected 2 columns, got 3"),
        ("text,text\nred,1\n", "two columns 'text'"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(RecipeError, match=message):
        read_csv(tmp_path / "x.csv", "x")


def test_only_columns_that_may_hold_numbers_are_read_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,code,label\n012,true,1\n2020-01-01,false,0\n")
    rows = read_csv(tmp_path / "x.csv", "x", {"label"})
    assert rows[0] == {"text": "012", "code": "true", "label": 1}
    assert list(rows["text"]) == ["012", "2020-01-01"]


def test_files_of_a_folder_are_its_splits(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.csv", "train-00001-of-00002.csv", "crash-test.csv"):
        (tmp_path / name).write_text("text;label\nNA;1\n")
    (tmp_path / ".hidden.csv").write_text("text;label\nNA;1\n")
    (tmp_path / "README.md").write_text("About the data.")
    assert {name: len(files) for name, files in csv_splits(tmp_path).items()} == {
        "crash-test": 1,
        "train": 2,
    }
    rows = load_rows("t", DataSource(path=str(tmp_path), split="train"))
    assert list(rows["text"]) == ["NA", "NA"]
    with pytest.raises(RecipeError, match="several splits: name one of crash-test, train as"):
        load_rows("t", DataSource(path=str(tmp_path)))
    (tmp_path / "more.parquet").write_bytes(b"")
    assert csv_splits(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "x.jsonl is empty"),
        ("x.parquet", b"", "x.parquet is empty"),
        ("x.jsonl", '{"text": "schön", "label": 1}'.encode("latin-1"), "is not UTF-8, as JSON"),
        ("x.txt", b"text", r"unknown kind of file; known: .*\.csv"),
    ],
)
def test_files_without_rows_or_in_another_encoding_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_rows("t", DataSource(path=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["label", "Label", "target", "score", "similarity"])
def test_columns_that_usually_hold_labels_are_read_as_numbers(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.csv").write_text(f"sentence1,sentence2,{name}\n12,blue,3.5\n")
    rows = load_rows("t", DataSource(path=str(tmp_path / "x.csv")))
    assert rows[0] == {"sentence1": "12", "sentence2": "blue", name: 3.5}
