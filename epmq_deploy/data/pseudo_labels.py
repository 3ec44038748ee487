"""Answers to calibration data that have none: each task's expert writes its own.

Calibration aims at what experts do, so their answers serve as well as labels; a decoder reads them
as it would read labels. They are written greedily and end at ``prompt.max_tokens``.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from epmq_deploy.data.samples import Samples, TextSamples
from epmq_deploy.models import ModelFamily
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.progress import NoProgress, Progress

log = logging.getLogger(__name__)

_BATCH = 32


def without_answers(samples: Mapping[str, Samples]) -> dict[str, TextSamples]:
    """The tasks in words whose data have no answers."""
    return {
        task: chosen
        for task, chosen in samples.items()
        if isinstance(chosen, TextSamples) and chosen.lacks_answers
    }


def write_answers(
    samples: Mapping[str, Samples],
    family: ModelFamily,
    folder: Path,
    expert: Callable[[str], nn.Module],
    progress: Progress | None = None,
) -> dict[str, list[str]]:
    """What experts answer to their own tasks' samples, in order, where these have no answers.

    Args:
        samples: by task.
        family: of the experts.
        folder: a model folder with a tokenizer.
        expert: a task's expert, until the next call.
        progress: shows one step per task.
    """
    assert generates_text(family), "only its samples are texts with answers"
    asked = list(without_answers(samples).items())
    written = {}
    for task, chosen in (progress or NoProgress()).track(asked, "writing answers"):
        model, longest = expert(task), chosen.wording.max_tokens
        written[task] = [
            answer
            for start in range(0, len(chosen), _BATCH)
            for answer in family.write(model, folder, chosen.texts(start, start + _BATCH), longest)
        ]
    return written


def with_answers(
    samples: Mapping[str, Samples], written: Mapping[str, Sequence[str]]
) -> dict[str, Samples]:
    """Samples with the answers that experts wrote, which is logged."""
    log.warning(
        "calibration data without labels: experts' own answers take their place (%s)",
        ", ".join(f"{task}: {len(answers)}" for task, answers in written.items()),
    )
    return dict(samples) | {
        task: replace(chosen, written=dict(zip(chosen.indices, written[task], strict=True)))
        for task, chosen in without_answers(samples).items()
    }


def answer_details(written: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What manifests say of them: by task, how many answers its expert wrote."""
    return {"answers_by_experts": {task: len(answers) for task, answers in written.items()}}
