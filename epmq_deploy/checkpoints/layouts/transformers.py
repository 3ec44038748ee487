"""The layout of ``transformers``: safetensors, single or sharded, and JSON settings."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import torch

from epmq_deploy.checkpoints.files import INDEX_FILE, SINGLE_FILE
from epmq_deploy.checkpoints.layouts.base import Layout
from epmq_deploy.checkpoints.quantized_weights import dequantized, refuse_quantized
from epmq_deploy.checkpoints.tensors import (
    Rename,
    TensorInfo,
    canonical_tensors,
    same_values,
    stored_tensors,
)
from epmq_deploy.checkpoints.weight_names import has_usual_names, weight_files
from epmq_deploy.errors import RecipeError


class TransformersLayout(Layout):
    """Safetensors as ``save_pretrained`` writes them."""

    name = "transformers"
    without_weights = f"no {SINGLE_FILE} and no {INDEX_FILE}"

    def recognises(self, folder: Path) -> bool:
        """Recognise a file with all weights, or an index of shards."""
        return has_usual_names(folder)

    def weight_files(self, folder: Path) -> tuple[Path, ...]:
        """List the one file, or all shards."""
        return weight_files(folder)

    def tensors(
        self,
        folder: Path,
        rename: Rename,
        tied: Mapping[str, str],
        base: Mapping[str, TensorInfo],
        is_head: Callable[[str], bool],
    ) -> dict[str, TensorInfo]:
        """List the stored tensors: of tied ones a single copy, or both where the base has both."""
        stored = stored_tensors(self.weight_files(folder))
        config = self.config(folder) or {}
        _refuse_other_states(folder, stored)
        refuse_quantized(folder, config, stored)
        dense = dequantized(folder, config, stored, partial(_dtype_in_base, base, rename))
        tensors = canonical_tensors(dense, rename, folder)
        for copy, original in tied.items():
            if copy in tensors and original in tensors:
                if same_values(tensors[copy], tensors[original]):
                    del tensors[copy]
            elif copy in tensors:
                tensors[original] = tensors.pop(copy)
            elif original in tensors and copy in base and self._ties_embeddings(folder):
                tensors[copy] = tensors[original]
        return tensors

    def _ties_embeddings(self, folder: Path) -> bool:
        """Tell whether the config says that embedding and output layer are one."""
        return (self.config(folder) or {}).get("tie_word_embeddings") is True


def _refuse_other_states(folder: Path, names: Collection[str]) -> None:
    """Refuse tensors that are not those of a model, or of one in another order."""
    if any(name.endswith("layers.0.attention.wq.weight") for name in names):
        # Llama and Mistral: rotary attention takes the rows of queries and keys in another order.
        raise RecipeError(
            f"{folder}: in its authors' layout (layers.0.attention.wq), not in that of "
            "transformers; give the release for transformers, or convert it with transformers' "
            "script for this model"
        )
    if any(".base_layer." in name for name in names):
        raise RecipeError(
            f"{folder}: a model with an adapter that is not merged into it (names with "
            "base_layer); save the adapter alone, with its adapter_config.json, or the model after "
            "peft's merge_and_unload"
        )


def _dtype_in_base(
    base: Mapping[str, TensorInfo], rename: Rename, stored: str
) -> torch.dtype | None:
    """Return the dtype of the base's tensor; None where it has none."""
    names = rename(stored)
    info = base.get(names if isinstance(names, str) else names[0])
    return None if info is None else info.dtype


LAYOUT = TransformersLayout()
