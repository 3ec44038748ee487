"""Functions over tensors that merge methods share; modules are imported when first used."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epmq_deploy.merging.ops import essential, selection, signs, sparsify, spectral

    __all__ = ["essential", "selection", "signs", "sparsify", "spectral"]
else:
    from epmq_deploy.lazy import submodules

    __getattr__ = submodules(__name__)
