"""Heads that label words, of models without a family of their own."""

import pytest
from tiny_architectures import PLAIN, TEXT, VISION

from epmq_deploy.errors import RecipeError
from epmq_deploy.models.encoders.classifier import HeadLayout
from epmq_deploy.models.generic.word_head import check_word_head

TENSORS = HeadLayout().tensors.values()


@pytest.mark.parametrize("model_type", ["electra", "mpnet", "mobilebert"])
def test_one_linear_layer_is_a_head(model_type: str) -> None:
    check_word_head({"model_type": model_type, **TEXT}, TENSORS, "expert")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "modernbert", **PLAIN}, "head.dense.weight"),
        ({"model_type": "ijepa", **VISION}, "no classifiers of words for models of type ijepa"),
    ],
)
def test_others_are_refused_with_a_reason(config: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_word_head(config, TENSORS, "expert")
