"""Choosing a method's options for one model, on held-back calibration samples.

Which options serve a model best depends on base, experts and merge, and suites disagree. Candidates
are calibrated without rounding on a part of every task's samples and judged on others, each with
heads as they are and with heads re-fitted at several strengths. Where calibration data have labels,
the judge is the loss of the true labels; elsewhere it is the divergence from the expert.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.artifacts.manifest import OptionChoice, TriedOptions
from epmq_deploy.data.agreement import Scores, mean_divergence, predictions_of, standard_error
from epmq_deploy.data.samples import Samples
from epmq_deploy.data.targets import label_tensor
from epmq_deploy.errors import EpmqError
from epmq_deploy.models import TaskHead
from epmq_deploy.models.predictions import PredictedLogits
from epmq_deploy.models.problem_types import (
    EMBEDDING,
    REGRESSION,
    divergence,
    negative_log_likelihood,
)
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.quantization.base import Candidate
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.head_refit import (
    can_be_refitted,
    classifier_inputs,
    refit_head,
)

log = logging.getLogger(__name__)

# Samples of each task that candidates are calibrated on, and others that they are judged on: so
# few that trying all candidates takes about as long as one pass over all samples.
_FITTED = 32
_JUDGED = 64
# Fewer than this of either tell nothing.
_FEWEST = 4
# Strengths of the pull towards heads as they are; None leaves them so.
PULLS = (None, 1.0, 0.3, 0.1)
# Of the solver that re-fits heads: enough to tell pulls apart.
_STEPS = 15


@dataclass(frozen=True)
class Split:
    """Samples of every task, in two parts.

    Attributes:
        judged: how many of each task candidates are judged on: the first ones.
        fitted: how many they are calibrated on: those after them.
        samples: by task, first those judged, then those fitted.
    """

    judged: Mapping[str, int]
    fitted: Mapping[str, int]
    samples: Mapping[str, Samples]

    @classmethod
    def of(cls, samples: Mapping[str, Samples]) -> "Split":
        """Split every task's samples; of few, half are judged."""
        judged = {task: min(_JUDGED, len(each) // 2) for task, each in samples.items()}
        fitted = {task: min(_FITTED, len(each) - judged[task]) for task, each in samples.items()}
        chosen = {
            task: replace(each, indices=each.indices[: judged[task] + fitted[task]])
            for task, each in samples.items()
        }
        return cls(judged, fitted, chosen)

    def for_fitting(self) -> dict[str, Samples]:
        """Return the part that candidates are calibrated on."""
        return {
            task: replace(each, indices=each.indices[self.judged[task] :])
            for task, each in self.samples.items()
        }


class CandidateJudge:
    """Says how well models predict held-back samples, with every pull of their heads.

    Attributes:
        pulls: of re-fitted heads that are tried, the strongest first; None leaves them as they are.

    Args:
        ctx: models, and heads of all tasks that have one.
        split: the samples.
        refit: whether heads may be re-fitted.
    """

    def __init__(self, ctx: CalibrationContext, split: Split, *, refit: bool) -> None:
        self._ctx, self._split = ctx, split
        refit = refit and any(map(can_be_refitted, ctx.heads.values()))
        self.pulls: tuple[float | None, ...] = PULLS if refit else (None,)
        self._tasks = [
            task for task in split.samples if task in ctx.heads or generates_text(ctx.family)
        ]
        experts, heads = ctx.experts(), {**ctx.heads, **ctx.expert_heads}
        self._expert = {
            task: predictions_of(
                experts.become(task), ctx.family, ctx.folder, split.samples[task], heads.get(task)
            )
            for task in self._tasks
        }
        self._labels = {}
        for task in self._tasks:
            labels = self._labels_of(task)
            if labels is not None:
                self._labels[task] = labels

    @property
    def judged_by(self) -> dict[str, str]:
        """What decides, by task: ``labels``, or the ``expert``'s predictions."""
        return {task: "labels" if task in self._labels else "expert" for task in self._tasks}

    def scores(self, model: torch.nn.Module) -> Mapping[float | None, Scores]:
        """Return the losses of a model on the samples judged, by pull."""
        losses: dict[float | None, dict[str, Tensor]] = {pull: {} for pull in self.pulls}
        for task in self._tasks:
            for pull, values in self._of_task(model, task).items():
                losses[pull][task] = values
        return losses

    def _of_task(self, model: torch.nn.Module, task: str) -> dict[float | None, Tensor]:
        ctx, judged = self._ctx, self._split.judged[task]
        samples, head = self._split.samples[task], ctx.heads.get(task)
        if head is None:
            first = replace(samples, indices=samples.indices[:judged])
            predicted = predictions_of(model, ctx.family, ctx.folder, first, None)
            return dict.fromkeys(self.pulls, self._loss(task, predicted))
        inputs = classifier_inputs(model, ctx.family, ctx.folder, samples, head)
        scored, fitted = inputs.part(0, judged), inputs.part(judged, len(samples))
        target = self._expert[task].of_samples(judged, len(samples)).logits
        losses = {}
        for pull in self.pulls:
            refitted = head
            if pull is not None and can_be_refitted(head):
                refitted = refit_head(head, fitted.rows, target, pull, _STEPS)
            losses[pull] = self._loss(task, scored.predicted(refitted))
        return losses

    def _loss(self, task: str, predicted: PredictedLogits) -> Tensor:
        """Return a task's losses, ``[n]``; squared errors relative to the targets' variance."""
        kind = predicted.problem_type
        expert = self._expert[task].of_samples(0, self._split.judged[task])
        labels = self._labels.get(task)
        if labels is not None:
            losses = negative_log_likelihood(predicted.logits, labels, kind)
        else:
            losses = divergence(predicted.logits, expert.logits, kind)
        if kind == REGRESSION:
            targets = expert.logits[:, 0] if labels is None else labels
            losses = losses / targets.double().var(correction=0).clamp(min=1e-12)
        return predicted.per_sample(losses.to(torch.float32))

    def _labels_of(self, task: str) -> Tensor | None:
        """Return the labels of the samples judged, for every prediction; None without labels."""
        ctx, samples = self._ctx, self._split.samples[task]
        classes = ctx.classes.get(task)
        source = samples.source
        if classes is None or classes.problem_type == EMBEDDING:
            return None
        if source.label_column is None and source.label_columns is None:
            return None
        first = replace(samples, indices=samples.indices[: self._split.judged[task]])
        try:
            return label_tensor(first, classes, ctx.family, ctx.folder)
        except EpmqError as error:
            log.warning("labels of calibration data are not used: %s", error)
            return None


def choose_options(
    candidates: Sequence[Candidate[Any]], ctx: CalibrationContext, *, refit: bool
) -> OptionChoice:
    """Choose among candidates, and how strongly re-fitted heads are held.

    See ``pick`` for the rule.

    Args:
        candidates: of one method; the first is what is used where nothing else is better.
        ctx: all samples, heads of the tasks that have one, and their classes.
        refit: whether heads may be re-fitted.
    """
    split = Split.of(ctx.samples)
    few = [task for task in split.samples if split.judged[task] < _FEWEST]
    judge = None if few else CandidateJudge(ctx, split, refit=refit)
    if judge is None or not judge.judged_by:
        reason = (
            f"too few calibration samples for {', '.join(few)}" if few else "no task has a head"
        )
        log.warning(
            "nothing was chosen on held-back calibration samples: %s; the options are those of "
            "quantize.effort: fast",
            reason,
        )
        return OptionChoice(reason=reason)
    fitting = replace(ctx, samples=split.for_fitting())
    tried: dict[int, Mapping[float | None, Scores]] = {}
    for number, candidate in enumerate(candidates):
        if number > 1 and candidate.if_second_helps not in (None, _helps(tried[1], tried[0])):
            continue
        model, _ = fitting.calibrate(candidate.options, rounding=False)
        tried[number] = judge.scores(model)
        log.info(
            "%s: held-back loss %.4f, with heads re-fitted %.4f",
            _described(candidate),
            mean_divergence(tried[number][None]),
            min(map(mean_divergence, tried[number].values())),
        )
    order = list(tried)
    picked, pull, error = pick(list(tried.values()))
    number = order[picked]
    fitted = max(split.fitted.values())
    total = max(len(samples) for samples in ctx.samples.values())
    return OptionChoice(
        chosen=candidates[number].settings,
        # The more samples, the less a ridge has to hold.
        head_pull=None if pull is None else pull * fitted / total,
        tried=tuple(
            TriedOptions(
                settings=candidates[each].settings,
                losses=tuple((pull, mean_divergence(scores)) for pull, scores in by_pull.items()),
            )
            for each, by_pull in tried.items()
        ),
        judged_by=judge.judged_by,
        fitted=fitted,
        judged=max(split.judged.values()),
        standard_error=error,
    )


def pick(tried: Sequence[Mapping[float | None, Scores]]) -> tuple[int, float | None, float]:
    """Pick a candidate and a pull by their losses on the samples judged.

    The first candidate stays unless another is better by more than one standard error of the
    paired difference. Of the pulls within one standard error of the best, the strongest is taken.

    Args:
        tried: of every candidate the losses by pull, the strongest first; None, which leaves heads
            as they are, counts as the strongest.

    Returns:
        The candidate's number, the pull, and the standard error of the difference between the best
        and the first candidate.
    """
    best = [min(by_pull.values(), key=mean_divergence) for by_pull in tried]
    number = min(range(len(best)), key=lambda each: mean_divergence(best[each]))
    error = standard_error(best[number], best[0])
    if mean_divergence(best[0]) - mean_divergence(best[number]) <= error:
        number = 0
    strong = (
        pull
        for pull, scores in tried[number].items()
        if mean_divergence(scores) - mean_divergence(best[number])
        <= standard_error(scores, best[number])
    )
    return number, next(strong), error


def _helps(second: Mapping[float | None, Scores], first: Mapping[float | None, Scores]) -> bool:
    """Whether the second candidate's best loss is lower than the first one's."""
    return min(map(mean_divergence, second.values())) < min(map(mean_divergence, first.values()))


def _described(candidate: Candidate[Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in candidate.settings.items())


def refitted_heads(
    model: torch.nn.Module, ctx: CalibrationContext, pull: float
) -> dict[str, TaskHead]:
    """Re-fit the head of every task that has a classifier, on all calibration samples.

    Args:
        model: what the heads will read: the quantized model.
        ctx: samples, experts and heads.
        pull: towards the heads as they are, positive.
    """
    heads = {}
    expert_heads = {**ctx.heads, **ctx.expert_heads}
    for task, head in ctx.heads.items():
        if task not in ctx.samples or not can_be_refitted(head):
            continue
        samples = ctx.samples[task]
        inputs = classifier_inputs(model, ctx.family, ctx.folder, samples, head)
        expert = predictions_of(
            ctx.experts().become(task), ctx.family, ctx.folder, samples, expert_heads[task]
        )
        heads[task] = refit_head(head, inputs.rows, expert.logits, pull)
    return heads
