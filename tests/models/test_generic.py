"""Models without a family of their own: what is found in them, and what is refused."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_families import ARCHITECTURES, TEXT, TinyModels, build_tiny_models
from transformers import AutoConfig, AutoModel

from epmq_deploy.errors import RecipeError
from epmq_deploy.models import Block, Group, family_of
from epmq_deploy.models.blocks import EVERY_TOKEN
from epmq_deploy.models.encoders.classifier import HeadLayout
from epmq_deploy.models.generic.family import GenericFamily
from epmq_deploy.models.generic.tracing import find_blocks

# The token that two samples' heads read.
FIRST = torch.zeros(2, dtype=torch.int64)


def built(folder: Path, name: str) -> TinyModels:
    """Tiny models of one architecture."""
    return build_tiny_models(folder, ARCHITECTURES[name])


@pytest.mark.parametrize("name", ["distilbert", "roberta", "vit", "deit", "dinov2-registers"])
def test_the_same_is_found_as_families_know(tmp_path: Path, name: str) -> None:
    """Blocks, groups, norms and pooled layers of architectures that have a family."""
    models = built(tmp_path, name)
    family = family_of(models.base)
    model = family.load(models.base)
    inputs = family.example_inputs(models.base, 2)
    read = family.tokens(*inputs).pooled
    found = find_blocks(model, lambda: family.embed(model, *inputs), read=read)
    assert found == family.blocks(model)


def test_what_is_found_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = built(tmp_path, "electra")
    family = family_of(models.base)
    assert isinstance(family, GenericFamily)
    model = family.load(models.base)
    with caplog.at_level(logging.WARNING):
        blocks = family.blocks(model)
        family.blocks(model)
    assert caplog.text.count("found 2 blocks with 8 groups of linear layers, 2 of them") == 1
    layer = "encoder.layer.1"
    assert blocks[1] == Block(
        layer,
        (
            Group(tuple(f"{layer}.attention.self.{part}" for part in ("query", "key", "value"))),
            Group((f"{layer}.attention.output.dense",), None, True),
            Group((f"{layer}.intermediate.dense",), f"{layer}.attention.output.LayerNorm", True),
            Group((f"{layer}.output.dense",), None, True),
        ),
        f"{layer}.output.LayerNorm",
    )


def test_heads_and_lengths_are_found(tmp_path: Path) -> None:
    text = family_of(built(tmp_path, "mpnet").base)
    assert isinstance(text, GenericFamily)
    assert (text.head.classifier, text.head.pooler) == ("classifier.out_proj", "classifier.dense")
    assert text.head.activation == "tanh"
    # Positions are numbered after the padding token's id, 1.
    assert text.positions({}) == 24 - 2  # type: ignore[attr-defined]
    (tmp_path / "image").mkdir()
    image = family_of(built(tmp_path / "image", "ijepa").base)
    assert isinstance(image, GenericFamily)
    assert (image.head.classifier, image.head.pooler) == ("classifier", None)
    assert not image.reads_one_token


def test_experts_of_another_model_type_are_said_to_be(tmp_path: Path) -> None:
    family = family_of(built(tmp_path, "mpnet").base)
    problems = family.config_problems({"model_type": "mpnet", "vocab_size": 3}, {"model_type": "x"})
    assert problems == ["model_type is 'x' in its config.json, the base has 'mpnet'"]


def test_groups_that_other_tokens_reach_are_not_pooled(tmp_path: Path) -> None:
    models = built(tmp_path, "ijepa")
    family = family_of(models.base)
    blocks = family.blocks(family.load(models.base))
    assert not any(group.pooled for block in blocks for group in block.groups)


def refused(folder: Path, model_type: str, **settings: object) -> str:
    """Why a tiny model of this type is refused, when its blocks are looked for at the latest."""
    config = AutoConfig.for_model(model_type, **settings)
    AutoModel.from_config(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
        )
    )
    with pytest.raises(RecipeError) as caught:
        family = family_of(folder)
        family.blocks(family.load(folder))
    return str(caught.value)


@pytest.mark.parametrize("shared", [True, False], ids=["v3", "v2"])
def test_layers_on_positions_are_found(tmp_path: Path, shared: bool) -> None:
    """DeBERTa's attention multiplies a table of positions, by its own layers or by the queries'."""
    name = "deberta-v3" if shared else "deberta-v2"
    models = built(tmp_path, name)
    family = family_of(models.base)
    first, second = family.blocks(family.load(models.base))
    attention = f"{first.name}.attention.self"
    queries = (f"{attention}.query_proj", f"{attention}.key_proj")
    if shared:
        assert first.groups[:2] == (Group(queries, runs=2), Group((f"{attention}.value_proj",)))
        assert second.stream == first.stream
    else:
        assert first.groups[0] == Group((*queries, f"{attention}.value_proj"))
        positions = {layer for group in first.groups for layer in group.layers if "pos_" in layer}
        assert positions == {f"{attention}.pos_key_proj", f"{attention}.pos_query_proj"}
        assert {g.stream for g in first.groups if set(g.layers) & positions} == {EVERY_TOKEN}
        # A convolution stands between the two.
        assert second.stream != first.stream


def test_a_block_that_repeats_is_one_block(tmp_path: Path) -> None:
    models = built(tmp_path, "albert")
    family = family_of(models.base)
    (block,) = family.blocks(family.load(models.base))
    assert block.repeats == 3
    assert not any(group.pooled for group in block.groups)


def test_blocks_with_other_arguments_name_whose_they_are(tmp_path: Path) -> None:
    """Global attention in every third block, local attention in the others."""
    models = built(tmp_path, "modernbert")
    family = family_of(models.base)
    blocks = family.blocks(family.load(models.base))
    assert [block.arguments for block in blocks] == [None, "layers.1", "layers.1", None]
    assert {block.stream for block in blocks} == {""}


def test_blocks_are_needed() -> None:
    hidden = torch.randn(2, 3, 8)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(RecipeError, match="Sequential has no blocks with linear layers; those"):
        find_blocks(model, lambda: model(hidden)[:, 0], read=FIRST)


def test_encoders_that_need_their_pooler_are_refused(tmp_path: Path) -> None:
    assert "does not run without pooler" in refused(tmp_path, "layoutlm", **TEXT)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("modernbert", HeadLayout("classifier", "head.dense", "gelu", "head.norm")),
        ("beit", HeadLayout("classifier", norm="pooler.layernorm", norm_epsilon=1e-12)),
        ("gpt2", HeadLayout("score", without=frozenset({"bias"}))),
        ("eurobert", HeadLayout("classifier", "dense", "gelu")),
    ],
)
def test_heads_of_other_kinds_are_found(tmp_path: Path, name: str, layout: HeadLayout) -> None:
    family = family_of(built(tmp_path, name).base)
    assert isinstance(family, GenericFamily)
    without = layout.without | family.head.without
    assert replace(family.head, without=without) == replace(layout, without=without)


def test_heads_of_unknown_kinds_are_refused(tmp_path: Path) -> None:
    text = refused(tmp_path, "convbert", **TEXT, embedding_size=32, head_ratio=1, hidden_act="mish")
    assert "model type 'convbert' has no family of its own" in text
    assert "between classifier.dense and classifier.out_proj there is none of" in text


def test_model_types_without_a_classifier_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit_mae"}))
    with pytest.raises(RecipeError, match="no AutoModel with one classifier"):
        family_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"config.json names no model_type.*; add the one"):
        family_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["DebertaV2Model"]}))
    with pytest.raises(
        RecipeError, match='DebertaV2Model has "model_type": "deberta-v2"; add that'
    ):
        family_of(tmp_path)


def test_decoders_of_encoders_are_refused(tmp_path: Path) -> None:
    config = {"model_type": "electra", **TEXT, "is_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="it is a decoder, not an encoder alone"):
        family_of(tmp_path)


def test_blocks_that_do_not_mix_tokens_are_refused() -> None:
    """Attention of some models does nothing where its kernels are missing."""
    model = torch.nn.Sequential()
    model.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in "ab")
    hidden = torch.randn(2, 3, 8)
    with pytest.raises(RecipeError, match="does not let one token see another"):
        find_blocks(model, lambda: model.blocks[1](model.blocks[0](hidden))[:, 0], read=FIRST)


class Sequence(torch.nn.Module):
    """Blocks that can be wired as wanted."""

    def __init__(self, wiring: str) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(8, 1, 8, batch_first=True) for _ in range(2)
        )
        self.wiring = wiring

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first, second = self.layers
        if self.wiring == "backwards":
            return first(second(hidden))
        if self.wiring == "besides":
            mask = torch.ones(hidden.shape[1], hidden.shape[1])
            return second(first(hidden), src_mask=mask)
        return second(first(hidden) * 2)


def test_blocks_must_run_in_order() -> None:
    model, hidden = Sequence("backwards"), torch.randn(2, 3, 8)
    with pytest.raises(RecipeError, match="do not run one after the other"):
        find_blocks(model, lambda: model(hidden)[:, 0], read=FIRST)


def test_other_arguments_are_noted() -> None:
    model, hidden = Sequence("besides"), torch.randn(2, 3, 8)
    blocks = find_blocks(model, lambda: model(hidden)[:, 0], read=FIRST)
    assert [(block.stream, block.arguments) for block in blocks] == [("", None), ("", "layers.1")]


def test_what_happens_between_blocks_begins_a_stream() -> None:
    model, hidden = Sequence("between"), torch.randn(2, 3, 8)
    blocks = find_blocks(model, lambda: model(hidden)[:, 0], read=FIRST)
    assert [block.stream for block in blocks] == ["", "layers.1"]
