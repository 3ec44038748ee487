"""Token weights from gradients: layers aim most at the tokens that decide the predictions.

To second order, errors ``e`` of a layer's output change the divergence from the expert by ``e^T F
e``; with ``F`` reduced to squared gradients of that divergence, averaged over output channels, a
token's error counts by its squared gradient (GuidedQuant, Kim et al., arXiv 2505.07004, with one
group of channels). Here the gradients are taken in the merged model, whose predictions are still
far from the experts', so they are trusted only in part: weights are a power of them below 1.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from epmq_deploy.data.agreement import Judge
from epmq_deploy.models import Block
from epmq_deploy.models.modules import linear_layer
from epmq_deploy.models.predictions import features_of, predict_logits
from epmq_deploy.models.problem_types import divergence
from epmq_deploy.models.token_batch import on_device

# Least and most weight, relative to a batch's mean: some tokens of some samples have gradients of
# zero, and others would decide alone.
_LEAST, _MOST = 0.01, 20.0

# By a group's first layer: for every token that its layers receive, the mean over the outputs of
# all of them of the squared gradient; one tensor for each run of the layers.
BatchGradients = Mapping[str, Sequence[Tensor]]
# By task, batch by batch.
Gradients = Mapping[str, Sequence[BatchGradients]]


def guided(weights: Tensor | None, squares: Tensor, power: float) -> Tensor:
    """Return token weights times a power of squared gradients, float32.

    Args:
        weights: of the tokens as they are; None when all weigh 1.
        squares: squared gradients of the same shape, ``[B, T]`` for example.
        power: 0 leaves the weights as they are up to a factor, 1 takes squared gradients in full.
    """
    weights = torch.ones_like(squares) if weights is None else weights
    raised = squares.to(torch.float32) ** power
    mean = (weights * raised).sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
    if not mean > 0:
        # The model predicts what the expert does on all of the batch.
        return weights
    return weights * (raised / mean).clamp(_LEAST, _MOST)


def token_gradients(
    model: nn.Module,
    blocks: Sequence[Block],
    judge: Judge,
    task: str,
    inputs: Iterable[tuple[Tensor, ...]],
) -> list[BatchGradients]:
    """Return squared gradients of the divergence from a task's expert, batch by batch.

    Args:
        model: whose predictions are compared; its parameters are left without gradients.
        blocks: its blocks.
        judge: knows what the expert predicts for these samples.
        task: name of the task.
        inputs: batches of the judge's samples, in their order.

    Returns:
        Tensors on the CPU. A block that repeats gives the runs of all repeats in a row.
    """
    model.requires_grad_(False)
    device = next(model.parameters()).device
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, args: object, output: Tensor) -> Tensor:
        # Where no layer before has begun the graph, this one does.
        output = output if output.requires_grad else output.detach().requires_grad_()
        output.retain_grad()
        outputs.setdefault(name, []).append(output)
        return output

    groups = [group.layers for block in blocks for group in block.groups]
    handles = [
        linear_layer(model, name).register_forward_hook(partial(keep, name))
        for group in groups
        for name in group
    ]
    gradients: list[BatchGradients] = []
    start = 0
    try:
        for batch in inputs:
            outputs.clear()
            stop = start + len(batch[0])
            wanted = judge.wanted[task].of_samples(start, stop)
            with torch.enable_grad():
                features = features_of(judge.family, model, on_device(batch, device))
                features = features.to("cpu", torch.float32)
                predicted = predict_logits(judge.family, judge.heads.get(task), features, batch)
                losses = divergence(predicted.logits, wanted.logits, predicted.problem_type)
                # Divided by the samples, gradients of float16 models could vanish.
                losses.sum().backward()  # type: ignore[no-untyped-call]
            gradients.append({group[0]: _squares([outputs[n] for n in group]) for group in groups})
            start = stop
    finally:
        for handle in handles:
            handle.remove()
    return gradients


def _squares(outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return, run by run, the mean over layers and channels of the squared gradients."""
    runs = []
    for of_run in zip(*outputs, strict=True):
        parts = [_square(output) for output in of_run]
        runs.append(torch.stack(parts).mean(dim=0).cpu())
    return runs


def _square(output: Tensor) -> Tensor:
    """Return the mean over channels; zeros for an output that no prediction depends on."""
    if output.grad is None:
        return torch.zeros(output.shape[:-1], device=output.device)
    return output.grad.to(torch.float32).square().mean(dim=-1)
