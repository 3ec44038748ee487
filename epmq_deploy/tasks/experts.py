"""Running experts in torch: one backbone that takes on each expert's weights in turn."""

import torch
from torch import nn

from epmq_deploy.merging.merge import open_experts
from epmq_deploy.models import ModelFamily, family_of
from epmq_deploy.recipe import Recipe


class ExpertBackbone:
    """One backbone in memory that becomes any expert of the recipe.

    Tensors that experts do not hold (a projection, say) are the base's.

    Args:
        recipe: names base and experts.
        device: where to run.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._opened = open_experts(recipe)
        self.family: ModelFamily = family_of(self._opened.base.folder)
        self.device = device
        self._model = self.family.load(self._opened.base.folder).to(device)

    def become(self, task: str) -> nn.Module:
        """The backbone with the weights of ``task``'s expert, until the next call."""
        expert = self._opened.experts[task]
        for name, parameter in self._model.named_parameters():
            if name in expert.tensors:
                parameter.data.copy_(expert.load(name))
        return self._model
