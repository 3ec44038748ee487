"""onnxruntime's execution providers: choosing one, and making sure that it is really used."""

import logging
from collections.abc import Iterable

import onnxruntime as ort
import torch

from epmq_deploy.errors import RecipeError

log = logging.getLogger(__name__)

AUTO = "auto"
RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"

_SUFFIX = "ExecutionProvider"
_CPU = f"CPU{_SUFFIX}"
_CUDA = f"CUDA{_SUFFIX}"
# What a provider is asked for to compute. Others (shapes, look-ups) cost next to nothing, and CUDA
# leaves some of them to the CPU on purpose.
_HEAVY = ("MatMul", "Gemm", "Conv", "Attention")


def provider_named(name: str) -> str:
    """Onnxruntime's name of an installed provider.

    Args:
        name: as onnxruntime has it or without ``ExecutionProvider``, in any case; ``auto`` is CUDA
            where there is a GPU for it, otherwise CPU.

    Raises:
        RecipeError: it is not installed; names those that are.
    """
    installed = ort.get_available_providers()
    if name == AUTO:
        # onnxruntime lists CUDA wherever its libraries are; torch knows whether a GPU is.
        return _CUDA if _CUDA in installed and torch.cuda.is_available() else _CPU
    for provider in installed:
        if name.lower() in (provider.lower(), provider.removesuffix(_SUFFIX).lower()):
            return str(provider)
    short = ", ".join(provider.removesuffix(_SUFFIX).lower() for provider in installed)
    raise RecipeError(f"provider {name!r} is not in this onnxruntime; it has {short} (or auto)")


def check_used(session: ort.InferenceSession, file: str, requested: str, *, strict: bool) -> str:
    """Return the provider that runs a session's graph.

    Args:
        session: created with ``RECORD_ASSIGNMENT`` on.
        file: the graph's, for messages.
        requested: onnxruntime's name of the provider it was created for.
        strict: whether another one is an error; a warning otherwise.

    Raises:
        RecipeError: ``strict``, and the provider could not be started, or multiplications would
            run elsewhere.
    """
    used = str(session.get_providers()[0])
    if used != requested:
        problem = (
            f"provider {requested} could not be started, as its libraries or its device are missing"
        )
    elif requested != _CPU and (elsewhere := _heavy_elsewhere(session, requested)):
        problem = f"{file}: provider {requested} leaves {', '.join(elsewhere)} to other providers"
    else:
        return used
    if strict:
        raise RecipeError(f"{problem}; use provider cpu or auto")
    log.warning("%s; the rest runs on %s", problem, _CPU)
    return used


def _heavy_elsewhere(session: ort.InferenceSession, requested: str) -> list[str]:
    """Types and numbers of multiplying nodes that another provider runs."""
    counts: dict[str, int] = {}
    for part in _parts_elsewhere(session, requested):
        for node in part.get_nodes():
            if any(kind in node.op_type for kind in _HEAVY):
                counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return [f"{count} {kind}" for kind, count in sorted(counts.items())]


def _parts_elsewhere(
    session: ort.InferenceSession, requested: str
) -> Iterable["ort.OrtEpAssignedSubgraph"]:
    parts = session.get_provider_graph_assignment_info()
    return (part for part in parts if part.ep_name != requested)
