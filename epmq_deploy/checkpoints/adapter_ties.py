"""Adapters of a base that holds one tensor where the model has two: embedding and output layer."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from epmq_deploy.checkpoints.tensors import TensorInfo, same_values


@dataclass
class Ties:
    """What becomes of the tensors that the base stores once.

    Attributes:
        whole: the adapter's whole tensors without copies.
        repeated: modules whose factors only repeat those of the module they are tied to.
        problems: one sentence for each pair that would have to differ.
        warnings: one sentence for each tensor that is changed for both.
    """

    whole: dict[str, TensorInfo]
    repeated: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def resolve_ties(
    once: Mapping[str, str],
    base: Mapping[str, TensorInfo],
    whole: Mapping[str, TensorInfo],
    trained: Collection[str],
    modules: Mapping[str, tuple[str, Mapping[str, TensorInfo]]],
    *,
    ensured: bool,
) -> Ties:
    """Decide what an adapter means for tensors that the base stores once.

    ``peft`` changes the one tensor wherever factors are merged into either of the two.

    Args:
        once: name of the copy that the base does not hold, to that of the tensor it holds.
        base: its tensors by canonical name.
        whole: the adapter's whole tensors by canonical name.
        trained: the names of those that were trained, not only saved along.
        modules: the module whose factors change a tensor, and these, by the tensor's name.
        ensured: whether the adapter's settings say that both are changed alike.
    """
    ties = Ties(dict(whole))
    for copy, original in once.items():
        if copy in whole:
            if same_values(whole[copy], whole.get(original, base[original])):
                del ties.whole[copy]
            else:
                ties.problems.append(_differ(copy, original))
        elif (
            original in trained
            and whole[original].shape == base[original].shape
            and not same_values(whole[original], base[original])
        ):
            ties.problems.append(_differ(copy, original))
        if copy in modules and original in modules:
            (module, factors), (_, others) = modules[copy], modules[original]
            if ensured or _same_factors(factors, others):
                ties.repeated.add(module)
            else:
                ties.problems.append(_differ(copy, original))
        elif copy in modules or original in modules:
            module, _ = modules[copy if copy in modules else original]
            ties.warnings.append(
                f"the adapter changes {module} alone, but the base holds {copy} and {original} as "
                "one tensor: both are changed, as peft's merge_and_unload does"
            )
    return ties


def _differ(copy: str, original: str) -> str:
    return (
        f"{copy} and {original} would differ, and the base holds them as one tensor; store both in "
        "the base (tie_word_embeddings: false)"
    )


def _same_factors(one: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo]) -> bool:
    parts, others = (
        {key.rpartition(".")[2]: info for key, info in factors.items()} for factors in (one, other)
    )
    return parts.keys() == others.keys() and all(
        same_values(parts[name], others[name]) for name in parts
    )
