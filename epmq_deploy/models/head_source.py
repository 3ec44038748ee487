"""Where a model family takes the heads of its tasks from."""

from abc import ABC
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.head import TaskHead


class HeadSource(ABC):
    """Heads from experts' checkpoints, or from class names.

    Attributes:
        name: of the family, for messages.
        experts_carry_heads: whether a task without ``head`` in the recipe takes its expert's.
        reads_tokens: whether heads may read all tokens, to label words or embed texts.
        merges_text_tower: whether heads from class names differ between the merged model and its
            experts.
    """

    name: str
    experts_carry_heads: bool = False
    reads_tokens: bool = False
    merges_text_tower: bool = False

    def expert_head(self, expert: Checkpoint) -> TaskHead | None:
        """Read the head that an expert's checkpoint holds; None where it holds none.

        Args:
            expert: opened with ``canonical_key``.

        Raises:
            RecipeError: a part of it is missing.
        """
        return None

    def expert_word_head(self, expert: Checkpoint) -> TaskHead | None:
        """Read the head of an expert that labels words; None where it holds none.

        Args:
            expert: opened with ``canonical_key``.

        Raises:
            RecipeError: a part of it is missing.
        """
        return None

    def zero_shot_head(
        self,
        folder: Path,
        classes: Sequence[str],
        templates: Sequence[str],
        device: torch.device,
        expert: Checkpoint | None = None,
    ) -> Tensor:
        """Compute a head ``[C, D]``, on the CPU, from class names and prompt templates.

        Args:
            folder: the model's.
            classes: their names.
            templates: of prompts; ``{}`` is replaced by the name.
            device: where to run.
            expert: whose text tower to use, None for the model's.

        Raises:
            RecipeError: the family has no text tower to compute a head with.
        """
        raise RecipeError(
            f"the {self.name} family has no head for class names; leave out head to take the "
            "expert's classifier, or give a matrix"
        )
