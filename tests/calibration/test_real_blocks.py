"""Batches at the entrance of every block: what the block receives while the whole model runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import ARCHITECTURES, build_tiny_models
from torch import Tensor, nn

from epmq_deploy.calibration.block_runner import BlockRunner, SameForAllTasks
from epmq_deploy.calibration.cache import ActivationCache
from epmq_deploy.models import Block, family_of

# Blocks that repeat, have arguments of their own, begin a stream, or read feature maps.
NAMES = (
    "albert",
    "albert-groups",
    "convnext",
    "deberta-v2",
    "deberta-v3",
    "gpt2",
    "llama",
    "modernbert",
    "swin",
)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_run_as_the_model_runs_them(tmp_path: Path, name: str) -> None:
    models = build_tiny_models(tmp_path, ARCHITECTURES[name])
    family = family_of(models.base)
    model = family.load(models.base)
    blocks, inputs = family.blocks(model), family.example_inputs(models.base, 3)
    whole = runs_of(model, blocks, lambda: family.embed(model, *inputs))
    runner = BlockRunner(
        family,
        blocks,
        {"task": lambda: [inputs]},
        SameForAllTasks(model),
        experts=SameForAllTasks(model),
        cache=ActivationCache(),
        device=torch.device("cpu"),
    )
    for block in blocks:
        runner.enter(block)
        module, batches = model.get_submodule(block.name), runner.batches["task"]
        assert len(batches) == block.repeats == len(whole[block.name])
        for batch, (entered, left) in zip(batches, whole[block.name], strict=True):
            assert batch.expert is not None
            for of_model in (batch.student, batch.expert):
                assert torch.equal(of_model.hidden.value(), entered)
                with torch.inference_mode():
                    assert torch.equal(of_model.run(module)[0], left)
        runner.advance(block)
        runner.advance_experts(block)


def runs_of(
    model: nn.Module, blocks: tuple[Block, ...], run: Any
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What every block received and gave, run by run."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {block.name: [] for block in blocks}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            seen[name].append((entered, output[0] if isinstance(output, tuple) else output))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True)
        for name in seen
    ]
    with torch.inference_mode():
        run()
    for handle in handles:
        handle.remove()
    return seen
