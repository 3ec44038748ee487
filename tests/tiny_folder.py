"""Where tiny models and their data are."""

from dataclasses import dataclass
from pathlib import Path


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
