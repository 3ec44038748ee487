"""Text-generation models: loaded, merged, taken apart, generating."""

import json
from pathlib import Path

import pytest
import torch
from merged_text_generators import MergedTextGenerator, logits, two_streams
from safetensors.torch import load_file, save_file
from tiny_folder import edit
from tiny_text_generators import TEXT_GENERATORS, TEXT_TASKS, build_tiny_text_generators
from torch import Tensor, nn

from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.merging.preflight import check_experts
from epmq_deploy.merging.stage import merge
from epmq_deploy.models.experts import open_sources
from epmq_deploy.models.text_generation.base import TextPair
from epmq_deploy.recipe import load_recipe

TABLE = "model.embed_tokens.weight"


def test_a_folder_loads_as_transformers_loads_it(
    merged_text_generator: MergedTextGenerator,
) -> None:
    """Tied and untied, and whatever copies the files hold."""
    for folder in (
        merged_text_generator.models.base,
        merged_text_generator.models.expert("second"),
        merged_text_generator.folder,
    ):
        ours, theirs = (
            merged_text_generator.family.load(folder),
            merged_text_generator.models.load(folder),
        )
        embedding, output = theirs.get_input_embeddings(), theirs.get_output_embeddings()
        assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == torch.equal(
            embedding.weight, output.weight
        )
        assert torch.equal(
            logits(merged_text_generator, ours), logits(merged_text_generator, theirs)
        )


def test_the_merge_is_task_arithmetic_on_every_tensor(
    merged_text_generator: MergedTextGenerator,
) -> None:
    states = [
        merged_text_generator.models.load(folder).state_dict()
        for folder in (
            merged_text_generator.models.base,
            *(merged_text_generator.models.expert(task) for task in TEXT_TASKS),
        )
    ]
    found = merged_text_generator.models.load(merged_text_generator.folder).state_dict()
    base, *experts = states
    for name, start in base.items():
        wanted = start + 0.3 * sum(expert[name] - start for expert in experts)
        assert torch.allclose(found[name], wanted, atol=1e-6), name
    stored = load_file(merged_text_generator.folder / "model.safetensors")
    assert ("lm_head.weight" in stored) != merged_text_generator.models.architecture.settings[
        "tie_word_embeddings"
    ]


def test_an_expert_whose_output_layer_is_its_own_does_not_fit_a_tied_base(tmp_path: Path) -> None:
    models = build_tiny_text_generators(tmp_path, TEXT_GENERATORS["t5"])
    file = models.expert("first") / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["shared.weight"] + 1}, file)
    with pytest.raises(MismatchError, match=r"has lm_head\.weight, which the base lacks"):
        merge(load_recipe(models.recipe), tmp_path / "merged")


@two_streams
def test_one_embedding_serves_encoder_and_decoder(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    for file in merged_text_generator.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RecipeError, match=r"decoder\.embed_tokens\.weight differs from shared"):
        merged_text_generator.family.load(tmp_path)


def test_groups_are_the_layers_that_share_an_input(
    merged_text_generator: MergedTextGenerator,
) -> None:
    """Recorded while the model runs: who receives the same tensor, who the norm's output."""
    family = merged_text_generator.family
    model = family.load(merged_text_generator.folder)
    received: dict[str, Tensor] = {}
    gave: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, name=name: received.update({name: args[0]})
            )
        elif "norm" in name:
            module.register_forward_hook(
                lambda module, args, output, name=name: gave.update({name: output})
            )
    family.embed(model, *family.example_inputs(merged_text_generator.folder, 2))
    blocks = family.blocks(model)
    seen: dict[int, tuple[str, ...]] = {}
    order = list(received)
    for block in blocks:
        inside = {name for name in received if name.startswith(f"{block.name}.")}
        assert set(block.layers) == inside
        for group in block.groups:
            (place,) = {id(received[name]) for name in group.layers}
            if group.stream is None:
                assert place not in seen, "two groups share an input"
            seen[place] = group.layers
            if group.norm is not None:
                assert received[group.layers[0]] is gave[group.norm]
        firsts = [order.index(group.layers[0]) for group in block.groups]
        assert firsts == sorted(firsts)
    assert len(blocks) == sum(
        len(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and any(isinstance(child, nn.Module) and hasattr(child, "forward") for child in module)
        and type(module[0]).__name__.endswith(("Block", "DecoderLayer"))
    )


@two_streams
def test_cross_attention_reads_the_encoder_s_tokens(
    merged_text_generator: MergedTextGenerator,
) -> None:
    family = merged_text_generator.family
    blocks = family.blocks(family.load(merged_text_generator.folder))
    streams = {
        group.layers[0].rpartition(".")[2]
        for block in blocks
        for group in block.groups
        if group.stream == "encoder"
    }
    assert streams == {"k"}
    pairs = [TextPair("red", "yes no"), TextPair("red green blue", "no")]
    inputs = family.collate(merged_text_generator.folder, pairs)
    assert family.tokens(*inputs, stream="encoder").real.sum(1).tolist() == [2, 4]
    assert family.tokens(*inputs, stream="decoder").real.sum(1).tolist() == [3, 2]


def test_the_answers_written_are_those_of_transformers(
    merged_text_generator: MergedTextGenerator,
) -> None:
    """Batched and padded here, one by one there."""
    texts = ["first : red tree", "second : blue house runs sings", "red"]
    model = merged_text_generator.models.load(merged_text_generator.folder)
    found = merged_text_generator.family.generate(
        merged_text_generator.family.load(merged_text_generator.folder),
        merged_text_generator.folder,
        texts,
        6,
    )
    for text, answer in zip(texts, found, strict=True):
        ids, _ = merged_text_generator.family.prompts(merged_text_generator.folder, [text])
        written = model.generate(ids, max_new_tokens=6, do_sample=False)[0]
        start = 1 if model.config.is_encoder_decoder else ids.shape[1]
        assert answer == merged_text_generator.family.tokenizer(
            merged_text_generator.folder
        ).decode(written[start:], skip_special_tokens=True)


@pytest.mark.parametrize("merged_text_generator", ["mistral"], indirect=True)
def test_attention_in_a_window_is_refused(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    told = json.loads((merged_text_generator.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {"sliding_window": 8}))
    with pytest.raises(RecipeError, match="sliding window"):
        merged_text_generator.family.load(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
def test_tensors_decide_whether_embeddings_are_tied(tmp_path: Path, model_type: str) -> None:
    """Whatever the configs say, the same values under two names are one tensor."""
    models = build_tiny_text_generators(
        tmp_path, TEXT_GENERATORS[model_type], tie_word_embeddings=True
    )
    expert = models.expert("first")
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    edit(expert, lambda tensors: tensors.update({"lm_head.weight": tensors[TABLE].clone()}))
    names = check_experts(open_sources(load_recipe(models.recipe)))
    assert TABLE in names
    assert "lm_head.weight" not in names


def test_an_expert_may_tie_what_the_base_has_apart(tmp_path: Path) -> None:
    models = build_tiny_text_generators(tmp_path, TEXT_GENERATORS["llama"])
    expert = models.expert("first")
    edit(expert, lambda tensors: tensors.__delitem__("lm_head.weight"))
    with pytest.raises(MismatchError, match=r"expert 'first': lacks lm_head\.weight"):
        check_experts(open_sources(load_recipe(models.recipe)))
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    sources = open_sources(load_recipe(models.recipe))
    assert "lm_head.weight" in check_experts(sources)
    tensors = sources.experts["first"]
    assert torch.equal(tensors.load("lm_head.weight"), tensors.load(TABLE))
