"""``eval.json``: a report as plain data, and back."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from epmq_deploy.errors import RecipeError
from epmq_deploy.runtime.evaluation.gates import misses, recommend
from epmq_deploy.runtime.evaluation.report import EvalReport


def report_dict(report: EvalReport) -> dict[str, Any]:
    """Return plain data, with averages, drops, missed gates and the recommendation next to what
    they follow from.
    """
    rows = [asdict(row) | {"average": row.average, "drop": report.drop(row)} for row in report.rows]
    chosen = recommend(report)
    return asdict(report) | {
        "rows": rows,
        "misses": misses(report),
        "recommendation": chosen and asdict(chosen),
    }


def read_report(file: Path) -> EvalReport | None:
    """Return the report in an ``eval.json``, or None where there is no such file.

    Raises:
        RecipeError: it is damaged, or of another version.
    """
    try:
        return TypeAdapter(EvalReport).validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise RecipeError(
            f"{file} is damaged or was written by another version; evaluate again and overwrite it",
            options={"overwrite": True},
        ) from error
