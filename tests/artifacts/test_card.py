"""Model cards."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_zoo import TASKS, TinyZoo

from epmq_deploy.artifacts.card import Evaluation, license_of, model_card, write_card
from epmq_deploy.artifacts.manifest import (
    AnyManifest,
    ExportDetails,
    ExportManifest,
    MergeDetails,
    MergeManifest,
    QuantizeDetails,
    QuantizeManifest,
)
from epmq_deploy.artifacts.names import CARD
from epmq_deploy.artifacts.outputs import is_done, open_output
from epmq_deploy.merging.stage import merge
from epmq_deploy.recipe import Recipe, load_recipe, parse_recipe

RECIPE = {
    "base": {"path": "openai/clip-vit-base-patch32"},
    "tasks": {
        "sun": {
            "expert": "someone/clip_sun",
            "calibration": {"path": "someone/sun", "split": "train"},
            "evaluation": {"path": "someone/sun", "split": "test"},
        },
        "cars": {"expert": "/home/me/secret/cars", "calibration": {"path": "/data/me/cars.csv"}},
    },
    "merge": {"method": "ties", "density": 0.1},
    "quantize": {"method": "gptq", "bits": 3},
}

TABLE = "| task | top-1 |\n|---|--:|\n| sun | 75.0 |\n"


def metadata(card: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes."""
    assert card.startswith("---\n")
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def manifest_of(
    stage: str, recipe: Recipe, merge_details: MergeDetails | None = None
) -> AnyManifest:
    """A stage's manifest of this recipe."""
    merge_details = merge_details or MergeDetails()
    common = {"fingerprint": "mark", "recipe": recipe, "inputs": {}}
    if stage == "merge":
        return MergeManifest(**common, details=merge_details)
    if stage == "quantize":
        return QuantizeManifest(**common, details=QuantizeDetails(merge=merge_details))
    details = ExportDetails(
        merge=merge_details,
        target=None,
        classes={},
        graphs=(),
        parity_inputs="calibration",
        tasks_without_parity={},
        codes={},
    )
    return ExportManifest(**common, details=details)


def card_of(stage: str, **given: str) -> str:
    return model_card(manifest_of(stage, parse_recipe(RECIPE, "test")), **given)


def test_metadata_name_what_the_hub_can_link_to() -> None:
    found = metadata(card_of("merge", license_name="mit"))
    assert found == {
        "base_model": ["openai/clip-vit-base-patch32", "someone/clip_sun"],
        "base_model_relation": "merge",
        "datasets": ["someone/sun"],
        "library_name": "transformers",
        "license": "mit",
        "tags": ["merge", "model-merging", "ties"],
    }
    quantized, exported = metadata(card_of("quantize")), metadata(card_of("export"))
    assert quantized["tags"] == ["merge", "model-merging", "ties", "quantized", "3-bit"]
    assert exported["tags"] == [*quantized["tags"], "onnx"]
    assert (quantized["library_name"], exported["library_name"]) == ("epmq-deploy", "onnx")
    assert exported["base_model_relation"] == "quantized"
    assert "license" not in exported
    pinned = parse_recipe(RECIPE | {"base": {"path": "openai/clip@refs/pr/15"}}, "test")
    card = model_card(MergeManifest(fingerprint="mark", recipe=pinned, inputs={}))
    assert metadata(card)["base_model"] == ["openai/clip", "someone/clip_sun"]
    assert "2 experts of openai/clip@refs/pr/15" in card


def test_local_models_are_not_called_by_their_whole_path() -> None:
    for stage in ("merge", "quantize", "export"):
        card = card_of(stage)
        assert "secret" not in card
        assert "/data/me" not in card
        assert "| cars | `cars` | `cars.csv` | none |" in card
    local = parse_recipe(
        {"base": {"path": "/models/clip"}, "tasks": {"a": {"expert": "/models/a"}}}, "test"
    )
    found = metadata(model_card(MergeManifest(fingerprint="mark", recipe=local, inputs={})))
    assert not {"base_model", "base_model_relation", "datasets", "license"} & found.keys()


def test_a_card_tells_methods_options_and_evaluation() -> None:
    card = card_of("quantize")
    assert "`ties` (TIES-Merging, arXiv 2306.01708)" in card
    options = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert set(options) == {"merge", "quantize"}
    assert options["merge"]["density"] == 0.1
    assert options["quantize"]["bits"] == 3
    assert "Not evaluated" not in card
    assert "Not evaluated yet" in card_of("export")
    told = Evaluation(TABLE, "image-classification", {"qdq": {"sun": 75.004, "cars": 50.0}}, {})
    evaluated = card_of("export", evaluation=told)
    assert "Not evaluated" not in evaluated
    assert evaluated.endswith(f"## Evaluation\n\n{TABLE}")
    # Nothing but the arguments decides the text.
    assert card == card_of("quantize")


def test_metadata_hold_every_score_as_the_hub_reads_it() -> None:
    scores = {"fp32": {"sun": 60.0, "cars": 50.0}, "qdq": {"sun": 75.004, "cars": 40.0}}
    told = Evaluation(
        TABLE, "image-classification", scores, {"sun": "accuracy", "cars": "spearmanr"}
    )
    data = ModelCard(card_of("export", evaluation=told)).data
    found = {
        (item.metric_name, item.dataset_name): (
            item.dataset_type,
            item.metric_type,
            item.metric_value,
        )
        for item in data.eval_results
    }
    assert found == {
        ("fp32", "sun"): ("someone/sun", "accuracy", 60.0),
        ("fp32", "cars"): ("cars", "spearmanr", 50.0),
        ("qdq", "sun"): ("someone/sun", "accuracy", 75.0),
        ("qdq", "cars"): ("cars", "spearmanr", 40.0),
    }
    assert "model-index" not in metadata(card_of("export"))


def test_a_searched_scaling_stands_in_for_what_it_began_with() -> None:
    recipe = parse_recipe(RECIPE | {"merge": {"method": "ties", "search": True}}, "test")
    merge_details = MergeDetails(scaling=0.25)
    for stage in ("merge", "quantize"):
        card = model_card(manifest_of(stage, recipe, merge_details))
        options = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
        assert options["merge"]["scaling"] == 0.25


@pytest.mark.parametrize("source", ["card", "config", "neither", "broken"])
def test_the_license_is_what_the_base_says(tmp_path: Path, source: str) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "clip"} | ({"license": "mit"} if source == "config" else {}))
    )
    if source == "card":
        (tmp_path / CARD).write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    if source == "broken":
        (tmp_path / CARD).write_text("---\nlicense: [unclosed\n---\n# A model\n")
    expected = {"card": "apache-2.0", "config": "mit", "neither": None, "broken": None}
    assert license_of(str(tmp_path)) == expected[source]
    assert license_of("nobody/was-never-fetched") is None
    assert license_of(str(tmp_path / "missing")) is None


def test_a_stage_writes_its_card_and_an_evaluation_does_not_undo_it(
    tiny: TinyZoo, tmp_path: Path
) -> None:
    folder = tmp_path / "merged"
    manifest = merge(load_recipe(tiny.recipe), folder)
    card = ModelCard.load(folder / CARD)
    assert "merge" in card.data.tags
    assert all(f"| {task} |" in card.text for task in TASKS)
    assert CARD not in manifest.outputs
    told = Evaluation("All is well.", "image-classification", {}, {})
    write_card(folder, open_output(folder, "merge"), told)
    assert (folder / CARD).read_text().endswith("## Evaluation\n\nAll is well.\n")
    assert is_done(folder, "merge", manifest.fingerprint)
