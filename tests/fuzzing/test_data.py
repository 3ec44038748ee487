"""Data files with damaged bytes and odd values."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import cases, changed_copy, succeeds_or_explains
from hypothesis import given
from hypothesis import strategies as st
from mutations import ODD, damaged
from tiny_text import TinyText
from tiny_zoo import TinyZoo

from epmq_deploy.pipeline import preflight
from epmq_deploy.recipe import load_recipe

VALUES = [value for value in ODD if not isinstance(value, dict | list)] + [["a"], {"a": 1}]


@pytest.mark.parametrize("name", ["calibration.parquet", "test.parquet"])
@cases(60)
@given(data=st.data())
def test_damaged_parquet_files(tiny: TinyZoo, name: str, data: st.DataObject) -> None:
    file = Path("data", "red", name)
    content = data.draw(damaged((tiny.folder / file).read_bytes()))
    with changed_copy(tiny.folder, file, content) as copy:
        succeeds_or_explains(lambda: preflight(load_recipe(copy / "recipe.yaml")))


@cases(80)
@given(data=st.data())
def test_parquet_files_with_odd_values(tiny: TinyZoo, data: st.DataObject) -> None:
    file = Path("data", "red", "test.parquet")
    rows = pq.read_table(tiny.folder / file).to_pydict()
    column = data.draw(st.sampled_from(sorted(rows)))
    kind = data.draw(st.sampled_from(["null", "one", "all", "rename", "drop", "bytes", "label"]))
    if kind == "null":
        rows[column][0] = None
    elif kind in ("one", "all"):
        value = data.draw(st.sampled_from([-1, 2**40, 0.5, "x", "1", True, None]))
        count = len(rows[column]) if kind == "all" else 1
        rows[column] = [value] * count + [None] * (len(rows[column]) - count)
    elif kind == "rename":
        rows[data.draw(st.sampled_from(["", "x", "IMAGE", "labels"]))] = rows.pop(column)
    elif kind == "drop":
        del rows[column]
    elif kind == "bytes":
        rows["image"][0] = {"bytes": data.draw(st.binary(max_size=20)), "path": None}
    else:
        rows["label"] = data.draw(st.lists(st.integers(-2, 5), min_size=15, max_size=15))
    buffer = io.BytesIO()
    pq.write_table(pa.table(rows), buffer)
    with changed_copy(tiny.folder, file, buffer.getvalue()) as copy:
        succeeds_or_explains(lambda: preflight(load_recipe(copy / "recipe.yaml")))


@cases(80)
@given(data=st.data())
def test_json_lines_with_odd_values(tiny_text: TinyText, data: st.DataObject) -> None:
    file = Path("data", "tone", "calibration.jsonl")
    lines = (tiny_text.folder / file).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    row = rows[data.draw(st.integers(0, len(rows) - 1))]
    key = data.draw(st.sampled_from(["text", "label", "x", ""]))
    row[key] = data.draw(st.sampled_from(VALUES))
    content = "\n".join(map(json.dumps, rows)).encode()
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    with changed_copy(tiny_text.folder, file, content) as copy:
        succeeds_or_explains(lambda: preflight(load_recipe(copy / "recipe.yaml")))


@cases(80)
@given(data=st.data())
def test_csv_files_with_odd_values(tiny_text: TinyText, data: st.DataObject) -> None:
    file = Path("data", "tone", "test.csv")
    content = (tiny_text.folder / file).read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        content = data.draw(damaged(content))
    if data.draw(st.booleans()):
        old = data.draw(st.sampled_from([b",", b"\n", b"0", b"1", b"label", b"text", b"red"]))
        new = data.draw(st.sampled_from([b"", b";", b'"', b"\r", b"\0", b"\xff", b"-1", b"x"]))
        content = content.replace(old, new, data.draw(st.integers(1, 9)))
    with changed_copy(tiny_text.folder, file, content) as copy:
        succeeds_or_explains(lambda: preflight(load_recipe(copy / "recipe.yaml")))
