"""A model's folder, opened once: its layout, weight files and settings."""

import json
import logging
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from epmq_deploy.checkpoints.adapter_settings import ADAPTER_CONFIG
from epmq_deploy.checkpoints.files import (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    read_json,
    read_json_if_there,
    setting_files,
)
from epmq_deploy.checkpoints.hub import fetch_snapshot, hub_id
from epmq_deploy.checkpoints.layouts import transformers
from epmq_deploy.checkpoints.layouts.adapter import AdapterLayout, adapter_folders
from epmq_deploy.checkpoints.layouts.base import Layout
from epmq_deploy.checkpoints.open_clip import OPEN_CLIP_CONFIG
from epmq_deploy.checkpoints.open_clip_weights import named_folder, split_named
from epmq_deploy.checkpoints.pickle_conversion import refuse_pickled, refuse_pickled_file
from epmq_deploy.checkpoints.quantized_weights import without_quantization
from epmq_deploy.checkpoints.tensors import stored_tensors
from epmq_deploy.checkpoints.weight_names import refuse_other_formats
from epmq_deploy.errors import RecipeError
from epmq_deploy.registry import Registry

log = logging.getLogger(__name__)

LAYOUTS: Registry[Layout] = Registry(
    "layout of model folders",
    "epmq_deploy.checkpoints.layouts",
    "LAYOUT",
    "epmq_deploy.checkpoint_layouts",
)


@dataclass(frozen=True)
class ModelFolder:
    """A local folder with a model or an adapter, read on demand and at most once.

    Attributes:
        path: of the folder.
        layout: says which files it has and what they mean.
    """

    path: Path
    layout: Layout

    @classmethod
    def open(cls, path_or_id: str, adapter: str | None = None) -> "ModelFolder":
        """Open a local folder, or one made from another name of a model.

        Args:
            path_or_id: a folder, or a file of the model in it; a hub id, of which safetensors and
                settings are fetched, with ``@revision`` where it is not the main branch; or
                ``open_clip:NAME=PATH``.
            adapter: name of one of several adapters in the folder.

        Raises:
            RecipeError: it is none of these, or the hub does not deliver it; names the conversion
                for pickled weights. Or it is not clear which adapter is meant.
        """
        given = Path(path_or_id)
        if given.is_file():
            return cls._of_file(given).choosing(adapter)
        return cls.at(_local_folder(path_or_id)).choosing(adapter)

    @classmethod
    def _of_file(cls, file: Path) -> "ModelFolder":
        """Open the folder of a file that belongs to a model."""
        refuse_pickled_file(file, "the folder")
        refuse_other_formats(file)
        folder = cls.at(file.parent)
        files = folder.layout.weight_files(folder.path)
        if file in files or (files and file.suffix == ".json"):
            return folder
        held = (
            f"it holds {', '.join(other.name for other in files[:3])}" if files else "it has none"
        )
        raise RecipeError(
            f"{file}: not a file of the model in its folder ({held}); give a model folder, or keep "
            f"the file in a folder of its own, with {CONFIG_FILE}"
        )

    @classmethod
    def at(cls, path: Path) -> "ModelFolder":
        """Open a local folder; where no other layout recognises it, that of ``transformers``."""
        default = transformers.LAYOUT
        others = (layout for layout in LAYOUTS.values() if layout is not default)
        return cls(path, next((layout for layout in others if layout.recognises(path)), default))

    def choosing(self, adapter: str | None) -> "ModelFolder":
        """Return the folder of one of the adapters in this one; ``peft`` nests all but the first.

        Without a name, what the folder itself holds, or the only adapter in it.

        Raises:
            RecipeError: there is no adapter of that name, or none is named where there are several.
        """
        nested = adapter_folders(self.path)
        if adapter in nested:
            return ModelFolder.at(nested[adapter])
        if adapter is not None:
            if isinstance(self.layout, AdapterLayout):
                return ModelFolder(self.path, AdapterLayout(adapter))
            known = f"it holds {', '.join(nested)}" if nested else "it holds none"
            raise RecipeError(f"{self.path}: no adapter {adapter}; {known}")
        if not nested or self.layout.weight_files(self.path):
            return self
        if len(nested) > 1:
            raise RecipeError(
                f"{self.path}: holds several adapters; choose one with adapter: {', '.join(nested)}"
            )
        (folder,) = nested.values()
        log.info("%s: its only adapter is used, %s", self.path, folder.name)
        return ModelFolder.at(folder)

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files.

        Raises:
            RecipeError: there are none, or shards are missing; names the conversion for pickled
                weights.
        """
        files = self.layout.weight_files(self.path)
        if not files:
            refuse_pickled(self.path)
            refuse_other_formats(self.path)
            raise RecipeError(f"{self.path}: {self.layout.without_weights}")
        return files

    @cached_property
    def stored_names(self) -> tuple[str, ...]:
        """The names of all tensors in the weight files.

        Raises:
            RecipeError: as ``weight_files``, or a file cannot be read.
        """
        return tuple(stored_tensors(self.weight_files))

    def check_base(self) -> None:
        """Make sure that the folder holds the weights of a whole model.

        Raises:
            RecipeError: it does not.
        """
        if not self.layout.is_whole_model:
            raise RecipeError(f"{self.path}: an adapter, where a whole model is needed")
        _ = self.weight_files

    def check_expert(self) -> None:
        """Make sure that the folder holds either a whole model or an adapter.

        Raises:
            RecipeError: it holds neither or both.
        """
        files = self.weight_files
        if self.layout.is_whole_model and (self.path / ADAPTER_CONFIG).is_file():
            raise RecipeError(
                f"{self.path}: holds both an adapter ({ADAPTER_CONFIG}) and a whole model "
                f"({files[0].name}); move one of them elsewhere"
            )

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The content of ``config.json``, or its equivalent for ``transformers``; None without one.

        Raises:
            RecipeError: it is not a JSON object, or describes an unsupported model.
        """
        return self.layout.config(self.path)

    @property
    def settings(self) -> dict[str, Any]:
        """What is said of the model: its config, or that of an adapter; empty without either.

        Raises:
            RecipeError: see ``config``.
        """
        if self.config is None and (self.path / ADAPTER_CONFIG).is_file():
            return read_json(self.path / ADAPTER_CONFIG)
        return self.config or {}

    @cached_property
    def preprocessor_config(self) -> dict[str, Any] | None:
        """As ``config``, of ``preprocessor_config.json``, whichever file has its settings."""
        return self.layout.preprocessor_config(self.path)

    @property
    def declared_base(self) -> str | None:
        """The base that an adapter says it was made for; None for whole models."""
        return self.layout.declared_base(self.path)

    @property
    def setting_files(self) -> tuple[Path, ...]:
        """Everything next to the weights: config, tokenizer, processor."""
        return setting_files(self.path)

    def copy_settings(self, target: Path) -> None:
        """Copy config, tokenizer and processor files, in the layout of ``transformers``.

        The config is that of dense weights, whatever these were read from.

        Args:
            target: existing folder.
        """
        for file in self.setting_files:
            if file.name != OPEN_CLIP_CONFIG:
                shutil.copyfile(file, target / file.name)
        if self.layout.translates_settings:
            _write_json(target / CONFIG_FILE, self.config)
        # Other programs read the image processor's settings from a file of their own.
        image_settings = self.preprocessor_config
        if image_settings != read_json_if_there(target / PREPROCESSOR_FILE):
            _write_json(target / PREPROCESSOR_FILE, image_settings)
        dense = without_quantization(self.config or {})
        if dense != (self.config or {}):
            _write_json(target / CONFIG_FILE, dense)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _local_folder(path_or_id: str) -> Path:
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    named = split_named(path_or_id)
    if named is not None:
        return named_folder(named[0], Path(named[1]))
    repository = hub_id(path_or_id)
    if repository is None:
        raise RecipeError(f"{path_or_id}: no such folder")
    return fetch_snapshot(repository)
