"""The layout of ``open_clip``: one safetensors file and ``open_clip_config.json``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from epmq_deploy.checkpoints.adapter_settings import ADAPTER_CONFIG
from epmq_deploy.checkpoints.files import check_sizes, read_json, usable_settings
from epmq_deploy.checkpoints.layouts import transformers
from epmq_deploy.checkpoints.layouts.base import Layout
from epmq_deploy.checkpoints.open_clip import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_FILES,
    clip_config,
    open_clip_tensors,
    processor_config,
)
from epmq_deploy.checkpoints.tensors import Rename, TensorInfo


class OpenClipLayout(Layout):
    """An ``open_clip`` model, read as the CLIP of ``transformers``."""

    name = "open_clip"
    translates_settings = True
    without_weights = f"{OPEN_CLIP_CONFIG}, but no {' or '.join(OPEN_CLIP_FILES)}"

    def recognises(self, folder: Path) -> bool:
        """Recognise a config of ``open_clip`` without weights of ``transformers``."""
        # Many folders hold the model for both libraries; those are read as transformers' own.
        if not (folder / OPEN_CLIP_CONFIG).is_file() or transformers.LAYOUT.recognises(folder):
            return False
        return bool(self.weight_files(folder)) or not (folder / ADAPTER_CONFIG).is_file()

    def weight_files(self, folder: Path) -> tuple[Path, ...]:
        """List the one file, under either of the names ``open_clip`` gives it."""
        return tuple(folder / name for name in OPEN_CLIP_FILES if (folder / name).is_file())[:1]

    def tensors(
        self,
        folder: Path,
        rename: Rename,
        tied: Mapping[str, str],
        base: Mapping[str, TensorInfo],
        is_head: Callable[[str], bool],
    ) -> dict[str, TensorInfo]:
        """List the stored tensors by the names ``transformers`` has for them, then renamed."""
        return open_clip_tensors(self.weight_files(folder)[0], rename)

    def config(self, folder: Path) -> dict[str, Any]:
        """Translate ``open_clip_config.json`` to the ``config.json`` of a CLIP."""
        file = folder / OPEN_CLIP_CONFIG
        content = read_json(file)
        with usable_settings(folder, OPEN_CLIP_CONFIG):
            config = clip_config(content, file)
        check_sizes(config, file)
        return config

    def preprocessor_config(self, folder: Path) -> dict[str, Any]:
        """Translate the preprocessing in ``open_clip_config.json``."""
        file = folder / OPEN_CLIP_CONFIG
        content = read_json(file)
        with usable_settings(folder, OPEN_CLIP_CONFIG):
            return processor_config(content, file)


LAYOUT = OpenClipLayout()
