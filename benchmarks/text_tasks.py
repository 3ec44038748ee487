"""Splits of the text suites' tasks: disjoint, seeded, without texts that occur twice."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from text_sources import Passage, Source, Text

CALIBRATION = 256
COLUMN, PAIR_COLUMNS = "text", ("sentence1", "sentence2")
# Models see the beginning of a text only; texts that begin alike count as the same.
_COMPARED = 200
# Longer than what fits into 64 tokens; the rest is never read.
_STORED_WORDS = 100


@dataclass(frozen=True)
class TextTask:
    """One task's texts with labels, in order of its classes.

    Attributes:
        name: the task.
        classes: names in label order; none where labels are values.
        train: texts, or pairs of them, with labels.
        calibration: likewise.
        test: likewise.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[tuple[Passage, float], ...]
    calibration: tuple[tuple[Passage, float], ...]
    test: tuple[tuple[Passage, float], ...]

    @property
    def has_pairs(self) -> bool:
        """Whether the model reads two texts at once."""
        return isinstance(self.test[0][0], tuple)


def split_task(source: Source, texts: list[Text], seed: int) -> TextTask:
    """Shuffle, drop duplicates, cap classes and split.

    Raises:
        ValueError: too few texts are left for test and calibration.
    """
    unique: dict[str, Text] = {}
    for passage, label in texts:
        cleaned, key = _cleaned(passage)
        if key:
            unique.setdefault(key, (cleaned, label))
    pool = list(unique.values())
    order = random.Random(seed)
    order.shuffle(pool)
    if source.cap is not None:
        pool = _capped(pool, source.cap)
        # Capping thins out the end of the pool only; all splits must have the same shares.
        order.shuffle(pool)
    classes = tuple(sorted({label for _, label in pool if isinstance(label, str)}))
    labelled = tuple(
        (passage, classes.index(label) if isinstance(label, str) else label)
        for passage, label in pool
    )
    drawn = source.test + CALIBRATION
    if len(labelled) < 2 * drawn:
        raise ValueError(f"{source.name}: {len(labelled)} texts, at least {2 * drawn} are needed")
    return TextTask(
        source.name,
        classes,
        train=labelled[drawn : drawn + source.train],
        calibration=labelled[source.test : drawn],
        test=labelled[: source.test],
    )


def _cleaned(passage: Passage) -> tuple[Passage, str]:
    """Return a text without needless space, and what texts that count as the same share."""
    if isinstance(passage, tuple):
        (first, one), (second, other) = map(_cleaned_text, passage)
        # Both are needed: a pair that lacks one is as good as empty.
        return (first, second), f"{one} {other}" if one and other else ""
    return _cleaned_text(passage)


def _cleaned_text(text: str) -> tuple[str, str]:
    cleaned = " ".join(text.split()[:_STORED_WORDS])
    return cleaned, re.sub(r"\W+", "", cleaned.lower())[:_COMPARED]


def _capped(pool: list[Text], cap: int) -> list[Text]:
    seen: Counter[str | float] = Counter()
    kept = []
    for text, name in pool:
        seen[name] += 1
        if seen[name] <= cap:
            kept.append((text, name))
    return kept


def write_splits(task: TextTask, folder: Path) -> None:
    """Write ``train``, ``calibration`` and ``test`` as JSON lines with columns and ``label``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "calibration", "test"):
        lines = (json.dumps(_row(*sample)) + "\n" for sample in getattr(task, split))
        (folder / f"{split}.jsonl").write_text("".join(lines))


def _row(passage: Passage, label: float) -> dict[str, str | float]:
    if isinstance(passage, tuple):
        return {**dict(zip(PAIR_COLUMNS, passage, strict=True)), "label": label}
    return {COLUMN: passage, "label": label}
