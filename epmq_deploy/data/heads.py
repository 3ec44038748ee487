"""Building each task's head, which turns embeddings into logits."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from epmq_deploy.artifacts.manifest import fingerprint
from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.checkpoints.sentence_transformer import MODULES
from epmq_deploy.data.class_labels import UNNAMED, HeadClasses, listed
from epmq_deploy.data.embedding_heads import embedding_head, embedding_settings
from epmq_deploy.errors import EpmqError, MismatchError, RecipeError
from epmq_deploy.hashing import file_sha256
from epmq_deploy.models import ModelFamily, TaskHead, problem_types
from epmq_deploy.models.embedding_head import EmbeddingHead
from epmq_deploy.models.experts import Sources
from epmq_deploy.models.pooling import EmbeddingSettings
from epmq_deploy.models.problem_types import EMBEDDING, SINGLE_LABEL, TOKEN
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.recipe import Task

log = logging.getLogger(__name__)

HEADS_FILE = "heads.safetensors"
_PROBLEM_TYPE, _NORM_EPSILON = "problem_type", "norm_epsilon"


def build_heads(
    tasks: Mapping[str, Task],
    family: ModelFamily,
    folder: Path,
    features: int,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskHead]:
    """Build the heads of all tasks that have one, float32, from embeddings ``[n, features]``.

    A task whose recipe names no head has its expert's, where experts of this family carry one.

    Args:
        tasks: the recipe's tasks.
        family: the model's family, for zero-shot heads.
        folder: model folder with the text tower.
        features: width of the embedding.
        device: where to run the text tower.
        progress: shows one step per task.

    Raises:
        MismatchError: names every head that cannot be built or does not fit.
    """
    progress = progress or NoProgress()
    heads, problems = {}, []
    for name, task in progress.track(list(tasks.items()), "building heads"):
        try:
            head = _build(task, family, folder, device or torch.device("cpu"))
        except EpmqError as error:
            problems.append(f"task {name!r}: {error}")
            continue
        if head is not None:
            problems += [f"task {name!r}: {text}" for text in _problems(task, head, features)]
            heads[name] = head
    if problems:
        raise MismatchError("heads do not fit", problems)
    return heads


def _problems(task: Task, head: TaskHead, features: int) -> list[str]:
    """Say why a head is not usable for embeddings of width ``features``; empty if it is."""
    problems = head.problems(features)
    names = task.head.classes if task.head is not None else None
    if names is not None and len(names) != head.classes:
        problems.append(f"head.classes has {len(names)} names, the head {head.classes} classes")
    twice = sorted(name for name, count in Counter(names or ()).items() if count > 1)
    if twice:
        log.warning(
            "several classes are called %s; samples of one count as wrong where another is "
            "predicted",
            listed(twice),
        )
    elif not problems and head.has_equal_rows():
        problems.append("two classes have the same row in the head and cannot be told apart")
    return problems


def heads_of_experts(
    tasks: Mapping[str, Task],
    sources: Sources,
    heads: Mapping[str, TaskHead],
    device: torch.device,
) -> dict[str, TaskHead]:
    """Return the heads to evaluate experts with.

    Args:
        tasks: the recipe's tasks.
        sources: base and experts.
        heads: of the merged model, by task.
        device: where to run text towers.

    Returns:
        ``heads``; where text towers are merged, heads from class names are built anew with the text
        tower of each expert.
    """
    if not sources.family.merges_text_tower:
        return dict(heads)
    expert_heads = dict(heads)
    for name, task in tasks.items():
        if name in heads and task.head is not None and task.head.is_zero_shot:
            assert task.head.classes is not None, "zero-shot heads are made of them"
            matrix = sources.family.zero_shot_head(
                sources.base.folder,
                task.head.classes,
                task.head.templates,
                device,
                sources.experts[name],
            )
            expert_heads[name] = TaskHead(matrix)
    return expert_heads


def heads_sha256(tasks: Mapping[str, Task]) -> dict[str, str]:
    """Hash the heads that a recipe defines, by role (``head:<task>``), as input of a stage.

    A matrix counts by its values, not its path. Heads computed from models are determined by the
    models, which are inputs themselves.
    """
    found = {}
    for name, task in tasks.items():
        if task.head is None:
            continue
        contents = {}
        matrix = task.head.matrix
        # One that is missing is named when it is read.
        if matrix is not None and Path(matrix).is_file():
            contents["matrix"] = file_sha256(Path(matrix))
        options = task.head.model_dump(mode="json", exclude={"matrix"})
        found[f"head:{name}"] = fingerprint("head", options, contents)
    return found


def leaves_head_to_expert(task: Task, family: ModelFamily) -> bool:
    """Whether a task's head is read from its expert's checkpoint."""
    return family.experts_carry_heads if task.head is None else task.head.from_expert


@dataclass(frozen=True)
class Reading:
    """How a task's head reads texts, where it reads more than the family's embedding.

    Attributes:
        words: whether it labels each word.
        embedding: how it embeds whole texts; None where it does not.
    """

    words: bool = False
    embedding: EmbeddingSettings | None = None

    @classmethod
    def of_head(cls, head: TaskHead | None) -> "Reading":
        """Return how a head reads."""
        if isinstance(head, EmbeddingHead):
            return cls(embedding=head.settings)
        return cls(words=head is not None and head.problem_type == TOKEN)

    @classmethod
    def of_task(cls, task: Task, family: ModelFamily) -> "Reading":
        """Return how a task's head reads, as far as the recipe and the expert's settings say.

        Where the expert is not there any more, the recipe alone counts.

        Raises:
            RecipeError: the expert embeds texts in a way that is not supported, or the family has
                no such heads.
        """
        given = None if task.head is None else task.head.problem_type
        reading = cls(words=given == TOKEN)
        asks_expert = family.reads_tokens and leaves_head_to_expert(task, family)
        if asks_expert and given in (None, EMBEDDING):
            try:
                source = ModelFolder.open(task.expert, task.adapter)
            except RecipeError as error:
                log.info("%s; its head is taken for one of whole texts", error)
                return reading
            reading = cls(words=given is None and problem_types.labels_words(source.settings))
            if not reading.words and (given == EMBEDDING or not _is_classifier(source)):
                reading = cls(embedding=embedding_settings(source.path))
        if given == EMBEDDING and reading.embedding is None:
            raise RecipeError(
                f"{task.expert}: no {MODULES}, which says how tokens are pooled; save the expert "
                "with sentence-transformers"
            )
        if reading != cls() and not family.reads_tokens:
            kind = TOKEN if reading.words else EMBEDDING
            raise RecipeError(f"models of the {family.name} family have no heads for {kind}")
        return reading


# What the family's embedding is all of.
PLAIN = Reading()


def _is_classifier(source: ModelFolder) -> bool:
    """Whether settings say that a checkpoint holds a classifier."""
    names = problem_types.architectures(source.settings)
    return any(name.endswith("Classification") for name in names)


def head_of_expert(task: Task, family: ModelFamily, base: Path) -> TaskHead | None:
    """Return the head in the expert's checkpoint; None where the recipe gives another.

    Also None where the recipe gives none and the checkpoint holds none.

    Args:
        task: the recipe's task.
        family: the model's family.
        base: folder of the base or of a merged model, for what an adapter leaves as it is there.

    Raises:
        RecipeError: the checkpoint cannot be opened, or holds no head although it was asked for.
    """
    if not leaves_head_to_expert(task, family):
        return None
    source = ModelFolder.open(task.expert, task.adapter)
    opened = Checkpoint.open(ModelFolder.at(base), family.canonical_key, is_known=family.is_known)
    expert = Checkpoint.open_expert(source, opened, family.canonical_key, is_head=family.is_head)
    reading = Reading.of_task(task, family)
    if reading.embedding is not None:
        return embedding_head(source.path)
    head = family.expert_word_head(expert) if reading.words else family.expert_head(expert)
    if head is None and task.head is not None:
        raise RecipeError(
            f"{source.path} holds no head of the {family.name} family; give head.classes or "
            "head.matrix instead of head.from_expert"
        )
    if head is not None:
        given = None if task.head is None else task.head.problem_type
        head.problem_type = problem_types.problem_type(given, source.settings, head.classes)
    return head


def head_classes(task: Task, head: TaskHead | None) -> HeadClasses:
    """Return number and names of a head's classes in the order of its logits.

    Names are the recipe's, or those in the settings of the expert that the head is read from, where
    ``transformers`` numbers the classes it knows no names of.

    Args:
        task: the recipe's task.
        head: the head; None where it is not built yet.
    """
    given = task.head
    kind = given.problem_type if given is not None and head is None else None
    kind = kind or (SINGLE_LABEL if head is None else head.problem_type)
    if kind == EMBEDDING:
        return HeadClasses(problem_type=kind)
    if given is not None and given.classes is not None:
        return HeadClasses(len(given.classes), given.classes, kind)
    count = None if head is None else head.classes
    if head is None or (given is not None and not given.from_expert):
        return HeadClasses(count, problem_type=kind)
    expert = ModelFolder.open(task.expert, task.adapter)
    names = _names_in(expert.config or {}, head.classes, expert.path)
    return HeadClasses(count, names, kind)


def _names_in(config: Mapping[str, Any], count: int, where: Path) -> tuple[str, ...] | None:
    """Return the names that a ``config.json`` gives its classes; None unless all have one.

    Raises:
        RecipeError: they are neither a mapping nor a list.
    """
    stored, numbers = config.get("id2label") or {}, config.get("label2id") or {}
    if not isinstance(stored, dict | list) or not isinstance(numbers, dict):
        raise RecipeError(
            f"{where}: id2label or label2id in config.json is no mapping; correct it, or name the "
            "classes as head.classes"
        )
    if isinstance(stored, list):
        stored = dict(enumerate(stored))
    by_number = {str(number): str(name) for name, number in numbers.items()}
    by_number |= {str(number): str(name) for number, name in stored.items()}
    names = tuple(by_number.get(str(index), "") for index in range(count))
    unnamed = tuple(f"{UNNAMED}{index}" for index in range(count))
    return names if all(names) and names != unnamed else None


def _build(task: Task, family: ModelFamily, folder: Path, device: torch.device) -> TaskHead | None:
    if task.head is not None and generates_text(family):
        raise RecipeError(
            f"models of the {family.name} family generate text and have no head; leave head out "
            "and give prompt.answers"
        )
    if task.head is None or task.head.from_expert:
        return head_of_expert(task, family, folder)
    if task.head.is_zero_shot:
        assert task.head.classes is not None, "zero-shot heads are made of them"
        return TaskHead(
            family.zero_shot_head(folder, task.head.classes, task.head.templates, device)
        )
    assert task.head.matrix is not None, "the recipe checks that one kind is given"
    head = TaskHead(_read_matrix(task.head.matrix))
    Reading.of_task(task, family)
    head.problem_type = problem_types.problem_type(task.head.problem_type, {}, head.classes)
    return head


def _read_matrix(file: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as handle:
            keys = list(handle.keys())
            if len(keys) != 1:
                raise RecipeError(f"{file}: expected one tensor, found {len(keys)}")
            matrix: Tensor = handle.get_tensor(keys[0])
            return matrix
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{file}: not readable as safetensors ({error})") from error


def save_heads(folder: Path, heads: Mapping[str, TaskHead]) -> None:
    """Write heads into a stage's folder: tensors ``<task>.<part>``, all else as metadata."""
    tensors = {
        f"{task}.{part}": tensor
        for task, head in heads.items()
        for part, tensor in head.state_dict().items()
    }
    embedding = {task: head for task, head in heads.items() if isinstance(head, EmbeddingHead)}
    others = {task: head for task, head in heads.items() if task not in embedding}
    metadata = {f"{task}.{EMBEDDING}": head.as_text() for task, head in embedding.items()}
    metadata |= {task: head.activation for task, head in others.items()}
    metadata |= {
        f"{task}.{_PROBLEM_TYPE}": head.problem_type
        for task, head in others.items()
        if head.problem_type != SINGLE_LABEL
    }
    metadata |= {
        f"{task}.{_NORM_EPSILON}": repr(head.norm_epsilon)
        for task, head in others.items()
        if head.norm_weight is not None
    }
    save_file(tensors, folder / HEADS_FILE, metadata=metadata)


def load_heads(folder: Path) -> dict[str, TaskHead]:
    """Read the heads of a stage's folder, by task."""
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(folder / HEADS_FILE, framework="pt") as handle:
        metadata = handle.metadata() or {}
        for name in handle.keys():  # noqa: SIM118 - no mapping
            task, _, part = name.partition(".")
            parts.setdefault(task, {})[part] = handle.get_tensor(name)
    embedding = {
        task: EmbeddingHead.stored(parts.pop(task, {}), text)
        for key, text in metadata.items()
        for task, _, part in [key.partition(".")]
        if part == EMBEDDING
    }
    return embedding | {
        task: TaskHead.of_tensors(
            tensors,
            metadata[task],
            metadata.get(f"{task}.{_PROBLEM_TYPE}", SINGLE_LABEL),
            float(metadata.get(f"{task}.{_NORM_EPSILON}", "1e-5")),
        )
        for task, tensors in parts.items()
    }
