"""The tables of accuracies in the documentation are those of the results files."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHODS = {
    "merged (fp32)": "fp32",
    "merged, fp32": "fp32",
    "round to nearest": "RTN/{bits}",
    "merged, round to nearest": "RTN/{bits}",
    "GPTQ": "GPTQ/{bits}",
    "merged, GPTQ": "GPTQ/{bits}",
    "GPTAQ": "GPTAQ/{bits}",
    "E-PMQ, preset `paper`": "E-PMQ paper/{bits}",
    "merged, E-PMQ as published (`--preset paper`)": "E-PMQ paper/{bits}",
    "E-PMQ, preset `weights` (no data)": "E-PMQ weights/{bits}",
    "E-PMQ, preset `features`": "E-PMQ features/{bits}",
    "E-PMQ, preset `outputs`": "E-PMQ outputs/{bits}",
    "E-PMQ, preset `outputs`, anchor `auto`": "E-PMQ outputs/auto",
    "E-PMQ, one pass": "E-PMQ outputs/{bits}",
    "merged, E-PMQ in one pass (`--effort fast`)": "E-PMQ outputs/{bits}",
    "E-PMQ, one pass, `distill` 2": "E-PMQ outputs/distill",
}
MODELS = {
    "experts (fp32)": "experts",
    "the eight experts, fp32, each on its own task": "experts",
    "base (fp32)": "base",
    "base (fp32), with the experts' heads": "base",
}


def averages(suite: str) -> dict[str, float]:
    """Average accuracies in percent by key of a results file."""
    averages: dict[str, float] = json.loads(
        (ROOT / f"benchmarks/results/suite_{suite}.json").read_text()
    )
    return averages


def rows(page: str, corner: str) -> list[list[str]]:
    """Cells of the one table whose first title is ``corner``, without its heading."""
    text = (ROOT / page).read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    (lines,) = (each.splitlines() for each in tables if each.split("|")[1].strip() == corner)
    return [[cell.strip().strip("*") for cell in line.split("|")[1:-1]] for line in lines[2:]]


def key_of(label: str, merge: str, bits: int) -> str:
    """The key of a results file that a row's label stands for."""
    return MODELS.get(label) or f"{merge}/{METHODS[label].format(bits=bits)}"


@pytest.mark.parametrize("suite", ["zoo", "text"])
def test_accuracy_by_method_and_bits(suite: str) -> None:
    expected = averages(suite)
    cells = [
        (key_of(label, "task_arithmetic", bits), value)
        for label, *values in rows("docs/benchmarks.md", suite)
        for bits, value in zip((4, 3, 2), values, strict=True)
        if value
    ]
    assert len(cells) >= 16
    for key, value in cells:
        assert float(value) == pytest.approx(expected[key], abs=0.00501), key


def test_accuracy_where_nothing_was_chosen() -> None:
    expected = averages("text_other")
    table = rows("docs/benchmarks.md", "text_other")
    assert len(table) == 8
    for label, value in table:
        key = key_of(label, "task_arithmetic", 4)
        assert float(value) == pytest.approx(expected[key], abs=0.00501), key


@pytest.mark.parametrize(
    ("page", "corner", "merge"),
    [("docs/benchmarks.md", "ties", "ties"), ("README.md", "", "task_arithmetic")],
)
def test_accuracy_by_suite(page: str, corner: str, merge: str) -> None:
    expected = {suite: averages(suite) for suite in ("zoo", "text")}
    table = rows(page, corner)
    assert len(table) >= 6
    for label, zoo, text in table:
        key = key_of(label, merge, 4)
        assert float(zoo) == pytest.approx(expected["zoo"][key], abs=0.00501), key
        assert float(text) == pytest.approx(expected["text"][key], abs=0.00501), key


def test_accuracy_by_effort() -> None:
    results = json.loads((ROOT / "benchmarks/results/methods.json").read_text())
    measured = {
        row["variant"]: row["average"] for row in results["zoo, efforts, 256 samples"]["rows"]
    }
    table = rows("docs/benchmarks.md", "effort")
    assert len(table) == 5
    for label, value in table:
        words = re.findall(r"`(\w+)`", label)
        variants = {"experts (fp32)": "experts", "merged (fp32)": "fp32 merged"}
        variant = f"epmq,effort={words[0]}" if words else variants[label]
        assert float(value) == pytest.approx(measured[variant], abs=0.00501), variant
