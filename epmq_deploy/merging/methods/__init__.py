"""Merge methods: one module each, found by its ``METHOD``."""

from typing import TYPE_CHECKING, Any

from epmq_deploy import registry

if TYPE_CHECKING:
    from epmq_deploy.merging.base import MergeMethod

    MERGE_METHODS: registry.Registry[MergeMethod[Any, Any]]
else:
    # The same registry; here its entries are known to be whole methods.
    MERGE_METHODS = registry.MERGE_METHODS

__all__ = ["MERGE_METHODS"]
