"""Merge methods: one module each, found by its ``METHOD``."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from epmq_deploy.merging.method import MergeMethod


def _discover() -> dict[str, MergeMethod[Any]]:
    modules = (import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__))
    methods: list[MergeMethod[Any]] = [module.METHOD for module in modules]
    return {method.name: method for method in methods}


MERGE_METHODS = _discover()
