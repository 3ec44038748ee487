"""Reading off a run of a classifier how it gets from hidden states to logits.

What is read off is confirmed by its numbers: the same head on the same hidden states has to give
the same logits.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from epmq_deploy.models.encoders.classifier import HeadLayout
from epmq_deploy.models.generic.pooling import POOLINGS, Pooling, as_tokens, real_tokens
from epmq_deploy.models.generic.probe import NotUnderstood, Probe, Step
from epmq_deploy.models.head import ACTIVATIONS, Activation, TaskHead, embedding_width

_KINDS = "one linear layer, or two with an activation between them, and a LayerNorm before the last"


def head_of(probe: Probe) -> tuple[HeadLayout, Pooling]:
    """Return where a classifier keeps its head, and how hidden states become embeddings.

    Raises:
        NotUnderstood: its logits are computed in another way.
    """
    layout = _layout(probe.tail, probe.prefix)
    head = _head(layout, dict(probe.model.named_parameters()), probe.prefix)
    hidden = as_tokens(probe.hidden)
    for pooling, pool in POOLINGS.items():
        embedding = pool(hidden, token_weights(pooling, probe, hidden))
        if head.problems(embedding_width(embedding)):
            continue
        logits = head(embedding)
        if logits.shape == probe.logits.shape and torch.allclose(logits, probe.logits, atol=1e-5):
            return layout, pooling
    raise NotUnderstood(
        "its classifier reads neither the first token, nor the last, nor all or their mean, nor "
        "first token and mean side by side"
    )


def token_weights(pooling: Pooling, probe: Probe, hidden: Tensor) -> Tensor:
    """Return what a pooling weighs the tokens of the probe's inputs with, ``[B, T]``."""
    inputs = dict(zip(probe.input_names, probe.inputs, strict=True))
    if "attention_mask" not in inputs:
        return hidden.new_ones(hidden.shape[:2])
    mask = inputs["attention_mask"]
    if pooling == "last":
        mask = real_tokens(inputs["input_ids"], mask, probe.padding)
    return mask.to(hidden.dtype)


def _layout(tail: Sequence[Step], prefix: str) -> HeadLayout:
    """Name the layers of a head, and find the activation among them."""
    shown = ", ".join(f"{step.name} ({type(step.module).__name__})" for step in tail) or "nothing"
    refusal = f"between its last hidden state and its logits there is {shown}, not {_KINDS}"
    linear = [step for step in tail if isinstance(step.module, nn.Linear)]
    norms = [step for step in tail if isinstance(step.module, nn.LayerNorm)]
    if len(linear) not in (1, 2) or len(norms) > 1 or len(linear) + len(norms) != len(tail):
        raise NotUnderstood(refusal)
    *poolers, classifier = linear
    if [*poolers, *norms, classifier] != list(tail):
        raise NotUnderstood(refusal)
    parts = {"": classifier, "pooler_": poolers[0] if poolers else None}
    parts |= {"norm_": norms[0] if norms else None}
    names = {
        part: None if step is None else step.name.removeprefix(prefix)
        for part, step in parts.items()
    }
    norm = norms[0].module if norms else None
    return HeadLayout(
        classifier.name.removeprefix(prefix),
        names["pooler_"],
        _activation(poolers[0], tail[1]) if poolers else "tanh",
        names["norm_"],
        norm.eps if isinstance(norm, nn.LayerNorm) else 1e-5,
        frozenset(
            f"{part}bias"
            for part, step in parts.items()
            if step is not None and getattr(step.module, "bias", None) is None
        ),
    )


def _activation(pooler: Step, following: Step) -> Activation:
    for activation, function in ACTIVATIONS.items():
        if pooler.left.shape == following.entered.shape and torch.allclose(
            function(pooler.left), following.entered, atol=1e-6
        ):
            return activation
    raise NotUnderstood(
        f"between {pooler.name} and {following.name} there is none of {', '.join(ACTIVATIONS)}"
    )


def _head(layout: HeadLayout, parameters: Mapping[str, Tensor], prefix: str) -> TaskHead:
    """Return the probed classifier's own head."""
    tensors = {
        part: parameters[name if name in parameters else f"{prefix}{name}"]
        for part, name in layout.tensors.items()
    }
    return TaskHead.of_tensors(tensors, layout.activation, norm_epsilon=layout.norm_epsilon)
