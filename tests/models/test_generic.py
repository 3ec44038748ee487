"""Models without a family of their own: what is found in them, and what is refused."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tiny_families import ARCHITECTURES, TEXT, VISION, TinyModels, build_tiny_models
from transformers import AutoConfig, AutoModel

from epmq_deploy.errors import RecipeError
from epmq_deploy.models import Block, Group, family_of
from epmq_deploy.models.generic.family import GenericFamily
from epmq_deploy.models.generic.tracing import find_blocks


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
    one = bool(getattr(family, "reads_one_token", False))
    found = find_blocks(model, lambda: family.embed(model, *inputs), first_token=one)
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


def test_a_layer_that_runs_more_than_once_is_refused(tmp_path: Path) -> None:
    text = refused(
        tmp_path,
        "deberta-v2",
        **TEXT,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
    )
    assert "runs more than once" in text


def test_repeated_blocks_are_needed(tmp_path: Path) -> None:
    text = refused(tmp_path, "albert", **TEXT, embedding_size=16, num_hidden_groups=1)
    assert "no repeated blocks" in text


def test_encoders_that_need_their_pooler_are_refused(tmp_path: Path) -> None:
    assert "does not run without pooler" in refused(tmp_path, "layoutlm", **TEXT)


def test_heads_of_another_kind_are_refused(tmp_path: Path) -> None:
    text = refused(tmp_path, "data2vec-vision", **VISION, use_mean_pooling=True)
    assert "model type 'data2vec-vision' has no family of its own" in text
    assert "between its last hidden state and its logits there is" in text


def test_model_types_without_a_classifier_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit_mae"}))
    with pytest.raises(RecipeError, match="no AutoModel with one classifier"):
        family_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"model type None .* no AutoModel"):
        family_of(tmp_path)


def test_decoders_are_refused(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 20}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="the generic one cannot take it"):
        family_of(tmp_path)


def test_blocks_that_do_not_mix_tokens_are_refused() -> None:
    """Attention of some models does nothing where its kernels are missing."""
    model = torch.nn.Sequential()
    model.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in "ab")
    hidden = torch.randn(2, 3, 8)
    with pytest.raises(RecipeError, match="does not let one token see another"):
        find_blocks(model, lambda: model.blocks[1](model.blocks[0](hidden))[:, 0], first_token=True)


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


@pytest.mark.parametrize(
    ("wiring", "message"),
    [
        ("backwards", "do not run once each, in order"),
        ("besides", "receives other arguments besides hidden states"),
        ("between", "does not receive what the block before it gave"),
    ],
)
def test_blocks_must_run_one_after_the_other(wiring: str, message: str) -> None:
    model = Sequence(wiring)
    hidden = torch.randn(2, 3, 8)
    with pytest.raises(RecipeError, match=message):
        find_blocks(model, lambda: model(hidden)[:, 0], first_token=True)
