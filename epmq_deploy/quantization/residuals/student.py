"""The student of every task: the model with the task's own corrections."""

from collections.abc import Collection

from torch import Tensor, nn

from epmq_deploy.models.modules import linear_layer
from epmq_deploy.quantization.residuals.factors import ModelResiduals


class TaskStudents:
    """One model in memory whose corrected layers take each task's weights in turn.

    Args:
        model: as all tasks share it; changed in place, and as it was after ``share``.
        residuals: of its layers, whose shared weights are final.
    """

    def __init__(self, model: nn.Module, residuals: ModelResiduals | None = None) -> None:
        self._model = model
        self._residuals = residuals or ModelResiduals()
        # What layers that carry a task's weights now have in common, by name.
        self._shared: dict[str, tuple[nn.Linear, Tensor, Tensor | None]] = {}
        self._current: str | None = None

    def add(self, residuals: ModelResiduals) -> None:
        """Have further layers, whose shared weights are final, corrected from now on."""
        self.share()
        self._residuals = self._residuals.joined(residuals)

    def become(self, task: str, *, without: Collection[str] = ()) -> nn.Module:
        """Return the model with a task's corrections, valid until the next call."""
        skipped = tuple(f"{name}." for name in without)
        names = [name for name in self._residuals.layers if not name.startswith(skipped)]
        return self._take(task, names)

    def module(self, task: str, name: str) -> nn.Module:
        """Return one module with a task's corrections, valid until the next call."""
        inside = [layer for layer in self._residuals.layers if layer.startswith(f"{name}.")]
        return self._take(task, inside).get_submodule(name)

    def share(self) -> None:
        """Give the model the weights that all tasks share."""
        for layer, weight, bias in self._shared.values():
            layer.weight.data = weight
            if bias is not None:
                layer.bias.data = bias
        self._shared.clear()
        self._current = None

    def _take(self, task: str, names: Collection[str]) -> nn.Module:
        if self._shared.keys() != set(names):
            self.share()
        if self._current == task:
            return self._model
        self._current = task
        if not names:
            return self._model
        number = self._residuals.tasks.index(task)
        for name in names:
            residuals = self._residuals.layers[name]
            if name not in self._shared:
                layer = linear_layer(self._model, name)
                own = None if layer.bias is None else layer.bias.data
                self._shared[name] = layer, layer.weight.data, own
            layer, weight, bias = self._shared[name]
            layer.weight.data = weight + residuals.weight(number).to(weight)
            change = residuals.bias_change(number)
            if change is not None and bias is not None:
                layer.bias.data = bias + change.to(bias)
        return self._model
