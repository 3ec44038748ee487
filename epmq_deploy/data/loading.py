"""Loading, choosing and checking a task's samples; identifying its data."""

import logging
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from epmq_deploy.artifacts.manifest import fingerprint
from epmq_deploy.checkpoints.hub import hub_id
from epmq_deploy.data.column_names import (
    compared_columns,
    input_columns,
    label_column,
    with_fields,
    word_columns,
)
from epmq_deploy.data.columns import check_texts, check_words, with_images
from epmq_deploy.data.files import files_below
from epmq_deploy.data.heads import PLAIN, Reading
from epmq_deploy.data.image_samples import ImageSamples
from epmq_deploy.data.listed_images import listed_images
from epmq_deploy.data.preflight import check_images
from epmq_deploy.data.prompts import PromptFormat
from epmq_deploy.data.rows import load_rows
from epmq_deploy.data.samples import EmbeddingSamples, Samples, TextSamples, WordSamples, batches
from epmq_deploy.errors import EpmqError, RecipeError, problems_of
from epmq_deploy.hashing import file_sha256, files_sha256
from epmq_deploy.models import ModelFamily
from epmq_deploy.models.text_generation.base import TextPair, generates_text
from epmq_deploy.recipe import DataSource, Preflight, Task
from epmq_deploy.recipe.prompt import Prompt

log = logging.getLogger(__name__)


def load_samples(
    task: str,
    source: DataSource,
    family: ModelFamily,
    *,
    prompt: Prompt | None = None,
    limit: int | None = None,
    seed: int = 0,
    labelled: bool = True,
    reading: Reading = PLAIN,
) -> Samples:
    """Load a data source and choose samples.

    Args:
        task: name used in messages.
        source: what to load.
        family: decides whether inputs are images, texts, or texts with answers.
        prompt: of the task, where the family generates text.
        limit: take at most this many, chosen at random; None takes all in order.
        seed: of that choice.
        labelled: whether text generation needs answers; see ``PromptFormat.of``.
        reading: how the task's head reads texts.

    Raises:
        RecipeError: the data cannot be loaded, holds nothing or lacks a column.
    """
    rows = load_rows(task, source)
    where = f"task {task!r}: {source.path}"
    if len(rows) == 0:
        raise RecipeError(f"{where} holds no samples")
    rows = with_fields(
        rows, [source.input_column, *(source.input_columns or ()), source.label_column]
    )
    indices = list(range(len(rows)))
    if limit is not None:
        random.Random(seed).shuffle(indices)
    chosen = indices[:limit]
    if generates_text(family):
        if source.input_columns is not None:
            raise RecipeError(
                f"{where}: input_columns is for classifiers; name the columns in prompt.template"
            )
        column = source.input_column or family.modality
        if prompt is None or prompt.template is None:
            (column,) = input_columns(rows, source, family.modality, where)
        prompt_format = PromptFormat.of(
            prompt, column, source.label_column, rows.column_names, where, labelled=labelled
        )
        for name in prompt_format.columns:
            check_texts(rows, name, where)
        if (labels := prompt_format.label_column) is not None:
            prompt_format.check_labels(list(rows.select_columns([labels])[labels]), where)
        return TextSamples(task, rows, chosen, source, (column,), prompt_format)
    if prompt is not None:
        raise RecipeError(f"{where}: prompt is for text-generation models, not for classifiers")
    if reading.embedding is not None:
        columns, scores = compared_columns(rows, source, where)
        for column in columns:
            check_texts(rows, column, where)
        source = source.model_copy(update={"label_column": scores})
        return EmbeddingSamples(task, rows, chosen, source, columns, reading.embedding)
    if reading.words:
        column, labels = word_columns(rows.column_names, source, where)
        check_words(rows, column, where)
        source = source.model_copy(update={"label_column": labels})
        return WordSamples(task, rows, chosen, source, (column,))
    columns = input_columns(rows, source, family.modality, where)
    labels = label_column(rows.column_names, source, where)
    source = source.model_copy(update={"label_column": labels})
    if family.modality == "image":
        if len(columns) > 1:
            raise RecipeError(f"{where}: input_columns is for models that read texts")
        rows = with_images(rows, columns[0], where)
        return ImageSamples(task, rows, chosen, source, columns)
    for column in columns:
        check_texts(rows, column, where)
    return Samples(task, rows, chosen, source, columns)


def load_calibration(
    tasks: Mapping[str, Task],
    family: ModelFamily,
    folder: Path,
    *,
    limit: int,
    seed: int,
    option: str,
    without: str,
    preflight: Preflight,
    inputs: Mapping[str, Path] = MappingProxyType({}),
) -> tuple[dict[str, Samples], list[str]]:
    """Load calibration samples by task; say for every other task why its data cannot be used.

    Images are decoded beforehand as ``preflight`` says, and one batch of each task is made. Fewer
    samples than asked for are logged. Samples for text generation may lack answers; see
    ``data.pseudo_labels``.

    Args:
        tasks: the recipe's tasks.
        family: the model's family.
        folder: a model folder with preprocessor settings.
        limit: take at most this many per task.
        seed: of their choice.
        option: that asks for so many, for messages (``merge.samples``).
        without: ends the sentence on a task without data; ``{task}`` is its name.
        preflight: which images are decoded.
        inputs: by task, the folder whose settings make its inputs where it is not ``folder``.
    """
    samples, problems = {}, []
    for name, task in tasks.items():
        source = task.calibration
        if source is None:
            end = without.format(task=name)
            problems.append(f"task {name!r} has no calibration data{end}")
            continue
        try:
            chosen = load_samples(
                name,
                source,
                family,
                prompt=task.prompt,
                limit=limit,
                seed=seed,
                labelled=False,
                reading=Reading.of_task(task, family),
            )
            chosen = replace(chosen, inputs_folder=inputs.get(name))
            check_images(chosen, preflight)
            if isinstance(chosen, TextSamples) and chosen.lacks_labels:
                family.collate(folder, [TextPair(text, "") for text in chosen.texts(0, 1)])
            else:
                next(batches(chosen, family, folder, 1))
        except EpmqError as error:
            problems += problems_of(error)
            continue
        if len(chosen) < limit:
            log.warning(
                "task %r: %d calibration samples, %d were asked for (%s)",
                name,
                len(chosen),
                limit,
                option,
            )
        samples[name] = chosen
    return samples, problems


def missing_data(tasks: Mapping[str, Task]) -> list[str]:
    """Return one sentence for every local data source that does not exist."""
    return [
        f"task {name!r}: {source.path}: no such file or folder"
        for name, task in tasks.items()
        for source in (task.calibration, task.evaluation)
        if source is not None and not Path(source.path).exists() and hub_id(source.path) is None
    ]


def data_sha256(source: DataSource, prompt: Prompt | None = None) -> str:
    """Hash a data source: its options, and its files' contents where it is local.

    Images that a table lists by their paths are among them.

    With ``prompt``, also what texts are made of it.
    """
    path = Path(source.path)
    images: list[Path] = []
    if path.is_file():
        content = file_sha256(path)
        images = listed_images(source)
    elif path.is_dir():
        files = (file for file, left in files_below(path) if not left and file.is_file())
        content = files_sha256(path, files)
    else:
        content = source.path
    options = source.model_dump(exclude={"path"})
    if prompt is not None:
        options["prompt"] = prompt.model_dump(mode="json")
    contents = {"content": content}
    # Their names are in the file that lists them.
    if images:
        contents["images"] = " ".join(map(file_sha256, images))
    return fingerprint("data", options, contents)
