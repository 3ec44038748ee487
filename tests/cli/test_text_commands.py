"""The four commands on a text model."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from command_line import run
from safetensors.torch import load_file, save_file
from tiny_text import TEXT_TASKS, WIDTH, TinyText
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.sequential import apply_quantized


@pytest.fixture(scope="module")
def chain(tiny_text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the outputs of the four commands, run one after the other."""
    out = tmp_path_factory.mktemp("text")
    assert run("merge", tiny_text.recipe, "-o", out / "merged", "--quiet") == 0
    assert run("quantize", out / "merged", "-o", out / "quantized", "--quiet") == 0
    assert run("export", out / "quantized", "-o", out / "onnx", "--quiet") == 0
    assert run("eval", out / "onnx", "--quiet") == 0
    return out


def copied(tiny_text: TinyText, target: Path) -> Path:
    """A recipe in ``target`` beside links to the tiny folders; experts are real copies."""
    for item in ("base", "data"):
        (target / item).symlink_to(tiny_text.folder / item)
    for task in TEXT_TASKS:
        (target / "experts" / task).mkdir(parents=True)
        for file in tiny_text.expert(task).iterdir():
            (target / "experts" / task / file.name).write_bytes(file.read_bytes())
    (target / "recipe.yaml").write_text(tiny_text.recipe.read_text())
    return target / "recipe.yaml"


def test_the_four_commands_leave_what_users_expect(chain: Path) -> None:
    out = chain / "onnx"
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "config.json",
        "tokenizer_config.json",
        "vocab.txt",
        "heads.safetensors",
        "manifest.json",
        "README.md",
        "onnx/model.onnx",
        "onnx/model_q4.onnx",
        "onnx/model_qdq.onnx",
        "report.json",
        "eval.json",
        "eval.md",
        "report.html",
    }
    report = json.loads((chain / "onnx" / "eval.json").read_text())
    assert report["samples"] == dict.fromkeys(TEXT_TASKS, 15)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["matmulnbits"]["accuracy"] == rows["qdq"]["accuracy"]


@pytest.mark.parametrize("name", ["fp32", "matmulnbits", "qdq"])
@pytest.mark.parametrize("texts", [["red tree"], ["red", "blue river sings", "trees " * 40]])
def test_graphs_take_any_number_of_texts_of_any_length(
    tiny_text: TinyText, chain: Path, name: str, texts: list[str]
) -> None:
    """Compared with ``transformers``' own model, each text by itself, so without padding."""
    graph = next(
        item
        for item in json.loads((chain / "onnx" / "manifest.json").read_text())["details"]["graphs"]
        if item["format"] == name
    )
    options = onnxruntime.SessionOptions()
    for key, value in graph["session_config"].items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(chain / "onnx" / graph["file"], options)
    assert {item.name: item.type for item in session.get_inputs()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), "tensor(int64)"
    )
    tokenizer = AutoTokenizer.from_pretrained(chain / "onnx")
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    assert batch["input_ids"].shape[1] <= 16
    outputs = session.run(None, {key: value.astype(np.int64) for key, value in batch.items()})

    backbone = BertModel.from_pretrained(chain / "merged").eval()
    if name != "fp32":
        apply_quantized(backbone, *load_artifact(chain / "quantized"))
    tasks = sorted(TEXT_TASKS)
    for row, text in enumerate(texts):
        alone = tokenizer([text], truncation=True, return_tensors="pt")
        with torch.inference_mode():
            embedding = backbone(**alone).last_hidden_state[:, 0]
            assert np.allclose(outputs[0][row], embedding[0], atol=1e-4)
            for task, logits in zip(tasks, outputs[1:], strict=True):
                expert = BertForSequenceClassification.from_pretrained(tiny_text.expert(task))
                pooled = torch.tanh(expert.bert.pooler.dense(embedding))
                assert np.allclose(logits[row], expert.classifier(pooled)[0], atol=1e-3)


def test_experts_score_as_transformers_scores_them(tiny_text: TinyText, chain: Path) -> None:
    rows = json.loads((chain / "onnx" / "eval.json").read_text())["rows"]
    experts = next(row["accuracy"] for row in rows if row["name"] == "experts")
    tokenizer = AutoTokenizer.from_pretrained(tiny_text.base)
    for task in TEXT_TASKS:
        model = BertForSequenceClassification.from_pretrained(tiny_text.expert(task)).eval()
        lines = (tiny_text.folder / "data" / task / "test.csv").read_text().splitlines()[1:]
        hits = 0
        for line in lines:
            text, label = line.rsplit(",", 1)
            with torch.inference_mode():
                logits = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits
            hits += int(logits.argmax()) == int(label)
        assert experts[task] == pytest.approx(100 * hits / len(lines))


def test_heads_of_experts_changed_since_the_merge_are_refused(
    tiny_text: TinyText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = copied(tiny_text, tmp_path)
    assert run("merge", recipe, "-o", tmp_path / "merged", "-q") == 0
    arguments = [tmp_path / "merged", "-o", tmp_path / "quantized", "--method", "rtn", "-q"]
    assert run("quantize", *arguments) == 0
    file = tmp_path / "experts" / "tone" / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.bias"] += 1
    save_file(tensors, file)
    assert run("export", tmp_path / "quantized", "-o", tmp_path / "onnx") == 3
    assert "expert 'tone' was changed since it was merged" in capsys.readouterr().err


def test_texts_that_are_not_there_are_named(
    tiny_text: TinyText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = copied(tiny_text, tmp_path)
    content = yaml.safe_load(recipe.read_text())
    (tmp_path / "gap.jsonl").write_text('{"text": "red", "label": 0}\n{"text": null, "label": 1}\n')
    (tmp_path / "numbers.jsonl").write_text('{"text": 7, "label": 0}\n')
    content["tasks"]["tone"]["evaluation"]["path"] = "gap.jsonl"
    content["tasks"]["topic"]["evaluation"]["path"] = "numbers.jsonl"
    recipe.write_text(yaml.safe_dump(content))
    assert run("run", recipe, "-o", tmp_path / "out") == 3
    message = capsys.readouterr().err
    assert "row 1 holds no text" in message
    assert "column 'text' holds" in message


def test_labels_beyond_the_expert_s_classifier_stop_before_any_work(
    tiny_text: TinyText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = copied(tiny_text, tmp_path)
    content = yaml.safe_load(recipe.read_text())
    content["tasks"]["tone"]["evaluation"] = content["tasks"]["topic"]["evaluation"]
    recipe.write_text(yaml.safe_dump(content))
    assert run("run", recipe, "-o", tmp_path / "out") == 3
    assert "holds label 2, but its head has 2 classes, 0 to 1" in capsys.readouterr().err


def test_every_quantized_layer_is_diagnosed(chain: Path, tmp_path: Path) -> None:
    arguments = ["--diagnose", "--diagnose-samples", "1", "--no-experts", "-q"]
    assert run("eval", chain / "onnx", "-o", tmp_path / "e.json", *arguments) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    quantized = {layer["layer"] for layer in report["layers"] if layer["bits"]}
    found = report["diagnoses"]["qdq"]
    assert {noise["layer"] for noise in found["layers"]} == quantized
    assert found["missing"] == []


def test_the_embedding_has_the_encoder_s_width(chain: Path) -> None:
    session = onnxruntime.InferenceSession(chain / "onnx" / "onnx" / "model.onnx")
    assert session.get_outputs()[0].shape[1] == WIDTH
