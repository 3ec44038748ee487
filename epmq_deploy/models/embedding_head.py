"""The head of a task that embeds texts: from pooled hidden states to embeddings."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor, nn
from torch.nn import functional as F

from epmq_deploy.models.head import ACTIVATIONS, Activation, TaskHead
from epmq_deploy.models.pooling import EmbeddingSettings
from epmq_deploy.models.problem_types import EMBEDDING


class EmbeddingHead(TaskHead):
    """Maps pooled states ``[B, D]`` to embeddings ``[B, E]``: a dense layer where there is one.

    Args:
        settings: how states are pooled, and whether embeddings get the length 1.
        dense_weight: of a linear layer, ``[E, D]``.
        dense_bias: ``[E]``, with ``dense_weight``.
        activation: after that layer; None for none.
    """

    def __init__(
        self,
        settings: EmbeddingSettings,
        dense_weight: Tensor | None = None,
        dense_bias: Tensor | None = None,
        activation: Activation | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.settings, self.problem_type = settings, EMBEDDING
        self.dense_activation = activation
        self.dense_weight = _parameter(dense_weight)
        self.dense_bias = _parameter(dense_bias)

    @classmethod
    def stored(cls, tensors: Mapping[str, Tensor], text: str) -> "EmbeddingHead":
        """Return the head whose ``state_dict`` and ``as_text`` these are."""
        content = json.loads(text)
        settings = content["settings"] | {"pooling": tuple(content["settings"]["pooling"])}
        return cls(EmbeddingSettings(**settings), **tensors, activation=content["activation"])

    def as_text(self) -> str:
        """Return all but the tensors."""
        return json.dumps({"settings": asdict(self.settings), "activation": self.dense_activation})

    @property
    def classes(self) -> int:
        """Return 0: embeddings have no classes."""
        return 0

    def forward(self, embedding: Tensor) -> Tensor:
        """Return embeddings ``[B, E]`` of pooled states ``[B, D]``."""
        if self.dense_weight is not None:
            embedding = F.linear(embedding, self.dense_weight, self.dense_bias)
            if self.dense_activation is not None:
                embedding = ACTIVATIONS[self.dense_activation](embedding)
        return F.normalize(embedding, dim=-1) if self.settings.normalize else embedding

    def problems(self, features: int) -> list[str]:
        """Say why the dense layer does not take what is pooled; empty if it does."""
        width = features * len(self.settings.pooling)
        if self.dense_weight is None or self.dense_weight.shape[1:] == (width,):
            return []
        return [f"dense layer of shape {list(self.dense_weight.shape)}, expected [..., {width}]"]

    def has_equal_rows(self) -> bool:
        """Embeddings have no classes that could not be told apart."""
        return False


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach().float().clone(), False)
