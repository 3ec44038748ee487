"""A task's head: from the deployed backbone's embedding to logits."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epmq_deploy.models.problem_types import SINGLE_LABEL, TOKEN
from epmq_deploy.recipe import ProblemType

Activation = Literal["tanh", "relu", "gelu", "gelu_tanh", "silu"]
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
assert set(ACTIVATIONS) == set(get_args(Activation))


def embedding_width(embedding: Tensor) -> int:
    """Return ``D`` of embeddings ``[B, D]``, or of tokens with their shares ``[B, T, D + 1]``."""
    return embedding.shape[-1] - (embedding.dim() == 3)


class TaskHead(nn.Module):
    """Maps embeddings ``[B, D]`` to logits ``[B, C]``, float32; of words, ``[B, T, D]`` likewise.

    Where a model classifies every token and takes the mean of that, as EuroBERT does, its embedding
    is all tokens, each with its share in the mean after its hidden state: ``[B, T, D + 1]``.

    A linear classifier, after a pooler (linear layer and activation) where the model was fine-tuned
    with one, as BERT is (Devlin et al., arXiv 1810.04805), and after a LayerNorm where it has one,
    as ModernBERT and BEiT do.

    Args:
        weight: ``[C, D]``, or ``[C, P]`` after a pooler of width ``P``.
        bias: ``[C]``.
        pooler_weight: ``[P, D]``.
        pooler_bias: ``[P]``, with ``pooler_weight``.
        activation: after the pooler: ``tanh`` (BERT, RoBERTa), ``relu`` (DistilBERT), ``gelu``
            (ModernBERT) and others.
        problem_type: what the logits mean.
        norm_weight: gain of the norm right before the classifier, ``[D]``, or ``[P]`` after a
            pooler.
        norm_bias: of that norm, with ``norm_weight``; may be left out.
        norm_epsilon: of that norm.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        pooler_weight: Tensor | None = None,
        pooler_bias: Tensor | None = None,
        activation: Activation = "tanh",
        problem_type: ProblemType = SINGLE_LABEL,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        norm_epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.problem_type: ProblemType = problem_type
        self.norm_epsilon = norm_epsilon
        self.weight = _frozen(weight)
        self.bias = None if bias is None else _frozen(bias)
        self.pooler_weight = None if pooler_weight is None else _frozen(pooler_weight)
        self.pooler_bias = None if pooler_bias is None else _frozen(pooler_bias)
        self.norm_weight = None if norm_weight is None else _frozen(norm_weight)
        self.norm_bias = None if norm_bias is None else _frozen(norm_bias)

    @classmethod
    def of_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        activation: Activation = "tanh",
        problem_type: ProblemType = SINGLE_LABEL,
        norm_epsilon: float = 1e-5,
    ) -> "TaskHead":
        """Return the head whose ``state_dict`` is ``tensors``."""
        return cls(
            **tensors,
            activation=activation,
            problem_type=problem_type,
            norm_epsilon=norm_epsilon,
        )

    @property
    def classes(self) -> int:
        """Return ``C``, the number of classes."""
        return self.weight.shape[0]

    def forward(self, embedding: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of embeddings ``[B, D]`` or ``[B, T, D + 1]``.

        Of words, ``[..., C]`` of hidden states ``[..., D]``.
        """
        if embedding.dim() == 3 and self.problem_type != TOKEN:
            tokens, shares = embedding[..., :-1], embedding[..., -1:]
            return (self._logits(tokens) * shares).sum(dim=1)
        return self._logits(embedding)

    def classifier_inputs(self, embedding: Tensor) -> Tensor:
        """Return what the classifier itself takes of embeddings, ``[m, P]``.

        Where its logits are averaged over tokens, what it takes is averaged, which is the same.
        """
        if embedding.dim() == 3 and self.problem_type != TOKEN:
            tokens, shares = embedding[..., :-1], embedding[..., -1:]
            return (self._before_classifier(tokens) * shares).sum(dim=1)
        return self._before_classifier(embedding)

    def _logits(self, embedding: Tensor) -> Tensor:
        logits = self._before_classifier(embedding) @ self.weight.T
        return logits if self.bias is None else logits + self.bias

    def _before_classifier(self, embedding: Tensor) -> Tensor:
        if self.pooler_weight is not None:
            embedding = embedding @ self.pooler_weight.T
            if self.pooler_bias is not None:
                embedding = embedding + self.pooler_bias
            embedding = ACTIVATIONS[self.activation](embedding)
        if self.norm_weight is not None:
            width = self.norm_weight.shape
            embedding = F.layer_norm(
                embedding, width, self.norm_weight, self.norm_bias, self.norm_epsilon
            )
        return embedding

    def problems(self, features: int) -> list[str]:
        """Say why the head is not usable for embeddings of width ``features``; empty if it is."""
        found = []
        width = features
        if self.pooler_weight is not None:
            shape = self.pooler_weight.shape
            if len(shape) != 2 or shape[1] != features:
                return [f"pooler of shape {list(shape)}, expected [width, {features}]"]
            width = shape[0]
            if self.pooler_bias is not None and self.pooler_bias.shape != (width,):
                found.append(f"pooler bias of shape {list(self.pooler_bias.shape)}")
        for name, tensor in (("norm", self.norm_weight), ("norm bias", self.norm_bias)):
            if tensor is not None and tensor.shape != (width,):
                found.append(f"{name} of shape {list(tensor.shape)}, expected [{width}]")
        if self.weight.dim() != 2 or self.weight.shape[1] != width:
            return [f"head of shape {list(self.weight.shape)}, expected [classes, {width}]"]
        if self.bias is not None and self.bias.shape != (self.classes,):
            found.append(f"head bias of shape {list(self.bias.shape)}, expected [{self.classes}]")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.parameters()):
            found.append("the head holds NaN or infinite values")
        return found

    def has_equal_rows(self) -> bool:
        """Whether two classes always have the same logit."""
        rows: Tensor = self.weight
        if self.bias is not None:
            rows = torch.cat([rows, self.bias[:, None]], dim=1)
        return len(torch.unique(rows, dim=0)) < len(rows)


def _frozen(tensor: Tensor) -> nn.Parameter:
    # A copy: gradients do not flow through tensors that were made in inference mode.
    copied = tensor.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copied, requires_grad=False)
