"""BERT: names, heads, texts."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_text import TEXT_TASKS, WIDTH, TinyText

from epmq_deploy.data.heads import build_heads, load_heads, save_heads
from epmq_deploy.data.samples import batches
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.merging.preflight import check_experts
from epmq_deploy.models.encoders.bert import FAMILY
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.models.tokens import TokenWeights
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.sequential import quantize_model
from epmq_deploy.quantization.stage import calibration_samples
from epmq_deploy.recipe import Head, load_recipe, override


@pytest.fixture
def copy(tiny_text: TinyText, tmp_path: Path) -> TinyText:
    """The tiny text models, to be changed."""
    shutil.copytree(tiny_text.folder, tmp_path / "text")
    return TinyText(tmp_path / "text")


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Add, replace or (None) remove tensors of a folder, dots written as ``__``."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


def test_encoder_is_merged_and_heads_are_no_mismatch(
    tiny_text: TinyText, caplog: pytest.LogCaptureFixture
) -> None:
    sources = open_sources(load_recipe(tiny_text.recipe))
    with caplog.at_level(logging.WARNING):
        names = check_experts(sources)
    assert set(names) == {
        name for name in sources.base.tensors if name.startswith(("embeddings.", "encoder."))
    }
    assert "not merged" not in caplog.text


def test_position_ids_are_no_weights(copy: TinyText) -> None:
    position_ids = torch.arange(24)[None]
    rewrite(copy.base, embeddings__position_ids=position_ids)
    rewrite(copy.expert("tone"), bert__embeddings__position_ids=position_ids)
    names = check_experts(open_sources(load_recipe(copy.recipe)))
    assert "embeddings.position_ids" not in names


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("bert.encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.weight"),
        ("embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight"),
        ("bert.embeddings.LayerNorm.beta", "embeddings.LayerNorm.bias"),
        ("classifier.weight", "classifier.weight"),
    ],
)
def test_names_of_all_releases_mean_the_same(stored: str, canonical: str) -> None:
    assert FAMILY.canonical_key(stored) == canonical


def test_two_tensors_of_one_meaning_are_refused(copy: TinyText) -> None:
    rewrite(copy.base, bert__embeddings__LayerNorm__gamma=torch.ones(WIDTH))
    with pytest.raises(MismatchError, match=r"both mean embeddings\.LayerNorm\.weight"):
        open_sources(load_recipe(copy.recipe))


def test_a_base_with_prefixes_loads_as_one_without(copy: TinyText) -> None:
    plain = FAMILY.load(copy.base).state_dict()
    tensors = load_file(copy.base / "model.safetensors")
    renamed = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma"): value
        for name, value in tensors.items()
    }
    save_file(renamed, copy.base / "model.safetensors")
    again = FAMILY.load(copy.base).state_dict()
    assert all(torch.equal(again[name], value) for name, value in plain.items())


def test_experts_of_another_shape_are_refused(copy: TinyText) -> None:
    config = copy.expert("tone") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 4}))
    with pytest.raises(MismatchError, match="num_attention_heads is 4"):
        check_experts(open_sources(load_recipe(copy.recipe)))


def test_variants_that_would_run_as_plain_bert_are_refused(copy: TinyText) -> None:
    config = copy.base / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"position_embedding_type": "relative_key"}))
    with pytest.raises(RecipeError, match="relative_key"):
        FAMILY.load(copy.base)


def test_blocks_name_every_linear_layer_once(tiny_text: TinyText) -> None:
    model = FAMILY.load(tiny_text.base)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(linear) == sorted(n for block in FAMILY.blocks(model) for n in block.layers)


def test_texts_are_padded_and_cut(tiny_text: TinyText) -> None:
    ids, mask, segments = FAMILY.collate(tiny_text.base, ["Red trees", "blue " * 40])
    assert ids.shape == mask.shape == segments.shape == (2, 16)
    assert {ids.dtype, mask.dtype, segments.dtype} == {torch.int64}
    assert mask.sum(dim=1).tolist() == [5, 16]
    # The longest of the batch decides.
    assert FAMILY.collate(tiny_text.base, ["red"])[0].tolist() == [[2, 5, 3]]


def test_missing_tokenizer_is_refused(copy: TinyText) -> None:
    (copy.base / "vocab.txt").unlink()
    with pytest.raises(RecipeError, match=r"tokenizer\.json, or vocab\.txt"):
        FAMILY.collate(copy.base, ["red"])


def test_tokens_without_embedding_are_refused(copy: TinyText) -> None:
    (copy.base / "vocab.txt").write_text((copy.base / "vocab.txt").read_text() + "new\n")
    with pytest.raises(RecipeError, match="the tokenizer has 16 tokens, the model 15"):
        FAMILY.collate(copy.base, ["red"])


def test_heads_are_those_of_the_experts(tiny_text: TinyText, tmp_path: Path) -> None:
    tasks = load_recipe(tiny_text.recipe).tasks
    heads = build_heads(tasks, FAMILY, tiny_text.base, WIDTH)
    embedding = torch.randn(4, WIDTH)
    save_heads(tmp_path, heads)
    for task, head in load_heads(tmp_path).items():
        tensors = load_file(tiny_text.expert(task) / "model.safetensors")
        pooled = torch.tanh(
            torch.nn.functional.linear(
                embedding, tensors["bert.pooler.dense.weight"], tensors["bert.pooler.dense.bias"]
            )
        )
        expected = torch.nn.functional.linear(
            pooled, tensors["classifier.weight"], tensors["classifier.bias"]
        )
        assert head.classes == TEXT_TASKS[task]
        assert torch.allclose(head(embedding), expected, atol=1e-6)


def test_an_expert_s_head_must_be_whole(copy: TinyText) -> None:
    rewrite(copy.expert("tone"), classifier__bias=None)
    tasks = load_recipe(copy.recipe).tasks
    with pytest.raises(MismatchError, match=r"task 'tone': .* lacks classifier\.bias"):
        build_heads(tasks, FAMILY, copy.base, WIDTH)


def test_a_head_asked_for_must_be_there(copy: TinyText) -> None:
    rewrite(copy.expert("tone"), classifier__bias=None, classifier__weight=None)
    tasks = load_recipe(copy.recipe).tasks
    # Left out of the recipe, the task just has none, as with every family.
    assert set(build_heads(tasks, FAMILY, copy.base, WIDTH)) == {"topic"}
    asked = tasks["tone"].model_copy(update={"head": Head(from_expert=True)})
    with pytest.raises(MismatchError, match=r"holds no head .* give head.classes or head.matrix"):
        build_heads({"tone": asked}, FAMILY, copy.base, WIDTH)


def test_class_names_are_refused(tiny_text: TinyText) -> None:
    tasks = load_recipe(tiny_text.recipe).tasks
    named = tasks["tone"].model_copy(update={"head": Head(classes=("good", "bad"))})
    with pytest.raises(MismatchError, match="no head for class names"):
        build_heads({"tone": named}, FAMILY, tiny_text.base, WIDTH)


def test_padding_does_not_change_an_embedding(tiny_text: TinyText) -> None:
    model = FAMILY.load(tiny_text.base)
    with torch.inference_mode():
        alone = FAMILY.embed(model, *FAMILY.collate(tiny_text.base, ["red tree"]))
        both = FAMILY.embed(model, *FAMILY.collate(tiny_text.base, ["red tree", "river " * 12]))
    assert torch.allclose(alone[0], both[0], atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_padding_has_no_part_in_quantization(
    tiny_text: TinyText, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = {"preset": "features", "products": "float32", "solver": "float64"}
    recipe = override(load_recipe(tiny_text.recipe), "quantize", exact)
    samples = calibration_samples(recipe, FAMILY, tiny_text.base)

    def codes(batch_size: int) -> torch.Tensor:
        quantized = quantize_model(
            FAMILY.load(tiny_text.base),
            FAMILY,
            QUANTIZATION_METHODS[recipe.quantize.method],
            recipe.quantize,
            batches={
                task: partial(batches, chosen, FAMILY, tiny_text.base, batch_size)
                for task, chosen in samples.items()
            },
            experts=ExpertBackbone(open_sources(recipe), torch.device("cpu")),
        )
        return torch.cat([layer.codes.flatten() for layer in quantized.layers.values()])

    # One text at a time has no padding. Sums in another order may tip a code that is on the edge.
    alone, together = codes(1), codes(8)
    assert (alone == together).float().mean() > 0.995
    monkeypatch.setattr(type(FAMILY), "tokens", lambda *_, **__: TokenWeights())
    assert (alone == codes(8)).float().mean() < 0.995
