"""Creating onnxruntime sessions."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from epmq_deploy.device import DeviceName
from epmq_deploy.errors import NumericsError, RecipeError

log = logging.getLogger(__name__)

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Graph:
    """One exported graph, ready to run.

    Args:
        file: the ONNX file.
        provider: ``auto`` takes CUDA where onnxruntime can run it.
        threads: intra-op threads; onnxruntime's default when absent.
        session_config: session options the graph was exported for.

    Raises:
        RecipeError: the provider that was asked for is not really used.
        NumericsError: onnxruntime cannot load the file.
    """

    def __init__(
        self,
        file: Path,
        *,
        provider: DeviceName = "auto",
        threads: int | None = None,
        session_config: Mapping[str, str] | None = None,
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        # Several sessions live side by side here; idle ones must not keep cores busy.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for key, value in (session_config or {}).items():
            options.add_session_config_entry(key, value)
        wanted = _wanted(provider)
        try:
            self._session = ort.InferenceSession(file, options, providers=wanted)
        except Exception as error:  # onnxruntime raises many types
            raise NumericsError(f"{file}: onnxruntime cannot load it ({error})") from error
        self.provider: str = self._session.get_providers()[0]
        if self.provider != wanted[0] and provider == "auto":
            log.warning("onnxruntime cannot use %s here; it runs on %s", wanted[0], self.provider)
        elif self.provider != wanted[0]:
            raise RecipeError(
                f"provider {wanted[0]} was asked for, but onnxruntime uses "
                f"{self.provider}; it has {', '.join(ort.get_available_providers())}"
            )
        self.input_names = tuple(item.name for item in self._session.get_inputs())
        self.output_names = tuple(item.name for item in self._session.get_outputs())
        # Open axes by their names.
        self.input_shapes = {item.name: tuple(item.shape) for item in self._session.get_inputs()}

    def run(
        self, inputs: Sequence[Tensor], outputs: Sequence[str] | None = None
    ) -> Mapping[str, np.ndarray[Any, Any]]:
        """Run a batch; arrays by output name, all outputs when none are named."""
        names = list(outputs or self.output_names)
        feed = {name: value.numpy() for name, value in zip(self.input_names, inputs, strict=True)}
        return dict(zip(names, self._session.run(names, feed), strict=True))


def _wanted(provider: DeviceName) -> list[str]:
    """Providers to hand to onnxruntime, best first."""
    if provider != "auto":
        return [_PROVIDERS[provider]]
    # onnxruntime lists CUDA wherever its libraries are installed; torch knows whether a GPU is.
    cuda = torch.cuda.is_available() and _PROVIDERS["cuda"] in ort.get_available_providers()
    return [_PROVIDERS["cuda"], _PROVIDERS["cpu"]] if cuda else [_PROVIDERS["cpu"]]
