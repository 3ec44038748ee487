"""Where tiny models and their data are."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class TinyFolder:
    """A folder with a base, experts, data and a recipe for them."""

    folder: Path

    @property
    def recipe(self) -> Path:
        """The recipe."""
        return self.folder / "recipe.yaml"

    @property
    def base(self) -> Path:
        """The base's folder."""
        return self.folder / "base"

    def expert(self, task: str) -> Path:
        """An expert's folder."""
        return self.folder / "experts" / task


def copied(tiny: TinyFolder, target: Path) -> Path:
    """A private copy of a tiny folder; its recipe."""
    shutil.copytree(tiny.folder, target)
    return target / "recipe.yaml"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a model folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
