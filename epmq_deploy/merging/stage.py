"""The merge stage: experts in, one Hugging Face folder out, tensor by tensor."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.artifacts.folders import atomic_folder, reserved
from epmq_deploy.artifacts.manifest import MergeDetails, MergeManifest, fingerprint
from epmq_deploy.artifacts.outputs import finish_output
from epmq_deploy.artifacts.space import require_space
from epmq_deploy.data.heads import heads_sha256
from epmq_deploy.data.loading import data_sha256, missing_data
from epmq_deploy.errors import EpmqError, MismatchError, RecipeError, joined, noted
from epmq_deploy.merging.base import FromData, FromTaskVectors, MergeMethod, Merger
from epmq_deploy.merging.data import RecipeData, load_data
from epmq_deploy.merging.depth import depth_factors
from epmq_deploy.merging.methods import MERGE_METHODS
from epmq_deploy.merging.origins import warn_about_origins
from epmq_deploy.merging.output import merged_size, write_merged
from epmq_deploy.merging.preflight import (
    ExpertCheck,
    other_inputs,
    warn_about_unmerged_changes,
)
from epmq_deploy.merging.scaling_search import check_objective, search_scaling
from epmq_deploy.merging.task_vectors import CheckpointTaskVectors
from epmq_deploy.models.experts import Sources, open_available
from epmq_deploy.models.input_sources import inputs_of_experts, write_inputs
from epmq_deploy.options import without_effect
from epmq_deploy.options.merging import MergeOptions, ScaledOptions
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.recipe import Recipe


def merge(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> MergeManifest:
    """Merge the recipe's experts into ``output``, a loadable Hugging Face folder.

    Tensors that are not merged are copied from the base: a CLIP base's text tower unless it was
    asked for, optional tensors that no expert holds, and integer tensors.

    Models, their layout, data and heads are checked before any weights are read; values are checked
    while they are merged (see ``ExpertCheck``). One error names everything that is wrong.

    Raises:
        MismatchError: models, data or heads do not fit; all problems at once.
        RecipeError: the output exists or another run is using it, or an option does not fit.
        DiskSpaceError: the disk has too little room.
        NumericsError: a merged value is NaN or infinite.
    """
    progress = progress or NoProgress()
    device = device or torch.device("cpu")
    with reserved(output, "merge", overwrite=overwrite):
        check_options(recipe)
        sources, errors = _open_sources(recipe)
        require_space(output, merged_size(sources.base, recipe.merge), "the merged model")
        with ExpertCheck(
            sources, mixed_dtypes=recipe.merge.mixed_dtypes, missing_experts=bool(errors)
        ) as check:
            if check.names and not errors:
                with noted(errors):
                    _check_patterns(recipe.merge, check.names)
            inputs: dict[str, Path] = {}
            with noted(errors):
                inputs = inputs_of_experts(recipe.tasks, sources)
            data = _load_data(recipe, sources, errors, device, progress)
            check.check_layout(errors)
            warn_about_origins(sources, check.names)
            differences = other_inputs(sources, recipe.tasks)
            vectors = CheckpointTaskVectors(
                sources.base, sources.experts, check.names, device, check
            )
            merger, details = _prepare(recipe.merge, sources, vectors, data, check)
            details |= {"input_differences": differences} if differences else {}
            with atomic_folder(output) as folder:
                tensors = _merged_and_copied(merger, vectors)
                write_merged(folder, sources, tensors, recipe.merge, progress)
                write_inputs(folder, inputs)
                check.check_remaining()
                warn_about_unmerged_changes(sources)
                return finish_output(folder, _manifest(recipe, sources, vectors, details))


def uses_data(options: MergeOptions) -> bool:
    """Tell whether merging needs calibration samples."""
    return options.sample_need is not None


def uses_heads(options: MergeOptions) -> bool:
    """Tell whether merging needs the tasks' heads."""
    return options.to_search is not None or MERGE_METHODS[options.method].needs_heads


def merge_fingerprint(recipe: Recipe, inputs: Mapping[str, str]) -> str:
    """Identify what decides the merge; ``inputs`` are the hashes of base and experts by role."""
    options: MergeOptions = recipe.merge
    decisive = dict(inputs)
    if recipe.base.part is not None:
        decisive["part"] = recipe.base.part
    decisive |= {
        f"inputs_from:{n}": t.inputs_from
        for n, t in recipe.tasks.items()
        if t.inputs_from != "base"
    }
    # Adapters in one file have one hash.
    decisive |= {
        f"adapter:{n}": t.adapter for n, t in recipe.tasks.items() if t.adapter is not None
    }
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
    by_depth = isinstance(recipe.merge, ScaledOptions) and recipe.merge.first_block != 1
    if recipe.base.part in ("text", "both") and by_depth:
        problems.append(
            f"base.part: {recipe.base.part}: merge.first_block knows the blocks of the image tower "
            "alone; leave it out, or choose base.part: image"
        )
    if recipe.base.part in ("text", "both") and uses_data(recipe.merge):
        problems.append(
            f"base.part: {recipe.base.part}: merging that takes calibration data (method "
            f"{method.name} or merge.search) runs the image tower alone; choose another method "
            "without search, or base.part: image"
        )
    if problems:
        raise RecipeError("; ".join(problems))


def _open_sources(recipe: Recipe) -> tuple[Sources, list[EpmqError]]:
    """Open base and experts; also return an error that names those that cannot be opened.

    Raises:
        EpmqError: the base or all experts cannot be opened; names missing data too, where merging
            needs data.
    """
    sources, problems = open_available(recipe)
    if sources is not None and not problems:
        return sources, []
    errors: list[EpmqError] = [MismatchError("models cannot be opened", problems)]
    if sources is None:
        # Without models data cannot be checked further, but paths can.
        tasks = {
            name: task.model_copy(update={"evaluation": None})
            for name, task in recipe.tasks.items()
            if uses_data(recipe.merge)
        }
        if missing := missing_data(tasks):
            errors.append(MismatchError("data", missing))
        raise joined("the recipe's inputs", errors)
    return sources, errors


def _check_patterns(options: MergeOptions, names: tuple[str, ...]) -> None:
    """Make sure that every pattern of ``layers`` names a tensor that is merged."""
    unmatched = [
        f"merge.layers: {pattern}"
        for pattern in options.layers
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if unmatched:
        raise RecipeError(
            f"{', '.join(unmatched)} matches no tensor; tensors are named like {names[0]}"
        )


def _load_data(
    recipe: Recipe,
    sources: Sources,
    errors: list[EpmqError],
    device: torch.device,
    progress: Progress,
) -> RecipeData | None:
    """Load calibration data and heads if merging needs them; add what is wrong to ``errors``."""
    options: MergeOptions = recipe.merge
    if options.sample_need is None:
        return None
    with noted(errors):
        data = load_data(
            recipe,
            sources,
            options.sample_need,
            heads=uses_heads(options),
            device=device,
            progress=progress,
        )
        if options.to_search is not None:
            check_objective(data, options.to_search)
        return data
    return None


def _prepare(
    options: MergeOptions,
    sources: Sources,
    vectors: CheckpointTaskVectors,
    data: RecipeData | None,
    check: ExpertCheck,
) -> tuple[Merger[Any, Any], dict[str, Any]]:
    """Compute statistics and search the scaling; also return details for the manifest."""
    method: MergeMethod[Any, Any] = MERGE_METHODS[options.method]
    statistics: Any = None
    details: dict[str, Any] = {}
    if isinstance(method.statistics, FromTaskVectors):
        statistics = method.statistics.compute(vectors, options)
    if data is not None:
        # Experts run on data before all of their weights have been merged, and so checked.
        check.check_remaining()
        data = data.answered()
        details |= data.details
        if isinstance(method.statistics, FromData):
            calibrated = method.statistics.compute(data, vectors, options)
            statistics = calibrated.statistics
            details |= calibrated.details
    factors = _scaling_factors(options, sources, vectors.names)
    merger = Merger(method, options, vectors.tasks, statistics, factors)
    if data is not None and options.to_search is not None:
        tuned = search_scaling(data, merger, options.to_search, vectors)
        merger = replace(merger, options=options.to_search.at(tuned.value))
        details["scaling"] = tuned.value
        details["search"] = [
            {"scaling": scaling, "loss": loss} for scaling, loss in tuned.curve.items()
        ]
        details["search_standard_error"] = tuned.standard_error
    return merger, details


def _scaling_factors(
    options: MergeOptions, sources: Sources, names: Sequence[str]
) -> dict[str, float]:
    """Return the factors on the scaling by depth; none where all blocks are scaled alike."""
    if not isinstance(options, ScaledOptions) or options.first_block == 1:
        return {}
    family = sources.family
    return depth_factors(
        family.blocks(family.load(sources.base.folder)), names, options.first_block
    )


def _merged_and_copied(
    merger: Merger[Any, Any], vectors: CheckpointTaskVectors
) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield all of the base's tensors: name, value, and whether it was merged."""
    merged_names = set(vectors.names)
    stacks = vectors.with_bases(vectors.names)
    for name in vectors.base.tensors:
        if name in merged_names:
            base, task_vectors = next(stacks)
            yield name, merger.merge(name, base, task_vectors).cpu(), True
        else:
            yield name, vectors.from_base(name), False


def _manifest(
    recipe: Recipe, sources: Sources, vectors: CheckpointTaskVectors, details: Mapping[str, Any]
) -> MergeManifest:
    inputs = sources.sha256()
    counts = {
        "method": recipe.merge.method,
        "experts": len(sources.experts),
        "merged_tensors": len(vectors.names),
        "copied_tensors": len(sources.base.tensors) - len(vectors.names),
    }
    return MergeManifest(
        fingerprint=merge_fingerprint(recipe, inputs),
        recipe=recipe,
        inputs=inputs,
        details=MergeDetails.model_validate(counts | dict(details)),
    )
