"""The head of a task that embeds texts: from pooled hidden states to embeddings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from epmq_deploy.models.head import ACTIVATIONS, Activation, TaskHead
from epmq_deploy.models.pooling import EmbeddingSettings
from epmq_deploy.models.problem_types import EMBEDDING


@dataclass(frozen=True)
class DenseLayer:
    """A linear layer, and what follows it.

    Attributes:
        weight: ``[E, D]``.
        bias: ``[E]``.
        activation: after it; None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: Activation | None = None


class EmbeddingHead(TaskHead):
    """Maps pooled states ``[B, D]`` to embeddings ``[B, E]``, by dense layers where there are any.

    Args:
        settings: how states are pooled, and whether embeddings get the length 1.
        dense: layers, in the order they are applied.
    """

    def __init__(self, settings: EmbeddingSettings, dense: Sequence[DenseLayer] = ()) -> None:
        nn.Module.__init__(self)
        self.settings, self.problem_type = settings, EMBEDDING
        self.activations = [layer.activation for layer in dense]
        self.weights = nn.ParameterList(_parameter(layer.weight) for layer in dense)
        self.biases = nn.ParameterList(_parameter(_bias(layer)) for layer in dense)

    @classmethod
    def stored(cls, tensors: Mapping[str, Tensor], text: str) -> "EmbeddingHead":
        """Return the head whose ``state_dict`` and ``as_text`` these are."""
        content = json.loads(text)
        settings = content["settings"] | {"pooling": tuple(content["settings"]["pooling"])}
        dense = [
            DenseLayer(tensors[f"weights.{number}"], tensors[f"biases.{number}"], activation)
            for number, activation in enumerate(content["activations"])
        ]
        return cls(EmbeddingSettings(**settings), dense)

    def as_text(self) -> str:
        """Return all but the tensors."""
        return json.dumps({"settings": asdict(self.settings), "activations": self.activations})

    @property
    def classes(self) -> int:
        """Return 0: embeddings have no classes."""
        return 0

    def forward(self, embedding: Tensor) -> Tensor:
        """Return embeddings ``[B, E]`` of pooled states ``[B, D]``."""
        for weight, bias, activation in zip(
            self.weights, self.biases, self.activations, strict=True
        ):
            embedding = F.linear(embedding, weight, bias)
            if activation is not None:
                embedding = ACTIVATIONS[activation](embedding)
        return F.normalize(embedding, dim=-1) if self.settings.normalize else embedding

    def problems(self, features: int) -> list[str]:
        """Say why a dense layer does not take what it gets; empty if all do."""
        width = features * len(self.settings.pooling)
        for weight in self.weights:
            if weight.shape[1:] != (width,):
                return [f"dense layer of shape {list(weight.shape)}, expected [..., {width}]"]
            width = len(weight)
        return []

    def has_equal_rows(self) -> bool:
        """Embeddings have no classes that could not be told apart."""
        return False


def _bias(layer: DenseLayer) -> Tensor:
    """Return a layer's bias; zeros where it has none."""
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().float().clone(), False)
