"""Interfaces of other libraries that they do not promise to keep are still there."""

import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import BaseModelOutput

from epmq_deploy.compat import (
    adapter_prefix,
    classifier_modalities,
    has_bfloat16_units,
    map_instances,
    matching_patterns,
    renamed,
    runs_on_pillow,
    tensor_version,
    weight_steps,
)


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


def test_tensors_count_changes_in_place() -> None:
    tensor = torch.ones(2)
    before = tensor_version(tensor)
    tensor.add_(1)
    assert tensor_version(tensor) == before + 1


def test_model_types_say_what_their_classifiers_read() -> None:
    assert classifier_modalities("electra") == {"text"}
    assert classifier_modalities("vit") == {"image"}
    assert classifier_modalities("no such model") == set()


def test_names_in_files_become_those_of_the_loaded_model() -> None:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
    model = ViTForImageClassification(ViTConfig(**shape, intermediate_size=8, patch_size=4))
    steps = weight_steps(model)
    assert steps is not None
    names = dict(model.named_parameters())
    stored = "vit.encoder.layer.0.attention.attention.query.weight"
    assert renamed(stored, steps) in names
    assert all(renamed(name, steps) == name for name in names)


def test_processors_say_whether_they_run_on_pillow() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    assert runs_on_pillow(CLIPImageProcessorPil())
    assert not runs_on_pillow(object())


def test_kinds_of_adapters_say_how_their_factors_are_called() -> None:
    assert {kind: adapter_prefix(kind) for kind in ("LORA", "LOHA", "VERA")} == {
        "LORA": "lora_",
        "LOHA": "hada_",
        "VERA": "vera_lambda_",
    }


def test_patterns_match_the_ends_of_modules_names() -> None:
    patterns = {"uery": 1, "self.query": 2, ".*": 3}
    assert matching_patterns(patterns, "layer.0.self.query") == {"self.query": 2}
    assert matching_patterns({"uery": 1}, "layer.0.self.query") == {}
