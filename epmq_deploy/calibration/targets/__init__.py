"""Calibration targets: one module each, found by its ``TARGET``."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from epmq_deploy.calibration.target import CalibrationTarget


def _discover() -> dict[str, CalibrationTarget[Any]]:
    modules = (import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__))
    targets: list[CalibrationTarget[Any]] = [module.TARGET for module in modules]
    return {target.name: target for target in targets}


TARGETS = _discover()
