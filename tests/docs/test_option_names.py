"""Options that the documentation names exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from epmq_deploy.recipe import EvalOptions, ExportOptions
from epmq_deploy.registry import MERGE_METHODS, QUANTIZATION_METHODS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "reference" not in page.parts
)
MODELS = {
    "merge": [method.options for method in MERGE_METHODS.values()],
    "quantize": [method.options for method in QUANTIZATION_METHODS.values()],
    "export": [ExportOptions],
    "eval": [EvalOptions],
}
OPTIONS = {
    section: {name for model in models for name in model.model_fields}
    for section, models in MODELS.items()
}
# `merge.search: true`, `--set eval.max_samples=100`; not `eval.json` or `quantize.py`.
OPTION = re.compile(r"\b(merge|quantize|export|eval)\.([a-z]\w+)\b")
FILES = {"json", "md", "py", "yaml"}


def named_options(text: str) -> Iterator[tuple[str, str]]:
    """Yield section and name of each option in a page."""
    for section, name in OPTION.findall(text):
        if name not in FILES:
            yield section, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_exist(page: Path) -> None:
    unknown = {
        f"{section}.{name}"
        for section, name in named_options(page.read_text())
        if name not in OPTIONS[section]
    }
    assert not unknown


def test_options_are_recognized() -> None:
    text = "`merge.search: true`, `--set eval.max_samples=100`, `exported/eval.json`"
    assert list(named_options(text)) == [("merge", "search"), ("eval", "max_samples")]
