"""Deployment targets: one module each, found by its ``TARGET``; what follows from choosing one."""

from epmq_deploy.exporters.targets.base import Target
from epmq_deploy.registry import Registry

TARGETS: Registry[Target] = Registry("export target", __name__, "TARGET", "epmq_deploy.targets")

__all__ = ["TARGETS", "Target"]
