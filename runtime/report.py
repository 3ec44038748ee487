"""What an evaluation found, as plain data."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from epmq_deploy.errors import GateError
from epmq_deploy.runtime.latency import Latency

EXPERTS = "experts"
REFERENCE = "fp32"
# Averages of percentages carry rounding errors; a drop of exactly the allowed size passes.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Row:
    """One model's results.

    Attributes:
        name: a format's name, or ``experts``.
        accuracy: percent by task.
        bytes: size of the file, absent for experts.
        latency: of one sample, absent for experts.
    """

    name: str
    accuracy: Mapping[str, float]
    bytes: int | None = None
    latency: Latency | None = None

    @property
    def average(self) -> float:
        """Accuracy averaged over tasks, percent."""
        return sum(self.accuracy.values()) / len(self.accuracy)


@dataclass(frozen=True)
class EvalReport:
    """Results of all models on all tasks.

    Attributes:
        rows: experts (where evaluated), then every graph.
        samples: evaluation samples by task.
        provider: onnxruntime's execution provider that ran the graphs.
        threads: intra-op threads, None for onnxruntime's default.
        fingerprint: of exported model, data and options.
    """

    rows: tuple[Row, ...]
    samples: Mapping[str, int]
    provider: str
    threads: int | None
    fingerprint: str

    def row(self, name: str) -> Row:
        """The row of a format or of the experts."""
        return next(row for row in self.rows if row.name == name)

    def drop(self, row: Row) -> float | None:
        """Points of average accuracy lost against fp32 merged; None for the experts."""
        return None if row.name == EXPERTS else self.row(REFERENCE).average - row.average

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``eval.json``."""
        rows = [asdict(row) | {"average": row.average, "drop": self.drop(row)} for row in self.rows]
        return asdict(self) | {"rows": rows}

    def check_drop(self, max_drop: float | None) -> None:
        """Hold every low-bit graph against the gate.

        Raises:
            GateError: names every format that lost more than ``max_drop`` points.
        """
        if max_drop is None:
            return
        drops = {row.name: self.drop(row) for row in self.rows if row.name != REFERENCE}
        missed = [
            f"{name} lost {drop:.2f} points"
            for name, drop in drops.items()
            if drop is not None and drop > max_drop + _ROUNDING
        ]
        if missed:
            raise GateError(
                f"accuracy gate missed: {', '.join(missed)} against fp32 merged, "
                f"allowed {max_drop:g} (--max-drop)"
            )


def read_report(file: Path) -> EvalReport | None:
    """The report in an ``eval.json``, or None where there is none or it is damaged."""
    try:
        content = json.loads(file.read_text())
        rows = []
        for row in content["rows"]:
            latency = row["latency"] and Latency(**row["latency"])
            rows.append(Row(row["name"], row["accuracy"], row["bytes"], latency))
        return EvalReport(**(content | {"rows": tuple(rows)}))
    except (OSError, ValueError, KeyError, TypeError):
        return None
