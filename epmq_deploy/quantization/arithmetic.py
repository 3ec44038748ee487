"""The dtypes that a quantization method computes in."""

from __future__ import annotations

from dataclasses import dataclass

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
            return torch.bfloat16 if _has_bfloat16_units() else torch.float32
        return torch.bfloat16 if self.products == "bfloat16" else torch.float32

    @property
    def solver_dtype(self) -> torch.dtype:
        """``solver`` as torch's."""
        return torch.float64 if self.solver == "float64" else torch.float32


def _has_bfloat16_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
