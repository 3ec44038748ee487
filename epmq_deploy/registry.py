"""Registries: things of one kind by name, discovered once, open to other packages.

A registry holds what the modules of one package offer under an agreed name, and what other
installed packages offer through an entry point, so that adding a method, a family or a format is
adding one file.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any, Generic, Protocol, TypeVar

from epmq_deploy.errors import RecipeError


class Entry(Protocol):
    """What every registry holds."""

    @property
    def name(self) -> str:
        """What users call it."""
        ...


class Method(Entry, Protocol):
    """A method that users choose in a recipe."""

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        ...

    @property
    def options(self) -> type[Any]:
        """Its option model."""
        ...


class PublishedMethod(Method, Protocol):
    """A method that names its publication."""

    @property
    def source(self) -> str:
        """Where it is published."""
        ...


E = TypeVar("E", bound=Entry, covariant=True)


class Registry(Mapping[str, E], Generic[E]):
    """Entries by name, in the order of their modules, then those of other packages.

    Args:
        kind: what an entry is called in messages, e.g. ``merge method``.
        package: dotted name of the package whose modules are searched, subpackages included.
        attribute: what a module calls its entry.
        group: entry point group that other packages register in.
    """

    def __init__(self, kind: str, package: str, attribute: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._package = package
        self._attribute = attribute

    def __getitem__(self, name: str) -> E:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def named(self, name: str) -> E:
        """Return the entry of this name.

        Raises:
            RecipeError: there is none; names all that there are.
        """
        if name not in self._entries:
            raise RecipeError(f"unknown {self.kind} {name!r}; choose from {', '.join(self)}")
        return self._entries[name]

    @cached_property
    def _entries(self) -> dict[str, E]:
        offered = [
            (name, getattr(module, self._attribute))
            for name in _module_names(self._package)
            if hasattr(module := import_module(name), self._attribute)
        ]
        offered += [(point.value, point.load()) for point in entry_points(group=self.group)]
        entries: dict[str, E] = {}
        origins: dict[str, str] = {}
        for origin, entry in offered:
            if entry.name in entries:
                raise ValueError(
                    f"{self.kind} {entry.name!r} is defined twice: in {origins[entry.name]} and "
                    f"in {origin}"
                )
            entries[entry.name] = entry
            origins[entry.name] = origin
        return entries


def _module_names(package: str) -> Iterator[str]:
    """Yield the dotted names of a package's modules, those of its subpackages in their place."""
    for info in iter_modules(import_module(package).__path__):
        name = f"{package}.{info.name}"
        if info.ispkg:
            yield from _module_names(name)
        else:
            yield name


MERGE_METHODS: Registry[PublishedMethod] = Registry(
    "merge method", "epmq_deploy.merging.methods", "METHOD", "epmq_deploy.merge_methods"
)
QUANTIZATION_METHODS: Registry[PublishedMethod] = Registry(
    "quantization method",
    "epmq_deploy.quantization.methods",
    "METHOD",
    "epmq_deploy.quantization_methods",
)
