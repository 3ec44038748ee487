"""Scaling that rises with depth (LiNeS, Wang et al., arXiv 2410.17146).

Early blocks compute what all tasks share, so they stay closer to the base.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from epmq_deploy.models import Block


def depth_factors(blocks: Sequence[Block], names: Iterable[str], first: float) -> dict[str, float]:
    """Return the factor on the scaling of every tensor.

    Args:
        blocks: of the model, in the order they run.
        names: of the tensors.
        first: the factor in the first block of each stream, and outside of blocks. It changes
            linearly to 1 in the stream's last block.
    """
    streams: defaultdict[str, list[str]] = defaultdict(list)
    for block in blocks:
        streams[block.stream].append(block.name)
    by_block = {
        name: first + (1 - first) * (index / (len(stream) - 1) if len(stream) > 1 else 1.0)
        for stream in streams.values()
        for index, name in enumerate(stream)
    }
    return {
        name: next(
            (factor for block, factor in by_block.items() if name.startswith(f"{block}.")), first
        )
        for name in names
    }
