"""What an interrupted quantization has finished, kept next to the output until that is written."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from epmq_deploy.artifacts.folders import atomic_folder, atomic_text, unfinished_folder
from epmq_deploy.artifacts.space import explaining_full_disk
from epmq_deploy.errors import DiskSpaceError, EpmqError
from epmq_deploy.quantization.artifact import (
    load_artifact,
    load_inputs,
    load_reports,
    save_artifact,
)
from epmq_deploy.quantization.residuals.artifact import load_residuals
from epmq_deploy.quantization.results import QuantizedModel

log = logging.getLogger(__name__)

_FINGERPRINT = "fingerprint"
_TEXT = "text"

T = TypeVar("T")


class FinishedWork:
    """Finished blocks and searches of one run, in a hidden folder next to its output.

    A run with another fingerprint starts from the beginning.

    Args:
        output: folder the run will write in the end.
        fingerprint: of the run; what it finishes is of no use to a run with another one.

    Attributes:
        scratch: folder for what this run alone can use; what an earlier one left there is deleted.
    """

    def __init__(self, output: Path, fingerprint: str) -> None:
        self._folder = unfinished_folder(output)
        file = self._folder / _FINGERPRINT
        if not file.is_file() or file.read_text(encoding="utf-8") != fingerprint:
            if self.blocks:
                log.info(
                    "starting from the beginning: the %d finished blocks of an interrupted run "
                    "come from other inputs, options, numbers of threads or arithmetic",
                    self.blocks,
                )
            self.remove()
            self._folder.mkdir(parents=True, exist_ok=True)
            file.write_text(fingerprint, encoding="utf-8")
        for folder in self._folder.glob(".block-*"):
            shutil.rmtree(folder, ignore_errors=True)
        self.scratch = self._folder / "scratch"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()

    @contextmanager
    def kept_when_interrupted(self) -> Iterator[None]:
        """Forget everything when the run inside fails; keep and say so when it is interrupted."""
        if self.blocks:
            log.info("resuming after %d finished blocks of an interrupted run", self.blocks)
        try:
            yield
        except DiskSpaceError:
            self._say_what_is_kept("out of disk space")
            raise
        except EpmqError:
            # The same command would fail again, and another one could not use what there is.
            self.remove()
            raise
        except KeyboardInterrupt:
            self._say_what_is_kept("interrupted")
            raise

    def _say_what_is_kept(self, why: str) -> None:
        log.warning(
            "%s with %d blocks finished; the same command resumes from there", why, self.blocks
        )

    def load(self, index: int) -> QuantizedModel | None:
        """Return a block's result, or None when it is still to be done."""
        folder = self._block(index)
        if not folder.is_dir():
            return None
        layers, replaced = load_artifact(folder)
        return QuantizedModel(
            layers,
            dict(replaced),
            load_reports(folder),
            inputs=load_inputs(folder),
            residuals=load_residuals(folder),
        )

    def save(self, index: int, result: QuantizedModel) -> None:
        """Remember a block's result; either all of it is there afterwards or nothing."""
        with atomic_folder(self._block(index)) as folder:
            save_artifact(folder, result)

    def once(self, name: str, kind: type[T], make: Callable[[], T]) -> T:
        """Return a value that the first run makes and later ones remember.

        Args:
            name: of the value; a file name without extension.
            kind: its type, which pydantic can write as JSON and read again.
            make: makes it.
        """
        file, adapter = self._folder / f"{name}.json", TypeAdapter(kind)
        if not file.is_file():
            atomic_text(file, adapter.dump_json(make()).decode())
        return adapter.validate_json(file.read_text(encoding="utf-8"))

    def load_tensors(self, name: str) -> tuple[dict[str, Tensor], str] | None:
        """Return the tensors and the text that were saved under a name, or None."""
        file = self._folder / f"{name}.safetensors"
        if not file.is_file():
            return None
        with safe_open(file, framework="pt") as handle:
            text = handle.metadata()[_TEXT]
        return load_file(file), text

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], text: str) -> None:
        """Save tensors and a text in the place of what was there: all of it or nothing.

        Raises:
            DiskSpaceError: the disk has too little room.
        """
        file = self._folder / f"{name}.safetensors"
        temporary = file.with_name(f".{file.name}.tmp")
        try:
            with explaining_full_disk(file):
                save_file(dict(tensors), temporary, metadata={_TEXT: text})
                temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def blocks(self) -> int:
        """Number of blocks finished."""
        return len(list(self._folder.glob("block-*")))

    def _block(self, index: int) -> Path:
        return self._folder / f"block-{index:03d}"
