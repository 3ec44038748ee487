"""Whose settings make a task's inputs: the base's, or those its expert was fine-tuned with.

A merged model, and all that is made of it, holds the settings of such experts in ``inputs/TASK``.
"""

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.files import CONFIG_FILE, PREPROCESSOR_FILE
from epmq_deploy.errors import EpmqError, MismatchError, RecipeError
from epmq_deploy.hashing import files_sha256
from epmq_deploy.models.base import ModelFamily
from epmq_deploy.models.experts import Sources
from epmq_deploy.models.image_inputs import example_pixels
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.models.tokenizer import stored_tokenizer, tokenizer_files
from epmq_deploy.recipe import Task

INPUTS_FOLDER = "inputs"


def inputs_of_experts(tasks: Mapping[str, Task], sources: Sources) -> dict[str, Path]:
    """Return a folder with input settings for each task that takes those of its expert.

    The folders are temporary, and those of ``write_inputs`` equal them.

    Args:
        tasks: the recipe's.
        sources: base and experts.

    Raises:
        MismatchError: names every task whose expert's settings are missing, or do not fit the
            merged model.
    """
    folders, problems = {}, []
    for name, task in tasks.items():
        if task.inputs_from == "base" or name not in sources.experts:
            continue
        try:
            folders[name] = _checked(sources.family, sources.base, sources.experts[name])
        except EpmqError as error:
            problems.append(f"task {name!r}: inputs_from: expert: {error}")
    if problems:
        raise MismatchError("inputs as experts make them", problems)
    return folders


def write_inputs(folder: Path, inputs: Mapping[str, Path]) -> None:
    """Write the input settings of tasks, by task, into a merged model."""
    for name, settings in inputs.items():
        shutil.copytree(settings, folder / INPUTS_FOLDER / name)


def copy_inputs(merged: Path, folder: Path) -> None:
    """Copy the input settings of all tasks from a merged model, where it has any."""
    if (merged / INPUTS_FOLDER).is_dir():
        shutil.copytree(merged / INPUTS_FOLDER, folder / INPUTS_FOLDER)


def written_inputs(tasks: Mapping[str, Task], folder: Path) -> dict[str, Path]:
    """Return the folders of ``write_inputs`` in a stage's output, by task.

    Raises:
        RecipeError: it was merged with another choice of ``inputs_from``.
    """
    folders = {name: folder / INPUTS_FOLDER / name for name in tasks}
    for name, task in tasks.items():
        merged_with = "expert" if folders[name].is_dir() else "base"
        if merged_with != task.inputs_from:
            raise RecipeError(
                f"task {name!r}: inputs_from is {task.inputs_from}, but {folder} was merged with "
                f"inputs_from: {merged_with}; merge again"
            )
    return {name: path for name, path in folders.items() if path.is_dir()}


def _checked(family: ModelFamily, base: Checkpoint, expert: Checkpoint) -> Path:
    """Return a folder with an expert's input settings, once they fit the model.

    Raises:
        RecipeError: they are missing, or do not fit.
    """
    if generates_text(family):
        raise RecipeError(
            f"models of the {family.name} family read all prompts with the base's tokenizer; leave "
            "it out"
        )
    folder = _collected(family, base, expert)
    if family.modality == "text":
        _check_vocabulary(base.folder, expert.folder)
        return folder
    height, width = example_pixels(folder, 1).shape[2:]
    size = example_pixels(base.folder, 1).shape[2:]
    if (height, width) != tuple(size):
        raise RecipeError(
            f"{expert.folder}: its image processor makes {height} x {width} pixels, and the "
            f"merged model takes the base's {size[0]} x {size[1]}; give it the base's size, or "
            "leave inputs_from out"
        )
    return folder


def _collected(family: ModelFamily, base: Checkpoint, expert: Checkpoint) -> Path:
    """Return a temporary folder with an expert's input settings; the same for the same content."""
    folder = Path(mkdtemp(dir=_temporary()))
    config = family.merged_config(base.source.config or {})
    _write_json(folder / CONFIG_FILE, config)
    if family.modality == "image":
        settings = expert.source.preprocessor_config
        if settings is None:
            raise RecipeError(f"{expert.folder}: no {PREPROCESSOR_FILE}; leave inputs_from out")
        _write_json(folder / PREPROCESSOR_FILE, settings)
    else:
        tokenizer = stored_tokenizer(expert.folder)
        if tokenizer is None:
            raise RecipeError(
                f"{expert.folder}: no tokenizer that can be opened; leave inputs_from out"
            )
        for file in tokenizer_files(tokenizer, expert.folder):
            shutil.copyfile(file, folder / file.name)
    # Tokenizers and processors are kept by folder, so other content needs another one.
    target = folder.parent / files_sha256(folder, folder.iterdir())
    if target.is_dir():
        shutil.rmtree(folder)
    else:
        folder.rename(target)
    return target


def _check_vocabulary(base: Path, expert: Path) -> None:
    """Make sure that a token has the same number in both tokenizers, where both have it.

    Raises:
        RecipeError: one has not.
    """
    tokenizers = [stored_tokenizer(folder) for folder in (base, expert)]
    if None in tokenizers:
        return
    numbers, own = (tokenizer.get_vocab() for tokenizer in tokenizers)  # type: ignore[union-attr]
    tokens = {number: token for token, number in numbers.items()}
    for token, number in own.items():
        if numbers.get(token, number) != number or tokens.get(number, token) != token:
            raise RecipeError(
                f"{expert}: its tokenizer has another vocabulary: {token!r} is token {number}, "
                f"which is {tokens.get(number)!r} for the base, and the merged embedding has one "
                "row for each number; leave inputs_from out, or, if all experts share this "
                "tokenizer, put its files into the base's folder"
            )


@cache
def _temporary() -> Path:
    """Return a folder that is removed when the process ends."""
    directory = TemporaryDirectory(prefix="epmq-inputs-")
    _DIRECTORIES.append(directory)
    return Path(directory.name)


# What is not referred to is removed.
_DIRECTORIES: list[TemporaryDirectory[str]] = []


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
