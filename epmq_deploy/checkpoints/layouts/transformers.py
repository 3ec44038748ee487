"""The layout of ``transformers``: safetensors, single or sharded, and JSON settings."""

import json
from collections.abc import Mapping
from pathlib import Path

from epmq_deploy.checkpoints.files import INDEX_FILE, SINGLE_FILE
from epmq_deploy.checkpoints.layouts.base import Layout
from epmq_deploy.checkpoints.tensors import Rename, TensorInfo, same_values, stored_tensors
from epmq_deploy.errors import RecipeError


class TransformersLayout(Layout):
    """Safetensors as ``save_pretrained`` writes them."""

    name = "transformers"
    without_weights = f"no {SINGLE_FILE} and no {INDEX_FILE}"

    def recognises(self, folder: Path) -> bool:
        """Recognise a file with all weights, or an index of shards."""
        return any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))

    def weight_files(self, folder: Path) -> tuple[Path, ...]:
        """List the one file, or the shards the index names."""
        if (folder / SINGLE_FILE).is_file():
            return (folder / SINGLE_FILE,)
        index = folder / INDEX_FILE
        if not index.is_file():
            return ()
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"{index}: not an index of safetensors shards") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise RecipeError(f"{folder}: shards missing: {', '.join(missing)}")
        return tuple(folder / name for name in names)

    def tensors(
        self,
        folder: Path,
        rename: Rename,
        tied: Mapping[str, str],
        base: Mapping[str, TensorInfo],
    ) -> dict[str, TensorInfo]:
        """List the stored tensors: of tied ones a single copy, or both where the base has both."""
        tensors: dict[str, TensorInfo] = {**stored_tensors(self.weight_files(folder), rename)}
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


LAYOUT = TransformersLayout()
