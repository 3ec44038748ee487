"""The samples of a task on images: stored as files or bytes, read when asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from epmq_deploy.data.samples import Samples
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.images import RgbImage, read_rgb


@dataclass(frozen=True)
class ImageSamples(Samples):
    """Samples whose inputs are images; ``rows`` hold them as ``{bytes, path}``."""

    def inputs(self, start: int, stop: int) -> list[Any]:
        """Return the images of samples ``start`` to ``stop``, RGB, the right way up.

        Raises:
            RecipeError: one is missing or cannot be read; names task, row and file.
        """
        return [self.read(row).image for row in self.indices[start:stop]]

    def read(self, row: int) -> RgbImage:
        """Read the image of a row.

        Raises:
            RecipeError: it is missing or cannot be read; names task, row and file.
        """
        stored: Mapping[str, Any] = self._stored[row][self.column] or {}
        content, path = stored.get("bytes"), stored.get("path")
        where = f"task {self.task!r}: row {row} of {self.source.path}"
        if content is None and not path:
            raise RecipeError(f"{where} holds no image in column {self.column!r}")
        try:
            return read_rgb(self._folder / str(path) if content is None else content)
        except Exception as error:  # Pillow's decoders raise anything
            shown = f" ({path})" if path else ""
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RecipeError(f"{where}{shown} cannot be decoded ({reason})") from error

    @property
    def column(self) -> str:
        """Return the name of the column with the images."""
        return self.columns[0]

    @cached_property
    def _stored(self) -> Any:
        # Without other columns, which might hold images that nothing reads.
        return self.rows.select_columns([self.column])

    @property
    def _folder(self) -> Path:
        """Return the folder that relative paths start from: that of the file that lists them."""
        path = Path(self.source.path)
        return path if path.is_dir() else path.parent
