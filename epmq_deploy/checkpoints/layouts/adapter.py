"""The layout of ``peft``: a LoRA adapter, which is read as the base model with it applied."""

from collections.abc import Mapping
from pathlib import Path

from epmq_deploy.checkpoints.files import read_json
from epmq_deploy.checkpoints.layouts import open_clip, transformers
from epmq_deploy.checkpoints.layouts.base import Layout
from epmq_deploy.checkpoints.lora import ADAPTER_CONFIG, ADAPTER_FILE, adapted_tensors
from epmq_deploy.checkpoints.tensors import Rename, TensorInfo


class AdapterLayout(Layout):
    """An adapter as ``peft`` saves it."""

    name = "adapter"
    is_whole_model = False
    without_weights = f"no {ADAPTER_FILE} next to {ADAPTER_CONFIG}"

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
    ) -> dict[str, TensorInfo]:
        """List all tensors of the base, those the adapter changes as computed ones."""
        config = read_json(folder / ADAPTER_CONFIG)
        return adapted_tensors(folder, config, base, rename)


LAYOUT = AdapterLayout()
