"""The layout of ``transformers``: safetensors, single or sharded, and JSON settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from epmq_deploy.checkpoints.files import INDEX_FILE, SINGLE_FILE
from epmq_deploy.checkpoints.layouts.base import Layout
from epmq_deploy.checkpoints.tensors import Rename, TensorInfo, same_values, stored_tensors
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
    ) -> dict[str, TensorInfo]:
        """List the stored tensors: of tied ones a single copy, or both where the base has both."""
        files = self.weight_files(folder)
        _refuse_first_releases(files)
        tensors: dict[str, TensorInfo] = {**stored_tensors(files, rename)}
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


def _refuse_first_releases(files: Sequence[Path]) -> None:
    """Refuse Llama and Mistral as their authors lay them out: attention is ordered otherwise."""
    names = stored_tensors(files)
    if any(name.endswith("layers.0.attention.wq.weight") for name in names):
        raise RecipeError(
            f"{files[0]}: in its authors' layout (layers.0.attention.wq), not in that of "
            "transformers; give the release for transformers, or convert it with transformers' "
            "script for this model"
        )


LAYOUT = TransformersLayout()
