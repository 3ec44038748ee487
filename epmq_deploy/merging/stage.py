"""The merge stage: experts in, one Hugging Face folder out, tensor by tensor."""

import logging
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from epmq_deploy.artifacts.folders import atomic_folder, refuse_existing
from epmq_deploy.artifacts.manifest import MergeDetails, MergeManifest, fingerprint
from epmq_deploy.artifacts.outputs import finish_output
from epmq_deploy.data.agreement import Tuned
from epmq_deploy.data.heads import heads_sha256
from epmq_deploy.data.samples import data_sha256, missing_data
from epmq_deploy.errors import EpmqError, MismatchError, RecipeError, joined, noted
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.merging.data import RecipeData, load_data
from epmq_deploy.merging.methods import MERGE_METHODS
from epmq_deploy.merging.objectives import check_objective
from epmq_deploy.merging.output import write_merged
from epmq_deploy.merging.preflight import ExpertCheck, warn_about_what_is_not_merged
from epmq_deploy.merging.scaling_search import search_scaling
from epmq_deploy.merging.task_vectors import CheckpointTaskVectors
from epmq_deploy.models.experts import Sources, open_available
from epmq_deploy.options import without_effect
from epmq_deploy.options.merging import DataOptions, MergeOptions, ScaledOptions
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.recipe import Recipe

log = logging.getLogger(__name__)


def uses_data(options: MergeOptions) -> bool:
    """Whether merging takes calibration samples."""
    return _is_searched(options) or isinstance(options, DataOptions)


def uses_heads(options: MergeOptions) -> bool:
    """Whether merging takes the tasks' heads."""
    return _is_searched(options) or MERGE_METHODS[options.method].needs_heads


def _is_searched(options: MergeOptions) -> TypeGuard[ScaledOptions]:
    return isinstance(options, ScaledOptions) and options.search


def merge_fingerprint(recipe: Recipe, inputs: Mapping[str, str]) -> str:
    """What decides the merge; ``inputs`` are the hashes of base and experts by role."""
    options: MergeOptions = recipe.merge
    decisive = dict(inputs)
    if recipe.base.part is not None:
        decisive["part"] = recipe.base.part
    if uses_data(options):
        for name, task in recipe.tasks.items():
            if task.calibration is not None:
                decisive[f"calibration:{name}"] = data_sha256(task.calibration, task.prompt)
    if uses_heads(options):
        decisive |= heads_sha256(recipe.tasks)
    return fingerprint("merge", options.deciding, decisive)


def check_options(recipe: Recipe) -> None:
    """Make sure that the merge options fit the recipe's tasks.

    Raises:
        RecipeError: one sentence for each that does not.
    """
    method = MERGE_METHODS[recipe.merge.method]
    problems = method.problems(recipe.merge, tuple(recipe.tasks))
    problems += without_effect("merge", recipe.merge.idle())
    if recipe.base.part in ("text", "both") and uses_data(recipe.merge):
        problems.append(
            f"base.part: {recipe.base.part}: merging that takes calibration data (method "
            f"{method.name} or merge.search) runs the image tower alone; choose another method "
            "without search, or base.part: image"
        )
    if problems:
        raise RecipeError("; ".join(problems))


def merge(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> MergeManifest:
    """Merge the recipe's experts into ``output``, a loadable Hugging Face folder.

    What is not merged (a CLIP base's text tower, unless asked for), optional tensors that no expert
    holds and integer tensors are copied from the base.

    What can be known without reading weights is looked at first: models, their layout, data and
    heads. Values are checked while they are merged, or in the method's pass over them before; NaN
    in them is therefore found when all else is in order. Where something is not, all are read at
    once, and one error names everything.

    Raises:
        MismatchError: models, data or heads do not fit; all problems at once.
        RecipeError: the output exists, or an option does not fit.
        NumericsError: a merged value is NaN or infinite.
    """
    progress = progress or NoProgress()
    refuse_existing(output, "merge", overwrite=overwrite)
    check_options(recipe)
    options: MergeOptions = recipe.merge
    method = MERGE_METHODS[options.method]
    device = device or torch.device("cpu")
    sources, errors = _opened(recipe)
    with ExpertCheck(
        sources, mixed_dtypes=options.mixed_dtypes, missing_experts=bool(errors)
    ) as check:
        if check.names and not errors:
            with noted(errors):
                _check_patterns(options, check.names)
        data = None
        if uses_data(options):
            with noted(errors):
                data = _data(recipe, sources, device, progress)
        check.begin(errors)
        vectors = CheckpointTaskVectors(sources.base, sources.experts, check.names, device, check)
        details: dict[str, Any] = {
            "method": method.name,
            "experts": len(sources.experts),
            "merged_tensors": len(vectors.names),
            "copied_tensors": len(sources.base.tensors) - len(vectors.names),
        }
        statistics = method.statistics(vectors, options) if method.statistics else None
        if data is not None:
            # Experts run on data before anything is merged.
            check.finish()
            options, statistics, learned = _learned(
                data.answered(), method, options, vectors, statistics
            )
            details |= learned
        with atomic_folder(output) as folder:
            # Values are checked as they are merged; one that is wrong leaves nothing behind.
            tensors = _tensors(vectors, method, options, statistics)
            write_merged(folder, sources.base, tensors, options, progress)
            check.finish()
            warn_about_what_is_not_merged(sources)
            inputs = sources.sha256()
            manifest = MergeManifest(
                fingerprint=merge_fingerprint(recipe, inputs),
                recipe=recipe,
                inputs=inputs,
                details=MergeDetails.model_validate(details),
            )
            return finish_output(folder, manifest)


def _opened(recipe: Recipe) -> tuple[Sources, list[EpmqError]]:
    """Base and experts as far as they can be opened, and what is wrong with the others.

    Raises:
        EpmqError: there is nothing to compare; names missing data too, where merging takes some.
    """
    sources, problems = open_available(recipe)
    if sources is not None and not problems:
        return sources, []
    errors: list[EpmqError] = [MismatchError("models cannot be opened", problems)]
    if sources is None:
        # Without models data cannot be checked further, but paths can.
        taken = {
            name: task.model_copy(update={"evaluation": None})
            for name, task in recipe.tasks.items()
            if uses_data(recipe.merge)
        }
        if missing := missing_data(taken):
            errors.append(MismatchError("data", missing))
        raise joined("the recipe's inputs", errors)
    return sources, errors


def _data(recipe: Recipe, sources: Sources, device: torch.device, progress: Progress) -> RecipeData:
    """What the method's pass over calibration data, or the search for its scaling, takes."""
    options: MergeOptions = recipe.merge
    if isinstance(options, DataOptions):
        count, option, seed = options.samples, "merge.samples", options.seed
        purpose = f"merge.method {options.method}"
    else:
        assert isinstance(options, ScaledOptions), "no others ask for data"
        count, option, seed = options.search_samples, "merge.search_samples", 0
        purpose = "merge.search"
    data = load_data(
        recipe,
        sources,
        samples=count,
        option=option,
        seed=seed,
        heads=uses_heads(options),
        purpose=purpose,
        device=device,
        progress=progress,
    )
    if _is_searched(options):
        check_objective(data, options)
    return data


def _learned(
    data: RecipeData,
    method: MergeMethod[Any],
    options: MergeOptions,
    vectors: CheckpointTaskVectors,
    statistics: Any,
) -> tuple[MergeOptions, Any, dict[str, Any]]:
    """Options, statistics and what the manifest says, as calibration data have them."""
    details = dict(data.details)
    if method.calibrate is not None:
        calibrated = method.calibrate(data, vectors, options)
        statistics = calibrated.statistics
        details |= calibrated.details
    if _is_searched(options):
        found = search_scaling(data, method, options, vectors, statistics)
        options = options.at(found.value)
        details |= _search_details(found)
    return options, statistics, details


def _check_patterns(options: MergeOptions, names: tuple[str, ...]) -> None:
    """Make sure every pattern of ``layers`` names a tensor that is merged."""
    idle = [
        f"merge.layers: {pattern}"
        for pattern in options.layers
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if idle:
        raise RecipeError(f"{', '.join(idle)} matches no tensor; tensors are named like {names[0]}")


def _search_details(found: Tuned) -> dict[str, Any]:
    """What a search reports, as plain data."""
    return {
        "scaling": found.value,
        "search": [{"scaling": scaling, "loss": value} for scaling, value in found.curve.items()],
        "search_standard_error": found.standard_error,
    }


def _tensors(
    vectors: CheckpointTaskVectors,
    method: MergeMethod[Any],
    options: MergeOptions,
    statistics: Any,
) -> Iterator[tuple[str, Tensor, bool]]:
    """All of the base's tensors, checked: name, value, and whether it was merged."""
    base, merged = vectors.base, set(vectors.names)
    stacks = vectors.with_bases(vectors.names)
    for name in base.tensors:
        if name in merged:
            start, stack = next(stacks)
            context = Context(name, vectors.tasks, statistics)
            yield name, method.merge_tensor(start, stack, options, context).cpu(), True
        else:
            vectors.check.tensor(base, name)
            yield name, base.load(name), False
