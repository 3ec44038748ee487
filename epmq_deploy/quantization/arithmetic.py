"""The dtypes that a quantization method computes in."""

from __future__ import annotations

from dataclasses import dataclass

from epmq_deploy.compat import has_bfloat16_units
from epmq_deploy.lazy import torch


@dataclass(frozen=True)
class Arithmetic:
    """In which dtypes a method computes.

    Attributes:
        products: of activations, in blocks and in statistics: ``auto``, ``float32`` or
            ``bfloat16``.
        solver: of Hessians and codes: ``float32`` or ``float64``.
    """

    products: str = "float32"
    solver: str = "float64"

    @property
    def products_dtype(self) -> torch.dtype:
        """``products`` as torch's."""
        if self.products == "auto":
            return torch.bfloat16 if has_bfloat16_units() else torch.float32
        return torch.bfloat16 if self.products == "bfloat16" else torch.float32

    @property
    def solver_dtype(self) -> torch.dtype:
        """``solver`` as torch's."""
        return torch.float64 if self.solver == "float64" else torch.float32
