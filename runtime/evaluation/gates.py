"""Gates for low-bit graphs, and which graph to deploy."""

from dataclasses import dataclass

from epmq_deploy.errors import GateError
from epmq_deploy.runtime.evaluation.report import EvalReport, Row

# Averages of percentages carry rounding errors; a drop of exactly the allowed size passes.
_ROUNDING = 1e-9
# Medians this close in ratio differ from one run to the next.
_TIE = 1.05
NONE_RECOMMENDED = "no low-bit graph to deploy: none meets all gates and is accurate enough"


@dataclass(frozen=True)
class Recommendation:
    """The graph to deploy.

    Attributes:
        format: its name.
        files: relative to the export's folder.
        reason: one clause.
    """

    format: str
    files: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"deploy {', '.join(self.files)}: {self.reason}"


def misses(report: EvalReport) -> list[str]:
    """One sentence for every gate a low-bit graph misses."""
    return [text for row in report.candidates for text in _misses(report, row)]


def check_gates(report: EvalReport) -> None:
    """Make sure that at least one low-bit graph meets all gates.

    Raises:
        GateError: none does; lists every miss.
    """
    missed = [_misses(report, row) for row in report.candidates]
    if missed and all(missed):
        raise GateError(f"gates missed: {'; '.join(misses(report))}")


def recommend(report: EvalReport) -> Recommendation | None:
    """Return the fastest low-bit graph that meets all gates, the smallest of those equally fast.

    Graphs are equally fast where intervals of their latencies overlap, or there were too few runs
    for any; of graphs of equal size the first counts.

    Where no gate says how much accuracy may be lost, graphs significantly worse than fp32 merged
    that lost more than the margin are left out. Returns None where none remains.
    """
    passing = [
        row
        for row in report.candidates
        if not _misses(report, row)
        and (report.gates.max_drop is not None or not _clearly_worse(report, row))
    ]
    if not passing:
        return None
    fastest = min(passing, key=_ratio)
    equal = [row for row in passing if not _slower(row, fastest)]
    best = min(equal, key=lambda row: row.bytes or 0)
    return Recommendation(best.name, best.files, _reason(report, best, passing, equal))


def _misses(report: EvalReport, row: Row) -> list[str]:
    gates, sentences = report.gates, []
    drop = report.drop(row)
    if gates.max_drop is not None and drop is not None and drop > gates.max_drop + _ROUNDING:
        interval = ""
        if row.against_average is not None:
            seen = row.against_average.interval
            interval = f" (95% interval {-seen.high:.2f} to {-seen.low:.2f})"
        sentences.append(
            f"{row.name} lost {drop:.2f} points{interval} against fp32 merged, "
            f"allowed {gates.max_drop:g} (eval.max_drop)"
        )
    if gates.max_latency_ratio is not None and _ratio(row) > gates.max_latency_ratio:
        sentences.append(
            f"{row.name} takes {_ratio(row):.2f} of fp32 merged's time, "
            f"allowed {gates.max_latency_ratio:g} (eval.max_latency_ratio)"
        )
    megabytes = (row.bytes or 0) / 1e6
    if gates.max_size is not None and megabytes > gates.max_size:
        sentences.append(
            f"{row.name} takes {megabytes:.2f} MB, allowed {gates.max_size:g} (eval.max_size)"
        )
    return sentences


def _clearly_worse(report: EvalReport, row: Row) -> bool:
    comparison = row.against_average
    return (
        comparison is not None
        and comparison.verdict == "worse"
        and comparison.points < -report.margin
    )


def _ratio(row: Row) -> float:
    """Latency relative to fp32 merged at the first batch size and number of threads."""
    return row.timings[0].ratio


def _slower(row: Row, fastest: Row) -> bool:
    """Whether a graph is clearly slower than the fastest one."""
    interval, fastest_interval = row.timings[0].ratio_interval, fastest.timings[0].ratio_interval
    if interval is None or fastest_interval is None or interval.low <= fastest_interval.high:
        return False
    return _ratio(row) > _ratio(fastest) * _TIE


def _reason(report: EvalReport, best: Row, passing: list[Row], equal: list[Row]) -> str:
    gates = report.gates
    limits = (gates.max_drop, gates.max_latency_ratio, gates.max_size)
    met = "" if limits == (None, None, None) else "meets the gates, "
    if len(report.candidates) == 1:
        rank = "the only low-bit graph"
    elif len(passing) == 1:
        rank = "the only one that qualifies"
    elif len(equal) == 1:
        rank = "the fastest"
    else:
        # Of graphs that are equal in size as well, the first was taken.
        rank = "the smallest of those equally fast"
    fp32 = report.row("fp32").bytes or 1
    parts = [
        f"{met}{rank}",
        f"{_ratio(best):.2f} of fp32 merged's time",
        f"{(best.bytes or 0) / fp32:.2f} of its size",
    ]
    if best.against_average is not None:
        parts.append(f"accuracy {described(best)}")
    return ", ".join(parts)


def verdicts(report: EvalReport) -> dict[str, str]:
    """Return the verdict on each graph's average accuracy in words, by the graph's name."""
    return {row.name: described(row) for row in report.rows if row.against_average is not None}


def advice(report: EvalReport) -> str:
    """Return what to deploy, in a sentence."""
    return str(recommend(report) or NONE_RECOMMENDED)


def described(row: Row) -> str:
    """Return the verdict on a graph's average accuracy in words, with its interval."""
    if row.against_average is None:
        return ""
    comparison = row.against_average
    low, high = comparison.interval.low, comparison.interval.high
    if comparison.verdict == "better":
        return f"better than fp32 merged by {comparison.points:.2f} points [{low:.1f}, {high:.1f}]"
    if comparison.verdict == "worse":
        return (
            f"worse than fp32 merged by {-comparison.points:.2f} points [{-high:.1f}, {-low:.1f}]"
        )
    difference = f"({comparison.points:+.2f} points [{low:.1f}, {high:.1f}])"
    if comparison.verdict == "no worse":
        return f"no worse than fp32 merged {difference}"
    return f"not clearly different from fp32 merged {difference}"
