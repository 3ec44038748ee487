"""The recipe: what a user asks for, one frozen model per section."""

from epmq_deploy.recipe.overrides import override, with_preflight
from epmq_deploy.recipe.reading import absolute_paths, load_recipe, parse_complete, parse_recipe
from epmq_deploy.recipe.sections import (
    LABEL_COLUMN,
    OPSETS,
    SAME_AS_HEAD,
    Base,
    DataSource,
    EvalOptions,
    ExportOptions,
    Head,
    MetricName,
    Preflight,
    ProblemType,
    Recipe,
    Task,
    TaskName,
)

__all__ = [
    "LABEL_COLUMN",
    "OPSETS",
    "SAME_AS_HEAD",
    "Base",
    "DataSource",
    "EvalOptions",
    "ExportOptions",
    "Head",
    "MetricName",
    "Preflight",
    "ProblemType",
    "Recipe",
    "Task",
    "TaskName",
    "absolute_paths",
    "load_recipe",
    "override",
    "parse_complete",
    "parse_recipe",
    "with_preflight",
]
