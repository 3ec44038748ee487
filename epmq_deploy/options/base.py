"""The base of every option model, and unions of them built from registries."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Frozen options; unknown keys are errors. Recipe keys and CLI flags both come from these."""

    # Validators are built when first used: command lines read the fields of all models only.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


def without_effect(section: str, idle: Mapping[str, str]) -> list[str]:
    """Return one sentence per reason for the options of a section that have no effect.

    Args:
        section: of the recipe.
        idle: reasons by option.
    """
    sentences = []
    for why in dict.fromkeys(idle.values()):
        names = [f"{section}.{name}" for name, reason in idle.items() if reason == why]
        has, them = ("has", "it") if len(names) == 1 else ("have", "them")
        sentences.append(f"{', '.join(names)} {has} no effect {why}; leave {them} out")
    return sentences


def shared_fields(first: type[Options], second: type[Options]) -> set[str]:
    """Return the options that both classes inherit from a common base: they mean the same.

    A field without a default in the base does not count: each class has its own default for it.
    """
    common = set(first.__mro__) & set(second.__mro__)
    return {
        name
        for base in common
        if issubclass(base, Options)
        for name, field in base.model_fields.items()
        if not field.is_required()
    }


def union_by_method(members: Iterable[type[Options]]) -> Any:
    """Return a pydantic type that accepts any of ``members``, told apart by their ``method``."""
    return Annotated[reduce(or_, members), Field(discriminator="method")]


def given_for(layers: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Return the options that patterns give to one name; later patterns override earlier ones."""
    options: dict[str, Any] = {}
    for pattern, values in layers.items():
        if fnmatchcase(name, pattern):
            options |= values
    return options


def in_bytes(gibibytes: float | None) -> int | None:
    """Convert GiB to bytes; None, for no limit, stays None."""
    return None if gibibytes is None else int(gibibytes * 2**30)
