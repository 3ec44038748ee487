"""Pickled weights, which are never loaded: where they are, and how a person converts them."""

import glob
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from epmq_deploy.checkpoints.files import SINGLE_FILE
from epmq_deploy.checkpoints.lora import ADAPTER_CONFIG, ADAPTER_FILE
from epmq_deploy.checkpoints.open_clip import OPEN_CLIP_CONFIG, OPEN_CLIP_FILES
from epmq_deploy.errors import RecipeError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# By the file that tells what a folder holds: names of its weights, the likeliest first, and what
# safetensors of the same weights are called.
_LAYOUTS = (
    (ADAPTER_CONFIG, ("adapter_model.*",), ADAPTER_FILE),
    (OPEN_CLIP_CONFIG, ("open_clip*", "*"), OPEN_CLIP_FILES[0]),
    (None, ("pytorch_model.bin", "pytorch_model-*.bin", "*"), SINGLE_FILE),
)
# Pickles of a training run that are no weights.
_OTHERS = ("training_args*", "optimizer*", "scheduler*", "scaler*", "rng_state*")
# Tensors as they are, those that share memory apart; of a training checkpoint its weights.
_CODE = (
    "import glob, sys, torch; from safetensors.torch import save_file; w = {}; "
    "[w.update(torch.load(f, weights_only=True, map_location='cpu')) for f in "
    "sorted(glob.glob(sys.argv[1]))]; w = w.get('state_dict', w); "
    "save_file({k.removeprefix('module.'): v.clone().contiguous() for k, v in w.items() "
    "if torch.is_tensor(v)}, sys.argv[2], metadata={'format': 'pt'})"
)


@dataclass(frozen=True)
class PickledWeights:
    """Weights of one model as pickles.

    Attributes:
        pattern: of their names.
        first: one of the names.
        target: what their safetensors are called.
    """

    pattern: str
    first: str
    target: str

    def conversion(self, folder: Path) -> str:
        """A shell line that converts them within ``folder``, tensor by tensor, heads and all."""
        arguments = (f"{glob.escape(str(folder))}/{self.pattern}", f"{folder}/{self.target}")
        return f'python -c "{_CODE}" {shlex.join(arguments)}'


def pickled_weights(names: Iterable[str]) -> PickledWeights | None:
    """The pickled weights among a folder's file names; None where there are none."""
    files = sorted(names)
    pickles = [
        name
        for name in files
        if name.endswith(PICKLES) and not any(fnmatchcase(name, other) for other in _OTHERS)
    ]
    patterns, target = next(
        (patterns, target) for mark, patterns, target in _LAYOUTS if mark is None or mark in files
    )
    for pattern in patterns:
        for name in pickles:
            if fnmatchcase(name, pattern):
                shards = pattern == "pytorch_model-*.bin"
                return PickledWeights(pattern if shards else glob.escape(name), name, target)
    return None


def refuse_pickled(folder: Path) -> None:
    """Say how to convert the weights of a folder that has pickled ones only.

    Raises:
        RecipeError: it has.
    """
    found = pickled_weights(file.name for file in folder.iterdir() if file.is_file())
    if found is not None:
        raise RecipeError(
            f"{folder}: only pickled weights ({found.first}), which are never loaded; convert "
            f"them: {found.conversion(folder)}"
        )


def refuse_pickled_file(file: Path, purpose: str) -> None:
    """Say how to convert a file with pickled weights.

    Args:
        file: that was given.
        purpose: what to give after that.

    Raises:
        RecipeError: it is such a file.
    """
    if file.suffix not in PICKLES:
        return
    target = next(
        target for mark, _, target in _LAYOUTS if mark is None or (file.parent / mark).is_file()
    )
    found = PickledWeights(glob.escape(file.name), file.name, target)
    raise RecipeError(
        f"{file}: pickled weights, which are never loaded; convert them, and give {purpose}: "
        f"{found.conversion(file.parent)}"
    )
