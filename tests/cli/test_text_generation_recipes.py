"""The recipes for text-generation models: they are valid, and run on tiny models."""

import json
from pathlib import Path

import numpy as np
import yaml
from command_line import run
from tiny_text import WORDS
from tiny_text_generators import TEXT_GENERATORS, build_tiny_text_generators

from epmq_deploy.recipe import load_recipe
from epmq_deploy.recipe.prompt import template_columns

FILE = Path(__file__).parents[2] / "recipes" / "flan-t5-base-glue-task-arithmetic.yaml"
# The columns of GLUE's tasks, and how many classes they have; None where labels are numbers.
COLUMNS = {
    "cola": ({"sentence"}, 2),
    "mnli": ({"premise", "hypothesis"}, 3),
    "mrpc": ({"sentence1", "sentence2"}, 2),
    "qnli": ({"question", "sentence"}, 2),
    "qqp": ({"question1", "question2"}, 2),
    "rte": ({"sentence1", "sentence2"}, 2),
    "sst2": ({"sentence"}, 2),
    "stsb": ({"sentence1", "sentence2"}, None),
}


def test_the_recipe_names_hub_ids_columns_and_answers() -> None:
    recipe = load_recipe(FILE)
    assert recipe.base.path == "google/flan-t5-base"
    assert recipe.tasks.keys() == COLUMNS.keys()
    for name, task in recipe.tasks.items():
        columns, classes = COLUMNS[name]
        assert task.expert == f"tanganke/flan-t5-base_glue-{name}"
        assert task.prompt is not None
        assert task.prompt.template is not None
        assert set(template_columns(task.prompt.template)) == columns
        assert "\n" not in task.prompt.template
        assert (task.prompt.answers and len(task.prompt.answers)) == classes
        assert task.prompt.decimals == (1 if classes is None else None)
        assert task.calibration is not None
        assert task.evaluation is not None
        assert task.calibration.subset == task.evaluation.subset == name


def test_the_recipe_runs_on_local_folders_of_the_same_layout(tmp_path: Path) -> None:
    content = yaml.safe_load(FILE.read_text())
    content["tasks"] = {name: content["tasks"][name] for name in ("mnli", "stsb")}
    settings = {"num_layers": 1, "num_decoder_layers": 1}
    models = build_tiny_text_generators(tmp_path, TEXT_GENERATORS["flan-t5"], **settings)
    content["base"]["path"] = str(models.base)
    rng = np.random.default_rng(0)
    for name, expert in (("mnli", "first"), ("stsb", "second")):
        columns, classes = COLUMNS[name]
        task = content["tasks"][name] | {"expert": str(models.expert(expert))}
        for key, count in (("calibration", 8), ("evaluation", 3)):
            rows = [
                {column: " ".join(rng.choice(WORDS, size=4)) for column in sorted(columns)}
                | {"label": 1.25 * index if classes is None else index % classes}
                for index in range(count)
            ]
            file = tmp_path / f"{name}-{key}.jsonl"
            file.write_text("\n".join(map(json.dumps, rows)) + "\n")
            task[key] = {"path": str(file)}
        content["tasks"][name] = task
    recipe = tmp_path / "glue.yaml"
    recipe.write_text(yaml.safe_dump(content))
    quick = ("quantize.samples=8", "quantize.group_size=16", "eval.latency_runs=1")
    flags = [part for option in quick for part in ("--set", option)]
    assert run("run", recipe, "-o", tmp_path / "out", "--quiet", *flags) == 0
    report = json.loads((tmp_path / "out" / "exported" / "eval.json").read_text())
    assert report["samples"] == {"mnli": 3, "stsb": 3}
    assert not report["metrics"]["mnli"]
    assert report["metrics"]["stsb"].startswith("Spearman")
    assert {row["name"] for row in report["rows"]} == {"experts", "fp32", "matmulnbits", "qdq"}
