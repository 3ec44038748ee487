"""The layout of ``peft``: an adapter, which is read as the base model with it applied."""

from collections.abc import Callable, Mapping
from pathlib import Path

from epmq_deploy.checkpoints.adapter_settings import ADAPTER_CONFIG, ADAPTER_FILE
from epmq_deploy.checkpoints.adapters import adapted_tensors
from epmq_deploy.checkpoints.files import read_json
from epmq_deploy.checkpoints.layouts import open_clip, transformers
from epmq_deploy.checkpoints.layouts.base import Layout
from epmq_deploy.checkpoints.tensors import Rename, TensorInfo


class AdapterLayout(Layout):
    """An adapter as ``peft`` saves it.

    Args:
        chosen: name of the adapter that is taken where the file holds several.
    """

    name = "adapter"
    is_whole_model = False
    without_weights = f"no {ADAPTER_FILE} next to {ADAPTER_CONFIG}"

    def __init__(self, chosen: str | None = None) -> None:
        self._chosen = chosen

    def recognises(self, folder: Path) -> bool:
        """Recognise a config of ``peft`` without a whole model next to it."""
        whole = transformers.LAYOUT.recognises(folder) or open_clip.LAYOUT.recognises(folder)
        return (folder / ADAPTER_CONFIG).is_file() and not whole

    def weight_files(self, folder: Path) -> tuple[Path, ...]:
        """List the adapter's one file."""
        file = folder / ADAPTER_FILE
        return (file,) if file.is_file() else ()

    def tensors(
        self,
        folder: Path,
        rename: Rename,
        tied: Mapping[str, str],
        base: Mapping[str, TensorInfo],
        is_head: Callable[[str], bool],
    ) -> dict[str, TensorInfo]:
        """List all tensors of the base, those the adapter changes as computed ones."""
        return adapted_tensors(folder, base, rename, tied, is_head, self._chosen)

    def declared_base(self, folder: Path) -> str | None:
        """Return what ``peft`` was given as the base."""
        declared = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        return declared if isinstance(declared, str) and declared else None


def adapter_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of adapters within a folder, by the name ``peft`` gave them."""
    return {file.parent.name: file.parent for file in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))}


LAYOUT = AdapterLayout()
