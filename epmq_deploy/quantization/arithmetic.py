"""The dtypes that a quantization method computes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from epmq_deploy.compat import has_bfloat16_units
from epmq_deploy.lazy import torch


@dataclass(frozen=True)
class Arithmetic:
    """In which dtypes a method computes.

    Attributes:
        products: of activations, in blocks and in statistics; ``auto`` is bfloat16 where the
            processor has units for it.
        solver: of Hessians and codes.
    """

    products: Literal["auto", "float32", "bfloat16"] = "float32"
    solver: Literal["float32", "float64"] = "float64"

    @property
    def products_dtype(self) -> torch.dtype:
        """``products`` as torch's dtype on this processor."""
        if self.products == "auto":
            return torch.bfloat16 if has_bfloat16_units() else torch.float32
        return torch_dtype(self.products)

    @property
    def solver_dtype(self) -> torch.dtype:
        """``solver`` as torch's dtype."""
        return torch_dtype(self.solver)


def torch_dtype(name: Literal["float64", "float32", "bfloat16", "float16"]) -> torch.dtype:
    """Return torch's dtype of this name."""
    dtypes = {
        "float64": torch.float64,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    return dtypes[name]
