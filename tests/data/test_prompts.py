"""Tasks in words: what text-generation models read, and what they are taught to answer."""

import pytest
from merged_text_generators import MergedTextGenerator, two_streams
from tiny_text_generators import TOKENS

from epmq_deploy.data.prompts import PromptFormat
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.models.text_generation.base import TextPair
from epmq_deploy.quantization.stage import calibration_samples
from epmq_deploy.recipe import Recipe, parse_recipe
from epmq_deploy.recipe.prompt import Prompt


@two_streams
def test_a_decoder_is_taught_the_answer_and_its_end(
    merged_text_generator: MergedTextGenerator,
) -> None:
    ids, mask, behind, _ = merged_text_generator.family.collate(
        merged_text_generator.folder, [TextPair("red green", "no maybe"), TextPair("blue", "no")]
    )
    words = [[TOKENS[index] for index in row] for row in ids.tolist()]
    assert words == [["red", "green", "[END]"], ["blue", "[END]", "[PAD]"]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    start = merged_text_generator.models.architecture.settings["decoder_start_token_id"]
    assert behind[0].tolist() == [start, TOKENS.index("no"), TOKENS.index("maybe")]


def test_texts_are_cut_where_they_matter_least(merged_text_generator: MergedTextGenerator) -> None:
    text = " ".join(["red"] * 20 + ["blue"])
    ids, _ = merged_text_generator.family.prompts(merged_text_generator.folder, [text])
    last = (
        merged_text_generator.family.tokenizer(merged_text_generator.folder)
        .decode(ids[0, -1:])
        .strip()
    )
    assert ids.shape == (1, 16)
    assert last == (
        "[END]" if merged_text_generator.models.architecture.model_type == "t5" else "blue"
    )


def with_prompt(recipe: Recipe, prompt: dict[str, object] | None, **data: object) -> Recipe:
    """The recipe with another prompt and calibration source of the first task."""
    content = recipe.model_dump()
    content["tasks"]["first"]["prompt"] = prompt
    content["tasks"]["first"]["calibration"] |= data
    return parse_recipe(content, "test")


@pytest.mark.parametrize("merged_text_generator", ["t5"], indirect=True)
@pytest.mark.parametrize(
    ("prompt", "data", "message"),
    [
        ({"template": "{text} {nothing}"}, {}, r"has no column 'nothing'"),
        ({"answers": ["yes", "no"]}, {}, r"row \d+: column 'label' holds 2, .* for 0 to 1"),
        (
            {"decimals": 1},
            {"label_column": "text"},
            r"row 0: .* labels must be numbers",
        ),
        (None, {}, r"column 'label' holds .*, expected texts"),
        (None, {"label_column": "answer"}, "has no column 'answer'"),
    ],
)
def test_data_that_give_no_texts_are_named(
    merged_text_generator: MergedTextGenerator,
    prompt: dict[str, object] | None,
    data: dict[str, object],
    message: str,
) -> None:
    recipe = with_prompt(merged_text_generator.recipe, prompt, **data)
    with pytest.raises(MismatchError, match=f"task 'first'.*{message}"):
        calibration_samples(recipe, merged_text_generator.family, merged_text_generator.folder)


@pytest.mark.parametrize("template", ["no column", "{text", "{text.strip}", "{text!r}", "{}"])
def test_templates_name_columns_and_nothing_else(template: str) -> None:
    models = {"base": {"path": "b"}, "tasks": {"a": {"expert": "e"}}}
    models["tasks"]["a"]["prompt"] = {"template": template}
    with pytest.raises(RecipeError, match=r"tasks\.a\.prompt\.template"):
        parse_recipe(models, "test")


def test_numbers_are_written_with_so_many_decimals() -> None:
    prompt = Prompt(template="{text}", decimals=1)
    wording = PromptFormat.of(prompt, "text", "label", ("text", "label"), "data")
    # As a column of 32-bit floats holds 3.8.
    assert wording.answer({"text": "red", "label": 3.799999952316284}) == "3.8"
    assert wording.answer({"text": "red", "label": 5}) == "5.0"
    assert wording.columns == ("text",)
    wording.check_labels([0, 2.5], "data")
    for wrong in (True, None, "2.5", float("nan")):
        with pytest.raises(RecipeError, match=r"data: row 1: .* labels must be numbers"):
            wording.check_labels([0, wrong], "data")


def test_answers_are_listed_or_numbers() -> None:
    models = {"base": {"path": "b"}, "tasks": {"a": {"expert": "e"}}}
    models["tasks"]["a"]["prompt"] = {"answers": ["no", "yes"], "decimals": 1}
    with pytest.raises(RecipeError, match=r"listed .* or numbers .*, not both"):
        parse_recipe(models, "test")
