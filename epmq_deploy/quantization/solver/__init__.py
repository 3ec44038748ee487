"""Functions over tensors that choose grids and codes; modules are imported when first used."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epmq_deploy.quantization.solver import gptq, grid, hessian, refine

    __all__ = ["gptq", "grid", "hessian", "refine"]
else:
    from epmq_deploy.lazy import submodules

    __getattr__ = submodules(__name__)
