"""Pickled weights, which are never loaded: finding them, and the command that converts them."""

import glob
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from epmq_deploy.checkpoints.adapter_settings import ADAPTER_CONFIG, ADAPTER_FILE
from epmq_deploy.checkpoints.files import SINGLE_FILE
from epmq_deploy.checkpoints.open_clip import OPEN_CLIP_CONFIG, OPEN_CLIP_FILES
from epmq_deploy.errors import RecipeError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# By the file that marks a layout: name patterns of pickled weights, the likeliest first, and the
# name of the safetensors file they are converted to.
_LAYOUTS = (
    (ADAPTER_CONFIG, ("adapter_model.*",), ADAPTER_FILE),
    (OPEN_CLIP_CONFIG, ("open_clip*", "*"), OPEN_CLIP_FILES[0]),
    (None, ("pytorch_model.bin", "pytorch_model-*.bin", "*"), SINGLE_FILE),
)
# Pickles of a training run that are not weights.
_OTHERS = ("training_args*", "optimizer*", "scheduler*", "scaler*", "rng_state*")
# Copies tensors unchanged, un-sharing storage; unwraps the `state_dict` of a training checkpoint.
_CODE = (
    "import glob, sys, torch; from safetensors.torch import save_file; w = {}; "
    "[w.update(torch.load(f, weights_only=True, map_location='cpu')) for f in "
    "sorted(glob.glob(sys.argv[1]))]; w = w.get('state_dict', w); "
    "save_file({k.removeprefix('module.'): v.clone().contiguous() for k, v in w.items() "
    "if torch.is_tensor(v)}, sys.argv[2], metadata={'format': 'pt'})"
)


@dataclass(frozen=True)
class PickledWeights:
    """The pickled weights of one model.

    Attributes:
        pattern: matches the names of the files.
        first: name of the first file.
        target: name of the safetensors file to convert them to.
    """

    pattern: str
    first: str
    target: str

    def conversion(self, folder: Path) -> str:
        """Return a shell command that converts them within ``folder``, heads included."""
        arguments = (f"{glob.escape(str(folder))}/{self.pattern}", f"{folder}/{self.target}")
        return f'python -c "{_CODE}" {shlex.join(arguments)}'


def pickled_weights(names: Iterable[str]) -> PickledWeights | None:
    """Find the pickled weights among a folder's file names; None where there are none."""
    files = sorted(names)
    pickles = [
        name
        for name in files
        if name.endswith(PICKLES) and not any(fnmatchcase(name, other) for other in _OTHERS)
    ]
    patterns, target = next(
        (patterns, target)
        for marker, patterns, target in _LAYOUTS
        if marker is None or marker in files
    )
    for pattern in patterns:
        for name in pickles:
            if fnmatchcase(name, pattern):
                shards = pattern == "pytorch_model-*.bin"
                return PickledWeights(pattern if shards else glob.escape(name), name, target)
    return None


def refuse_pickled(folder: Path) -> None:
    """Refuse a folder that has only pickled weights, and say how to convert them.

    Raises:
        RecipeError: the folder has pickled weights.
    """
    pickles = pickled_weights(file.name for file in folder.iterdir() if file.is_file())
    if pickles is not None:
        raise RecipeError(
            f"{folder}: only pickled weights ({pickles.first}), which are never loaded; convert "
            f"them: {pickles.conversion(folder)}"
        )


def refuse_pickled_file(file: Path, purpose: str) -> None:
    """Refuse a file with pickled weights, and say how to convert it.

    Args:
        file: given in place of a model.
        purpose: what to give after the conversion, for the message.

    Raises:
        RecipeError: the file's suffix is one of pickles.
    """
    if file.suffix not in PICKLES:
        return
    target = next(
        target
        for marker, _, target in _LAYOUTS
        if marker is None or (file.parent / marker).is_file()
    )
    pickles = PickledWeights(glob.escape(file.name), file.name, target)
    raise RecipeError(
        f"{file}: pickled weights, which are never loaded; convert them, and give {purpose}: "
        f"{pickles.conversion(file.parent)}"
    )
