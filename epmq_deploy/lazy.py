"""Modules that are imported when they are first used.

A method's options and its computation stand in one file. Whoever only wants the options, such as
the command line while it reads its flags, must not wait seconds for torch. A file that command
lines read therefore begins so::

    from __future__ import annotations

    from typing import TYPE_CHECKING

    from epmq_deploy.lazy import torch

    if TYPE_CHECKING:
        from torch import Tensor

A file that imports torch in the usual way works just as well and makes every command start later.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule(ModuleType):
    """Stands for a module and imports it when one of its attributes is first read.

    Args:
        name: dotted name of the module.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


def submodules(package: str) -> Callable[[str], ModuleType]:
    """Return a ``__getattr__`` for a package that imports its modules when they are first used.

    Args:
        package: dotted name of the package.
    """

    def load(name: str) -> ModuleType:
        module = f"{package}.{name}"
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from error

    return load


def exports(package: str, names_of: Mapping[str, Iterable[str]]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a package that imports its public names when first used.

    Args:
        package: dotted name of the package.
        names_of: names by the dotted name of the module that defines them.
    """
    module_of = {name: module for module, names in names_of.items() for name in names}

    def load(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(module_of[name]), name)

    return load


if TYPE_CHECKING:
    import numpy as numpy
    import torch as torch
else:
    numpy = LazyModule("numpy")
    torch = LazyModule("torch")
