"""Exit codes in the documentation are those of the command line."""

from pathlib import Path

import pytest

from epmq_deploy.cli.errors import EXIT_CODES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["reference/files.md", "guides/gates.md"])
def test_pages_list_the_exit_codes_of_the_command_line(page: str) -> None:
    rows = [f"| {item.code} | {item.meaning} |" for item in EXIT_CODES]
    assert "\n".join(rows) in (DOCS / page).read_text()
