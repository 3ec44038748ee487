"""The table of architectures says what becomes of a tiny model of each."""

from pathlib import Path

from architecture_table import table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "architectures.md"


def test_the_table_is_what_is_found() -> None:
    written = PAGE.read_text().partition("<!-- table -->\n")[2].partition("<!-- end -->")[0]
    assert written.strip() == table(), "run tests/support/architecture_table.py"
