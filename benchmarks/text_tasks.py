"""Splits of the text suite's tasks: disjoint, seeded, without texts that occur twice."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from text_sources import Source, Text

CALIBRATION = 256
TEST = 500
# Models see the beginning of a text only; texts that begin alike count as the same.
_COMPARED = 200
# Longer than what fits into 64 tokens; the rest is never read.
_STORED_WORDS = 100


@dataclass(frozen=True)
class TextTask:
    """One task's texts with labels, in order of its classes.

    Attributes:
        name: the task.
        classes: names in label order.
        train: texts with labels.
        calibration: texts with labels.
        test: texts with labels.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    calibration: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def split_task(source: Source, texts: list[Text], seed: int) -> TextTask:
    """Shuffle, drop duplicates, cap classes and split.

    Raises:
        ValueError: too few texts are left for test and calibration.
    """
    unique: dict[str, Text] = {}
    for text, name in texts:
        cleaned = " ".join(text.split()[:_STORED_WORDS])
        key = re.sub(r"\W+", "", cleaned.lower())[:_COMPARED]
        if key:
            unique.setdefault(key, (cleaned, name))
    pool = list(unique.values())
    order = random.Random(seed)
    order.shuffle(pool)
    if source.cap is not None:
        pool = _capped(pool, source.cap)
        # Capping thins out the end of the pool only; all splits must have the same shares.
        order.shuffle(pool)
    classes = tuple(sorted({name for _, name in pool}))
    labelled = tuple((text, classes.index(name)) for text, name in pool)
    drawn = TEST + CALIBRATION
    if len(labelled) < 2 * drawn:
        raise ValueError(f"{source.name}: {len(labelled)} texts, at least {2 * drawn} are needed")
    return TextTask(
        source.name,
        classes,
        train=labelled[drawn : drawn + source.train],
        calibration=labelled[TEST:drawn],
        test=labelled[:TEST],
    )


def _capped(pool: list[Text], cap: int) -> list[Text]:
    seen: Counter[str] = Counter()
    kept = []
    for text, name in pool:
        seen[name] += 1
        if seen[name] <= cap:
            kept.append((text, name))
    return kept


def write_splits(task: TextTask, folder: Path) -> None:
    """Write ``train``, ``calibration`` and ``test`` as JSON lines with ``text`` and ``label``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "calibration", "test"):
        lines = (json.dumps({"text": t, "label": n}) + "\n" for t, n in getattr(task, split))
        (folder / f"{split}.jsonl").write_text("".join(lines))
