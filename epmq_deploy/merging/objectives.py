"""What a searched scaling is judged by: a loss for every calibration sample."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from epmq_deploy.data.agreement import Judge, Scores, scored
from epmq_deploy.errors import EpmqError, MismatchError
from epmq_deploy.merging.data import RecipeData
from epmq_deploy.models.predictions import Predictions, entropy
from epmq_deploy.options.merging import ScaledOptions


def check_objective(data: RecipeData, options: ScaledOptions) -> None:
    """Make sure that the data have what the objective needs.

    Raises:
        MismatchError: names every task without labels, or a model that has no classes to label.
    """
    if options.search_objective != "labels":
        return
    if data.family.generates_text:
        problem = "models that write texts are held against their experts or by entropy"
        raise MismatchError("merge.search_objective: labels", [problem])
    problems = []
    for samples in data.samples.values():
        try:
            samples.labels(data.heads[samples.task].classes)
        except EpmqError as error:
            problems.append(str(error))
    if problems:
        raise MismatchError("merge.search_objective: labels", problems)


def losses(data: RecipeData, options: ScaledOptions) -> Callable[[nn.Module], Scores]:
    """What judges a merged model.

    Args:
        data: samples, heads and experts.
        options: name the objective: ``experts``, the Kullback-Leibler divergence from what each
            task's expert predicts; ``labels``, the cross-entropy of the data's; ``entropy``, that
            of the predictions, as AdaMerging minimises (Yang et al., arXiv 2310.02575).
    """
    folder, heads = data.sources.base.folder, data.heads
    if options.search_objective == "experts":
        return Judge.of_experts(
            data.family, folder, data.samples, heads, data.experts.become, heads
        ).scores
    labels = {}
    if options.search_objective == "labels":
        labels = {task: samples.labels() for task, samples in data.samples.items()}

    def loss(task: str, predicted: Predictions) -> Tensor:
        if task in labels:
            return cross_entropy(predicted.logits, labels[task], reduction="none")
        return entropy(predicted.logits)

    return lambda model: scored(model, data.family, folder, data.samples, heads, loss)
