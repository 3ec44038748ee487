"""What a task's head reads: the family's embedding, words, or all tokens of a text to embed."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_text import TinyText

from epmq_deploy.data.heads import PLAIN, Reading
from epmq_deploy.errors import RecipeError
from epmq_deploy.models import family_of
from epmq_deploy.models.pooling import EmbeddingSettings
from epmq_deploy.recipe import Head, Task

MEAN = Reading(embedding=EmbeddingSettings(("mean",), longest=8))
MODULES = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
]


def reading(tiny_text: TinyText, expert: Path, head: dict[str, Any] | None = None) -> Reading:
    """How the head of an expert of BERT reads."""
    task = Task(expert=str(expert), head=None if head is None else Head(**head))
    return Reading.of_task(task, family_of(tiny_text.base))


def write(folder: Path, **files: Any) -> Path:
    """Settings as JSON, by name without suffix."""
    for name, content in files.items():
        file = folder / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("BertModel", MEAN),
        # As published models of sentence-transformers have it.
        ("BertForMaskedLM", MEAN),
        ("BertForSequenceClassification", PLAIN),
        ("BertForTokenClassification", Reading(words=True)),
    ],
)
def test_what_the_expert_was_saved_from_decides(
    tiny_text: TinyText, tmp_path: Path, architecture: str, expected: Reading
) -> None:
    expert = write(
        tmp_path,
        config={"architectures": [architecture]},
        modules=MODULES,
        sentence_bert_config={"max_seq_length": 8},
        # As earlier versions of sentence-transformers write it.
        **{
            "1_Pooling__config": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
        },
    )
    assert reading(tiny_text, expert) == expected


def test_an_adapter_says_it_in_its_own_settings(tiny_text: TinyText, tmp_path: Path) -> None:
    adapter = write(tmp_path, adapter_config={"task_type": "TOKEN_CLS"})
    assert reading(tiny_text, adapter) == Reading(words=True)


def test_without_the_expert_the_recipe_alone_counts(tiny_text: TinyText, tmp_path: Path) -> None:
    """A merged model is quantized where its experts are not."""
    gone = tmp_path / "gone"
    assert reading(tiny_text, gone) == PLAIN
    words = {"from_expert": True, "problem_type": "token_classification"}
    assert reading(tiny_text, gone, words) == Reading(words=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules": {}}, "the encoder has to be in the folder itself"),
        ({"modules": 3}, "no list of modules"),
        ({"modules": [{"type": "a.Transformer"}]}, "no list of modules"),
        ({"modules": MODULES[::-1]}, "the encoder has to be in the folder itself"),
        ({"modules": [MODULES[0], {"type": "x.Pooling", "path": "../p"}]}, "outside the folder"),
        ({"modules": [*MODULES, *MODULES[1:]]}, "supported are Transformer, Pooling"),
        ({"1_Pooling__config": {"pooling_mode": 3}}, "pooling_mode is 3"),
        ({"modules": [MODULES[0], {"type": "x.Pooling", "path": "p"}]}, "not in the folder"),
        ({"1_Pooling__config": {}}, "pools tokens by nothing"),
        ({"1_Pooling__config": {"pooling_mode": "softmax"}}, "pools tokens by softmax"),
        (
            {"1_Pooling__config": {"pooling_mode": "mean", "include_prompt": False}},
            "prompts that are not pooled",
        ),
    ],
)
def test_what_is_not_supported_is_refused(
    tiny_text: TinyText, tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    plain = {"modules": MODULES, "1_Pooling__config": {"pooling_mode": "mean"}}
    expert = write(tmp_path, config={}, **(plain | files))
    with pytest.raises(RecipeError, match=message):
        reading(tiny_text, expert)
