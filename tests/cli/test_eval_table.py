"""The evaluation in a terminal: readable however many models there are."""

from dataclasses import replace

import pytest
from eval_report import build_report
from rich.console import Console

from epmq_deploy.cli.eval_table import eval_table
from epmq_deploy.runtime.evaluation.report import EvalReport

TASKS = {"cars": 400, "traffic_signs": 300, "handwritten_digits": 200}


def report_of(models: int) -> EvalReport:
    """Rows of the small report, again and again under other names."""
    report = build_report(TASKS)
    graphs = [replace(row, name=f"{row.name}-{turn}") for turn in (2, 3) for row in report.rows[2:]]
    rows = (*report.rows, *graphs)
    return replace(report, rows=rows[:models], diagnoses={})


@pytest.mark.parametrize("models", [2, 6, 9])
def test_every_table_has_tasks_and_whole_cells_at_80_columns(models: int) -> None:
    report = report_of(models)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(eval_table(report))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in captured.get()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    heads = [[cell.strip() for cell in line.split("┃")[1:-1]] for line in lines if "┃" in line]
    assert [title for head in heads for title in head[1:]] == [row.title for row in report.rows]
    assert all(head[0] == "task" for head in heads)
    for task in ("cars", "traffic_signs"):
        cells = [cell for row in rows if row[0] == task for cell in row[1:]]
        percents = [f"{row.accuracy[task]:.1f}" for row in report.rows]
        assert [cell.rstrip("+- ") for cell in cells] == percents
    # Longer names are wrapped, none is lost.
    assert sum(row[0].startswith("handwritten_digi") for row in rows) == len(heads)
    # About as many models in each table.
    sizes = [len(head) for head in heads]
    assert max(sizes) - min(sizes) <= 1


def test_a_wide_terminal_has_one_table() -> None:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(eval_table(report_of(9)))
    assert sum("┃" in line for line in captured.get().splitlines()) == 1
