"""Interfaces of other libraries that they do not promise to keep are still there."""

import torch
from transformers.modeling_outputs import BaseModelOutput

from epmq_deploy.compat import has_bfloat16_units, map_instances


def test_instances_are_mapped_inside_nested_containers() -> None:
    tensor = torch.ones(2)
    tree = (tensor, {"a": [tensor, 3, None]}, BaseModelOutput(last_hidden_state=tensor))
    first, mapping, output = map_instances(torch.Tensor, lambda value: value + 1, tree)
    assert torch.equal(first, tensor + 1)
    assert torch.equal(mapping["a"][0], tensor + 1)
    assert mapping["a"][1:] == [3, None]
    assert isinstance(output, BaseModelOutput)
    assert torch.equal(output.last_hidden_state, tensor + 1)
    assert torch.equal(tree[0], torch.ones(2))


def test_processors_say_whether_they_multiply_bfloat16() -> None:
    assert has_bfloat16_units() in (True, False)
