"""The four commands on tiny models of every architecture, compared with ``transformers``."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file
from tiny_families import ARCHITECTURES, FAMILY_TASKS, TinyModels, build_tiny_models

from epmq_deploy.compat import transposed_layers
from epmq_deploy.data.loading import load_samples
from epmq_deploy.data.samples import batches
from epmq_deploy.models import family_of
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.methods.epmq import PRESETS
from epmq_deploy.recipe import load_recipe


@dataclass(frozen=True)
class Chain:
    """Tiny models and the folder with the outputs of the four commands."""

    models: TinyModels
    out: Path


# Variants of others whose graphs would be much the same.
VARIANTS = {"beit-cls", "convnextv2", "modernbert-mean", "swinv2"}


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES.keys() - VARIANTS))
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """All four commands on one architecture, with preset ``outputs``, which re-fits norms."""
    models = build_tiny_models(tmp_path_factory.mktemp(request.param), ARCHITECTURES[request.param])
    out = models.folder / "out"
    assert run("run", models.recipe, "-o", out, "--quiet", "--set", "quantize.preset=outputs") == 0
    return Chain(models, out)


def test_all_linear_layers_of_the_blocks_are_quantized(chain: Chain) -> None:
    family = family_of(chain.models.base)
    model = family.load(chain.models.base)
    blocks = family.blocks(model)
    report = json.loads((chain.out / "quantized" / "report.json").read_text())
    rows = report["layers"] if isinstance(report, dict) else report
    solved = {row["layer"]: row for row in rows if row.get("bits") == 4}
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(tuple(b.name for b in blocks))
    }
    assert len(blocks) == chain.models.architecture.blocks
    assert set(solved) == expected
    assert {row["status"] for row in solved.values()} == {"solved"}
    norms = {row["layer"] for row in rows if row["status"] == "refitted"}
    assert norms == {
        name
        for block in blocks
        for name in (*(group.norm for group in block.groups), block.norm)
        if name is not None
    }
    assert len(norms) == chain.models.architecture.norms


def test_the_float_graph_is_transformers_model_of_the_merge(chain: Chain) -> None:
    """The merged encoder under an expert's head, as ``transformers`` runs it."""
    task = next(iter(FAMILY_TASKS))
    family = family_of(chain.models.base)
    recipe = load_recipe(chain.models.recipe)
    source = recipe.tasks[task].evaluation
    assert source is not None
    samples = load_samples(task, source, family)
    (inputs,) = batches(samples, family, chain.models.base, 100)
    merged = chain.models.expert_model(task)
    backbone = merged.base_model
    state = family_of(chain.out / "merged").load(chain.out / "merged").state_dict()
    for name in transposed_layers(backbone):
        state[f"{name}.weight"] = state[f"{name}.weight"].T
    problems = backbone.load_state_dict(state, strict=False)
    assert not problems.unexpected_keys
    assert all("pooler" in name for name in problems.missing_keys)
    with torch.inference_mode():
        expected = merged(**dict(zip(family.input_names, inputs, strict=True))).logits
    session = onnxruntime.InferenceSession(chain.out / "exported" / "onnx" / "model.onnx")
    feed = {name: value.numpy() for name, value in zip(family.input_names, inputs, strict=True)}
    (logits,) = session.run([f"logits_{task}"], feed)
    assert np.allclose(logits, expected, atol=2e-4)
    assert logits.std(axis=0).max() > 1e-2, "all samples look the same"


def test_experts_score_as_transformers_scores_them(chain: Chain) -> None:
    family = family_of(chain.models.base)
    rows = json.loads((chain.out / "exported" / "eval.json").read_text())["rows"]
    scores = {row["name"]: row["accuracy"] for row in rows}
    assert set(scores) == {"experts", "fp32", "matmulnbits", "qdq"}
    recipe = load_recipe(chain.models.recipe)
    for task in FAMILY_TASKS:
        source = recipe.tasks[task].evaluation
        assert source is not None
        samples = load_samples(task, source, family)
        model, hits = chain.models.expert_model(task), 0
        for index in range(len(samples)):
            # One by one, so without padding.
            inputs = family.collate(chain.models.base, samples.inputs(index, index + 1))
            with torch.inference_mode():
                logits = model(**dict(zip(family.input_names, inputs, strict=True))).logits
            hits += int(logits.argmax()) == samples.labels().numbers[index]
        assert scores["experts"][task] == pytest.approx(100 * hits / len(samples))


def test_the_four_commands_take_adapters(tmp_path: Path) -> None:
    """Low-rank changes of the base's queries, with each task's head."""
    models = build_tiny_models(tmp_path, ARCHITECTURES["roberta"])
    prefix = "base_model.model."
    for task in FAMILY_TASKS:
        folder = models.expert(task)
        whole = load_file(folder / "model.safetensors")
        kept = {f"{prefix}{k}": v for k, v in whole.items() if k.startswith("classifier.")}
        for layer in range(2):
            name = f"{prefix}roberta.encoder.layer.{layer}.attention.self.query.lora"
            kept |= {f"{name}_A.weight": torch.randn(4, 32), f"{name}_B.weight": torch.randn(32, 4)}
        for file in folder.iterdir():
            file.unlink()
        save_file(kept, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "modules_to_save": ["classifier"]}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert run("run", models.recipe, "-o", tmp_path / "out", "--quiet") == 0
    rows = json.loads((tmp_path / "out" / "exported" / "eval.json").read_text())["rows"]
    assert all(set(row["accuracy"]) == set(FAMILY_TASKS) for row in rows)


def variants() -> list[list[str]]:
    """Every method, and every preset of E-PMQ."""
    methods = [["--method", method] for method in sorted(QUANTIZATION_METHODS) if method != "epmq"]
    return methods + [["--preset", preset] for preset in PRESETS]


# One of each family, and generic ones whose blocks repeat, read positions or feature maps.
@pytest.mark.parametrize(
    "chain",
    [
        "vit",
        "dinov2-registers",
        "roberta",
        "distilbert",
        "electra",
        "ijepa",
        "albert",
        "deberta-v3",
        "swin",
    ],
    indirect=True,
)
@pytest.mark.parametrize("flags", variants(), ids=lambda flags: flags[1])
def test_every_method_runs(chain: Chain, tmp_path: Path, flags: list[str]) -> None:
    assert run("quantize", chain.out / "merged", "-o", tmp_path / "q", "-q", *flags) == 0
