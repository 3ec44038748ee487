"""Adapters in the layout of ``peft``, read as whole checkpoints.

Only the tensors that an adapter changes differ from the base's. They are computed on demand, module
by module, in float32, and rounded to the base's dtype.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor

from epmq_deploy.checkpoints.adapter_keys import AdapterTensors, adapter_tensors
from epmq_deploy.checkpoints.adapter_layers import AdaptedModule
from epmq_deploy.checkpoints.adapter_settings import ADAPTER_FILE, AdapterSettings
from epmq_deploy.checkpoints.adapter_ties import Ties, resolve_ties
from epmq_deploy.checkpoints.tensors import (
    ComputedTensor,
    Rename,
    TensorInfo,
    TransposedTensor,
    concatenated,
    renamed,
    stored_tensors,
)
from epmq_deploy.checkpoints.wrappers import unwrapped
from epmq_deploy.errors import MismatchError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Target:
    """Canonical names of the tensors of one module that an adapter changes.

    Attributes:
        weights: several where the base splits the module's weight along the first dimension.
        biases: as ``weights``; none where the module has no bias.
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...]


def adapted_tensors(
    folder: Path,
    base: Mapping[str, TensorInfo],
    rename: Rename,
    tied: Mapping[str, str],
    is_head: Callable[[str], bool],
    adapter: str | None = None,
) -> dict[str, TensorInfo]:
    """List all tensors of the base with an adapter applied, by canonical name.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: tensors of the base by canonical name.
        rename: stored name to canonical name.
        tied: canonical names of tensors that the base may hold as others, to those of the others.
        is_head: whether a canonical name belongs to a task's head.
        adapter: which one is wanted where the file holds several; None for the only one.

    Raises:
        RecipeError: it cannot be merged into a base, or it is not clear which adapter is meant.
        MismatchError: it does not fit the base; names every tensor.
    """
    settings = AdapterSettings.read(folder)
    file = folder / ADAPTER_FILE
    tensors = adapter_tensors(stored_tensors([file]), settings.prefix, adapter, str(file))
    once = {copy: name for copy, name in tied.items() if copy not in base and name in base}
    names = [*tensors.whole, *(f"{module}.weight" for module in tensors.modules)]
    rename = unwrapped(names, rename, lambda name: name in base or name in once, folder)
    plan = _Plan(tensors, settings, base, rename, once, is_head)
    problems = plan.problems()
    if problems:
        raise MismatchError(f"{folder}: the adapter does not fit the base", problems)
    for text in plan.ties.warnings:
        log.warning("%s: %s", folder, text)
    return plan.result()


@dataclass(frozen=True)
class _Plan:
    """How an adapter is applied to a base.

    Attributes:
        tensors: of the adapter.
        settings: of the adapter.
        base: tensors of the base by canonical name.
        rename: stored name to canonical name.
        once: names of tensors that the base holds as others, to those of the others.
        is_head: whether a canonical name belongs to a task's head.
    """

    tensors: AdapterTensors
    settings: AdapterSettings
    base: Mapping[str, TensorInfo]
    rename: Rename
    once: Mapping[str, str]
    is_head: Callable[[str], bool]

    def problems(self) -> list[str]:
        """Say where the adapter does not fit the base."""
        problems = [
            f"{info.key} is neither part of the adapter, nor a tensor of the base, nor in "
            "modules_to_save"
            for name, info in self.tensors.whole.items()
            if not self._is_known(name)
        ]
        if not (self.tensors.modules or self.tensors.whole):
            problems.append("the adapter has no tensors")
        for module in self.tensors.modules:
            missing = [name for name in self._names(f"{module}.weight") if not self._holds(name)]
            if missing:
                problems.append(f"{module} is not a layer of the base (no tensor {missing[0]})")
        problems += self.ties.problems
        return problems + [text for module, _ in self.modules for text in module.problems()]

    def result(self) -> dict[str, TensorInfo]:
        """Return all tensors of the base with the adapter applied."""
        tensors = dict(self.start)
        for module, target in self.modules:
            weight = partial(_part, module.merged_weight)
            tensors |= _computed(weight, target.weights, self.start)
            if self.settings.changes_biases:
                tensors |= _computed(partial(_part, module.merged_bias), target.biases, self.start)
        return tensors

    @cached_property
    def start(self) -> dict[str, TensorInfo]:
        """The base's tensors, with those that the adapter holds whole in their place."""
        return {**self.base, **self.ties.whole}

    @cached_property
    def modules(self) -> list[tuple[AdaptedModule, _Target]]:
        """The modules that are changed, with the names of their tensors."""
        largest = self._largest_modules()
        return [
            (
                AdaptedModule(
                    module,
                    self.settings,
                    self._tensor(target.weights),
                    self._tensor(target.biases) if target.biases else None,
                    self.tensors.modules[module] | self.tensors.shared,
                    largest,
                    # What the file holds of the weight is what was left of it.
                    self.settings.decomposes_base and target.weights[0] not in self.ties.whole,
                ),
                target,
            )
            for module, target in self._targets.items()
            if module not in self.ties.repeated
        ]

    @cached_property
    def ties(self) -> Ties:
        """What the adapter means for tensors that the base holds once."""
        trained = {
            part
            for name in self.tensors.whole
            if self.settings.saves_whole(name)
            for part in self._names(name)
        }
        changed = {
            name: module
            for module in self.tensors.modules
            for name in self._names(f"{module}.weight")
        }
        return resolve_ties(
            self.once,
            self.base,
            self._whole(),
            trained,
            {name: (module, self.tensors.modules[module]) for name, module in changed.items()},
            ensured=self.settings.ensures_ties,
        )

    @cached_property
    def _targets(self) -> dict[str, _Target]:
        """The tensors of every module that the base has."""
        targets = {}
        for module in self.tensors.modules:
            weights, biases = (
                tuple(self.once.get(name, name) for name in self._names(f"{module}.{part}"))
                for part in ("weight", "bias")
            )
            biases = biases if self.start.keys() >= set(biases) else ()
            if self.start.keys() >= set(weights):
                targets[module] = _Target(weights, biases)
        return targets

    def _largest_modules(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights with most inputs and outputs, where these matter."""
        if not self.settings.shares_tensors:
            return {}
        shapes = {name: self._tensor(one.weights).shape for name, one in self._targets.items()}
        return {
            name: shapes[name]
            for dimension in (0, 1)
            for name in sorted(shapes, key=lambda name: shapes[name][dimension])[-1:]
        }

    def _whole(self) -> dict[str, TensorInfo]:
        """Return the adapter's whole tensors by canonical name, in the base's dtype."""
        return {
            part: _as_in_base(stored, self.base.get(part))
            for name, info in self.tensors.whole.items()
            if self._is_known(name)
            for part, stored in renamed(info, self.rename(name)).items()
        }

    def _is_known(self, name: str) -> bool:
        """Whether a whole tensor was trained, or is the base's or a head's."""
        return self.settings.saves_whole(name) or all(
            self._holds(part) or self.is_head(part) for part in self._names(name)
        )

    def _holds(self, name: str) -> bool:
        return name in self.base or name in self.once

    def _names(self, stored: str) -> tuple[str, ...]:
        names = self.rename(stored)
        return (names,) if isinstance(names, str) else names

    def _tensor(self, names: Sequence[str]) -> TensorInfo:
        """Return the weight of a module as files hold it."""
        first = self.start[names[0]]
        if isinstance(first, TransposedTensor):
            return first.original
        return concatenated([self.start[name] for name in names])


def _as_in_base(info: TensorInfo, original: TensorInfo | None) -> TensorInfo:
    """Return a tensor in the dtype of the one it replaces: ``peft`` trains it in float32."""
    if original is None or original.dtype == info.dtype or not info.dtype.is_floating_point:
        return info
    return ComputedTensor(info.shape, original.dtype, info.load)


def _computed(
    part: Callable[[int, int], Tensor], names: Sequence[str], start: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Return tensors that are computed together and split along the first dimension."""
    tensors: dict[str, TensorInfo] = {}
    first = 0
    for name in names:
        info = start[name]
        rows = info.stored_shape[0]
        computed = ComputedTensor(info.stored_shape, info.dtype, partial(part, first, rows))
        transposed = isinstance(info, TransposedTensor)
        tensors[name] = TransposedTensor.of(computed) if transposed else computed
        first += rows
    return tensors


def _part(compute: Callable[[], Tensor], first: int, rows: int) -> Tensor:
    return compute().narrow(0, first, rows)
