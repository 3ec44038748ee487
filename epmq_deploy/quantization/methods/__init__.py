"""Quantization methods: one module each, found by its ``METHOD``."""

from typing import TYPE_CHECKING, Any

from epmq_deploy import registry

if TYPE_CHECKING:
    from epmq_deploy.quantization.base import QuantizationMethod

    QUANTIZATION_METHODS: registry.Registry[QuantizationMethod[Any]]
else:
    # The same registry; here its entries are known to be whole methods.
    QUANTIZATION_METHODS = registry.QUANTIZATION_METHODS

__all__ = ["QUANTIZATION_METHODS"]
