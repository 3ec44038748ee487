"""Heads from class names and from matrices."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from tiny_zoo import FEATURES, TASKS, TinyZoo

from epmq_deploy.data.heads import build_heads, head_classes
from epmq_deploy.errors import MismatchError
from epmq_deploy.models import TaskHead, family_of
from epmq_deploy.models.text_generation import t5
from epmq_deploy.recipe import Head, Task, load_recipe

ZOO = Path(str(files("epmq_deploy") / "zoo"))


def heads_with(tiny: TinyZoo, head: Head) -> dict[str, TaskHead]:
    """Heads of the tiny tasks, the first one's replaced."""
    tasks = load_recipe(tiny.recipe).tasks
    first = tasks[TASKS[0]].model_copy(update={"head": head})
    return build_heads(tasks | {TASKS[0]: first}, family_of(tiny.base), tiny.base, FEATURES)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.randn(3, FEATURES + 1), "expected \\[classes, 24\\]"),
        (torch.full((3, FEATURES), float("nan")), "NaN"),
        (torch.ones(3, FEATURES), "same row"),
    ],
)
def test_bad_matrices_are_refused(
    tiny: TinyZoo, tmp_path: Path, matrix: torch.Tensor, message: str
) -> None:
    save_file({"head": matrix}, tmp_path / "head.safetensors")
    with pytest.raises(MismatchError, match=message):
        heads_with(tiny, Head(matrix=str(tmp_path / "head.safetensors")))


def test_garbage_files_are_refused(tiny: TinyZoo, tmp_path: Path) -> None:
    (tmp_path / "head.safetensors").write_bytes(b"garbage" * 10)
    with pytest.raises(MismatchError, match="not readable as safetensors"):
        heads_with(tiny, Head(matrix=str(tmp_path / "head.safetensors")))


def test_class_names_need_the_base_s_tokenizer(tiny: TinyZoo) -> None:
    with pytest.raises(MismatchError, match=r"tokenizer\.json"):
        heads_with(tiny, Head(classes=("a", "b")))


def test_experts_without_heads_cannot_give_one(tiny: TinyZoo) -> None:
    with pytest.raises(MismatchError, match="holds no head of the clip family"):
        heads_with(tiny, Head(from_expert=True))


def test_heads_come_from_one_place(tiny: TinyZoo) -> None:
    with pytest.raises(ValidationError, match="one of classes"):
        Head()
    with pytest.raises(ValidationError, match="exclude each other"):
        Head(matrix="head.safetensors", from_expert=True)


def test_class_names_beside_a_ready_head_name_its_classes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "x", "1": "y"}}))
    head = TaskHead(torch.randn(2, 3))
    for kind in ({"from_expert": True}, {"matrix": "head.safetensors"}):
        given = Head.model_validate({"classes": ["a", "b"]} | kind)
        task = Task(expert=str(tmp_path), head=given)
        assert head_classes(task, head).names == ("a", "b")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"0": "good", "1": "bad"}, ("good", "bad")),
        ({"0": "LABEL_0", "1": "LABEL_1"}, None),
        ({"0": "good"}, None),
        (None, None),
    ],
)
def test_experts_heads_have_the_names_in_their_configs(
    tmp_path: Path, labels: dict[str, str] | None, expected: tuple[str, ...] | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels} if labels else {}))
    head = TaskHead(torch.randn(2, 3))
    task = Task(expert=str(tmp_path))
    assert head_classes(task, head).names == expected
    given = task.model_copy(update={"head": Head(from_expert=True)})
    assert head_classes(given, head).names == expected
    # A head of the recipe's own has nothing to do with the expert's.
    own = task.model_copy(update={"head": Head(matrix="head.safetensors")})
    assert head_classes(own, head).names is None
    own = task.model_copy(update={"head": Head(classes=("a", "b"))})
    assert head_classes(own, head).names == ("a", "b")


def test_zero_shot_rows_are_means_of_unit_prompts_times_the_logit_scale() -> None:
    from transformers import AutoTokenizer, CLIPModel

    base = ZOO / "base"
    templates = ("a photo of a {}.", "a drawing of a {} in {place}.")
    found = family_of(base).zero_shot_head(base, ("shoe", "shirt"), templates, torch.device("cpu"))
    model = CLIPModel.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        for row, name in zip(found, ("shoe", "shirt"), strict=True):
            total = torch.zeros(found.shape[1])
            for text in (f"a photo of a {name}.", f"a drawing of a {name} in {{place}}."):
                # One prompt at a time: padding must not matter.
                tokens = tokenizer([text], return_tensors="pt")
                features = model.get_text_features(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                ).pooler_output[0]
                total += features / features.norm()
            expected = total / total.norm() * model.logit_scale.exp()
            assert torch.allclose(row, expected, atol=1e-4)
    assert json.loads((base / "config.json").read_text())["model_type"] == "clip"


@pytest.mark.parametrize("given", [{"classes": ["a", "b"]}, {"from_expert": True}, {"matrix": "m"}])
def test_models_that_write_texts_take_no_head(tmp_path: Path, given: dict[str, object]) -> None:
    task = Task(expert="expert", head=Head.model_validate(given))
    with pytest.raises(
        MismatchError, match=r"have no head; leave head out and give prompt\.answers"
    ):
        build_heads({"a": task}, t5.FAMILY, tmp_path, FEATURES)


def test_the_width_is_found_wherever_the_model_is(tiny: TinyZoo) -> None:
    family = family_of(tiny.base)
    # Unlike the CPU, this device refuses inputs that are elsewhere, as CUDA does.
    elsewhere = family.load(tiny.base).to("meta")
    assert family.embedding_width(elsewhere, tiny.base) == FEATURES


def test_equal_class_names_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    classes = ("shoe", "crane", "shirt", "crane")
    task = Task(expert=str(ZOO / "experts" / "icons"), head=Head(classes=classes))
    base = ZOO / "base"
    family = family_of(base)
    width = family.embedding_width(family.load(base), base)
    heads = build_heads({"birds": task}, family, base, width)
    assert "several classes are called crane" in caplog.text
    assert torch.equal(heads["birds"].weight[1], heads["birds"].weight[3])
    assert head_classes(task, heads["birds"]).names == classes
