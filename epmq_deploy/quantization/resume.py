"""What an interrupted quantization has finished, kept beside the output until that is written."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from epmq_deploy.artifacts.folders import atomic_folder, atomic_text
from epmq_deploy.quantization.artifact import (
    load_artifact,
    load_inputs,
    load_reports,
    save_artifact,
)
from epmq_deploy.quantization.results import QuantizedModel

log = logging.getLogger(__name__)

_MARK = "fingerprint"


class FinishedWork:
    """Finished blocks and searches of one run, in a hidden folder beside its output.

    A run with another fingerprint starts anew.

    Args:
        output: folder the run will write in the end.
        mark: fingerprint of the run: what it finishes is of use to no other.

    Attributes:
        scratch: folder for what this run alone can use; what an earlier one left there is deleted.
    """

    def __init__(self, output: Path, mark: str) -> None:
        place = output.resolve()
        self._folder = place.with_name(f".{place.name}.unfinished")
        file = self._folder / _MARK
        if not file.is_file() or file.read_text() != mark:
            if self.blocks:
                log.info(
                    "starting anew: %d finished blocks of an interrupted run were made from other "
                    "inputs or options, or with other threads or arithmetic",
                    self.blocks,
                )
            self.remove()
            self._folder.mkdir(parents=True)
            file.write_text(mark)
        self.scratch = self._folder / "scratch"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()

    def load(self, index: int) -> QuantizedModel | None:
        """A block's result, or None when it is still to be done."""
        folder = self._block(index)
        if not folder.is_dir():
            return None
        layers, replaced = load_artifact(folder)
        return QuantizedModel(
            layers, dict(replaced), load_reports(folder), inputs=load_inputs(folder)
        )

    def save(self, index: int, result: QuantizedModel) -> None:
        """Remember a block's result; either all of it is there afterwards or nothing."""
        with atomic_folder(self._block(index)) as folder:
            save_artifact(folder, result)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """A value of plain data that is made in the first run and remembered."""
        file = self._folder / f"{name}.json"
        if not file.is_file():
            atomic_text(file, json.dumps(make()))
        return json.loads(file.read_text())

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def blocks(self) -> int:
        """Number of blocks finished."""
        return len(list(self._folder.glob("block-*")))

    def _block(self, index: int) -> Path:
        return self._folder / f"block-{index:03d}"
