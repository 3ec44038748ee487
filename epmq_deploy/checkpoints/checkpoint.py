"""The tensors of one model by canonical name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.checkpoints.tensors import Rename, TensorInfo
from epmq_deploy.checkpoints.wrappers import unwrapped


def _nothing(name: str) -> bool:
    return False


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model by canonical name; nothing is read until asked for.

    Attributes:
        source: the model folder.
        tensors: canonical name to tensor.
    """

    source: ModelFolder
    tensors: Mapping[str, TensorInfo]

    @property
    def folder(self) -> Path:
        """Path of the model folder."""
        return self.source.path

    @classmethod
    def open(
        cls,
        source: ModelFolder,
        rename: Rename = lambda key: key,
        tied: Mapping[str, str] = MappingProxyType({}),
        is_known: Callable[[str], bool] | None = None,
    ) -> "Checkpoint":
        """List the tensors of a whole model.

        Args:
            source: the model folder.
            rename: the name ``transformers`` stores a tensor under, to the canonical one.
            tied: canonical names of tensors that may be copies of others, to those of the others;
                copies are left out.
            is_known: whether such a model has a tensor of a canonical name; prefixes that wrappers
                left in stored names are recognised by it.

        Raises:
            RecipeError: the folder holds no safetensors, or a file of it cannot be read.
            MismatchError: it holds tensors that a model of its layout does not have.
        """
        source.check_base()
        if is_known is not None:
            rename = unwrapped(source.stored_names, rename, is_known, source.path)
        return cls(
            source, source.layout.tensors(source.path, rename, tied, {}, is_known or _nothing)
        )

    @classmethod
    def open_expert(
        cls,
        source: ModelFolder,
        base: "Checkpoint",
        rename: Rename,
        tied: Mapping[str, str] = MappingProxyType({}),
        is_head: Callable[[str], bool] = _nothing,
    ) -> "Checkpoint":
        """List an expert's tensors: those it stores, or the base's with its adapter applied.

        Args:
            source: folder of a whole model or an adapter.
            base: the model an adapter is applied to.
            rename: as for ``open``.
            tied: as for ``open``.
            is_head: whether a canonical name belongs to a task's head.

        Raises:
            RecipeError: the folder holds no safetensors, or an unsupported kind of adapter.
            MismatchError: the adapter does not fit the base.
        """
        source.check_expert()
        if source.layout.is_whole_model:
            rename = unwrapped(
                source.stored_names,
                rename,
                lambda name: name in base.tensors or is_head(name),
                source.path,
            )
        return cls(source, source.layout.tensors(source.path, rename, tied, base.tensors, is_head))

    def load(self, name: str) -> Tensor:
        """Read one tensor, in its stored dtype, CPU."""
        return self.tensors[name].load()

    def load_into(self, name: str, target: Tensor) -> None:
        """Overwrite ``target`` with one tensor, converted to its dtype and device."""
        info = self.tensors[name]
        if target.dtype != info.dtype or not target.is_contiguous() or target.device.type != "cpu":
            target.copy_(info.load())
        else:
            info.read_into(target)
