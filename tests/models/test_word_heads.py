"""Heads that label words, of models without a family of their own."""

from dataclasses import replace

import pytest
from tiny_architectures import PLAIN, TEXT, VISION

from epmq_deploy.errors import RecipeError
from epmq_deploy.models.encoders.classifier import HeadLayout
from epmq_deploy.models.generic.word_head import word_head_layout

LINEAR = HeadLayout()
# As ModernBERT's classifiers of texts have it.
DEEP = HeadLayout(
    pooler="head.dense", norm="head.norm", without=frozenset(("pooler_bias", "norm_bias"))
)


@pytest.mark.parametrize("model_type", ["electra", "mpnet", "mobilebert", "deberta-v2"])
def test_most_are_one_linear_layer(model_type: str) -> None:
    config = {"model_type": model_type, **TEXT}
    assert word_head_layout(config, (LINEAR, DEEP), "expert") == LINEAR


def test_those_with_the_layers_of_classifiers_of_texts_are_read_like_them() -> None:
    config = {"model_type": "modernbert", **PLAIN}
    assert word_head_layout(config, (LINEAR, DEEP), "expert") == DEEP


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "modernbert", **PLAIN}, "head.dense.weight, head.norm.weight"),
        ({"model_type": "ijepa", **VISION}, "no classifiers of words for models of type ijepa"),
    ],
)
def test_others_are_refused_with_a_reason(config: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        word_head_layout(config, (LINEAR, replace(DEEP, norm=None)), "expert")
