"""What a layout is: which files a model folder has, and what they mean."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from epmq_deploy.checkpoints.files import (
    CONFIG_FILE,
    IMAGE_SECTION,
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    check_sizes,
    read_json_if_there,
)
from epmq_deploy.checkpoints.tensors import Rename, TensorInfo


class Layout(ABC):
    """Reads model folders of one kind.

    Attributes:
        name: of the layout.
        is_whole_model: False where the folder holds changes to a base model.
        translates_settings: whether config and preprocessor settings are derived from another
            library's file, so that ``transformers`` cannot read them from the folder.
        without_weights: what to say of a folder that lacks the weight files.
    """

    name: ClassVar[str]
    is_whole_model: ClassVar[bool] = True
    translates_settings: ClassVar[bool] = False
    without_weights: ClassVar[str]

    @abstractmethod
    def recognises(self, folder: Path) -> bool:
        """Tell whether a folder has this layout; all others are asked before ``transformers``."""

    @abstractmethod
    def weight_files(self, folder: Path) -> tuple[Path, ...]:
        """List the safetensors files of a folder; none where there are none.

        Raises:
            RecipeError: some are missing.
        """

    @abstractmethod
    def tensors(
        self,
        folder: Path,
        rename: Rename,
        tied: Mapping[str, str],
        base: Mapping[str, TensorInfo],
        is_head: Callable[[str], bool],
    ) -> dict[str, TensorInfo]:
        """List the tensors of a folder that has its weight files, by canonical name.

        Args:
            folder: with weight files.
            rename: the name ``transformers`` stores a tensor under, to the canonical one.
            tied: canonical names of tensors that may be copies of others, to those of the others;
                copies are left out.
            base: tensors of the base model, which an adapter changes; whole models ignore them.
            is_head: whether a canonical name belongs to a task's head.

        Raises:
            RecipeError: a file cannot be read, or holds something this layout does not support.
            MismatchError: the tensors do not belong to such a model, or do not fit the base.
        """

    def declared_base(self, folder: Path) -> str | None:
        """Return path or hub id of the base that an adapter was made for, as it says; else None."""
        return None

    def config(self, folder: Path) -> dict[str, Any] | None:
        """Return the content of ``config.json``; None without one.

        Raises:
            RecipeError: it is not a JSON object, or describes an unsupported model.
        """
        file = folder / CONFIG_FILE
        config = read_json_if_there(file)
        if config is not None:
            check_sizes(config, file)
        return config

    def preprocessor_config(self, folder: Path) -> dict[str, Any] | None:
        """Return the settings of the image processor; None without any.

        Those in ``processor_config.json`` come before those in ``preprocessor_config.json``, as in
        ``transformers``.

        Raises:
            RecipeError: a file is not a JSON object, or describes unsupported preprocessing.
        """
        together = read_json_if_there(folder / PROCESSOR_FILE) or {}
        nested = together.get(IMAGE_SECTION)
        if isinstance(nested, dict):
            return nested
        return read_json_if_there(folder / PREPROCESSOR_FILE)
