"""Quantized checkpoints are named; 8-bit floats with scales are the weights they stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import ARCHITECTURES, build_tiny_models
from tiny_text_generators import DECODER, TEXT_GENERATORS, build_tiny_text_generators
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.merging.preflight import check_experts
from epmq_deploy.merging.stage import merge
from epmq_deploy.models.experts import open_sources
from epmq_deploy.recipe import load_recipe

FILE = "model.safetensors"
ANY = torch.zeros(4, 4)
WHOLE = torch.zeros(4, 4, dtype=torch.int32)
BYTES = torch.zeros(8, 1, dtype=torch.uint8)
KINDS: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None, str]] = {
    "gptq": (
        {"qweight": WHOLE, "qzeros": WHOLE, "scales": ANY, "g_idx": WHOLE[0].clone()},
        {"quant_method": "gptq", "bits": 4},
        "GPTQ",
    ),
    "awq": (
        {"qweight": WHOLE, "qzeros": WHOLE, "scales": ANY},
        {"quant_method": "awq", "bits": 4},
        "AWQ",
    ),
    "without-config": ({"qweight": WHOLE, "qzeros": WHOLE, "scales": ANY}, None, "GPTQ or AWQ"),
    "bitsandbytes-4": (
        {"weight": BYTES, "weight.absmax": ANY, "weight.quant_state.bitsandbytes__nf4": BYTES},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "bitsandbytes",
    ),
    "bitsandbytes-4-without-config": (
        {"weight": BYTES, "weight.absmax": ANY, "weight.quant_map": ANY},
        None,
        "bitsandbytes in 4 bits",
    ),
    "bitsandbytes-8": (
        {"weight": torch.zeros(4, 4, dtype=torch.int8), "SCB": ANY[0].clone()},
        None,
        "bitsandbytes in 8 bits",
    ),
    "compressed-tensors": (
        {"weight_packed": WHOLE, "weight_scale": ANY, "weight_shape": WHOLE[0].clone()},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "compressed-tensors",
    ),
    "compressed-tensors-8": (
        {"weight": torch.zeros(4, 4, dtype=torch.int8), "weight_scale": ANY[:, :1].clone()},
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        "compressed-tensors",
    ),
    "hqq": ({"W_q": BYTES, "meta": ANY}, None, "HQQ"),
    "quanto": ({"weight._data": BYTES, "weight._scale": ANY}, None, "quanto"),
    "mlx": (
        {"weight": WHOLE.to(torch.uint32), "scales": ANY, "biases": ANY},
        {"group_size": 64, "bits": 4},
        "integers",
    ),
    "torchao": ({"weight_qdata": BYTES, "weight_scale": ANY}, None, "torchao"),
    "another": ({"weight": BYTES}, {"quant_method": "quark"}, "quark"),
    "unknown": ({"weight": BYTES}, None, "integers"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_expert_is_named_in_one_sentence(tmp_path: Path, kind: str) -> None:
    models = build_tiny_models(tmp_path, ARCHITECTURES["roberta"])
    expert = models.expert("first")
    parts, settings, name = KINDS[kind]
    tensors = load_file(expert / FILE)
    for key in [key for key in tensors if key.endswith("query.weight")]:
        module = key.removesuffix(".weight")
        del tensors[key]
        tensors |= {f"{module}.{part}": value.clone() for part, value in parts.items()}
    save_file(tensors, expert / FILE)
    config = json.loads((expert / "config.json").read_text())
    if settings is not None:
        config["quantization" if kind == "mlx" else "quantization_config"] = settings
    (expert / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError) as caught:
        open_sources(load_recipe(models.recipe))
    (problem,) = caught.value.problems
    assert f"its weights are quantized ({name})" in problem
    assert "\n" not in problem
    assert "float16 or bfloat16" in problem


def quantized(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weight in 8-bit floats, and the scale of each block."""
    values = weight.to(torch.float32)
    counts = (-(-values.shape[0] // rows), -(-values.shape[1] // columns))
    scales, codes = torch.zeros(counts), torch.zeros_like(values)
    for i in range(counts[0]):
        for j in range(counts[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = values[block].abs().max() / 448
            codes[block] = values[block] / scales[i, j]
    return codes.to(torch.float8_e4m3fn), scales


def test_blocks_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    settings = DECODER | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 40}
    config = AutoConfig.for_model("llama", **settings, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    for key in [key for key in tensors if "proj" in key]:
        tensors[key], tensors[f"{key}_scale_inv"] = quantized(tensors[key], 32, 32)
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    file = tmp_path / "config.json"
    blocks = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    content = json.loads(file.read_text()) | {"quantization_config": blocks}
    file.write_text(json.dumps(content))
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32)),
        dtype=torch.bfloat16,
    ).state_dict()
    checkpoint = Checkpoint.open(ModelFolder.open(str(tmp_path)))
    assert not any("scale" in name for name in checkpoint.tensors)
    for name in checkpoint.tensors:
        value = checkpoint.load(name)
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("shape", [(), (1,), (32,), (32, 1)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "scale_weight"])
def test_one_scale_or_one_a_row(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    codes = torch.randn(32, 16).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.5
    save_file(
        {"a.weight": codes, f"a.{name}": scale, "a.input_scale": torch.ones(1)}, tmp_path / FILE
    )
    (tmp_path / "config.json").write_text('{"torch_dtype": "float32"}')
    checkpoint = Checkpoint.open(ModelFolder.open(str(tmp_path)))
    assert list(checkpoint.tensors) == ["a.weight"]
    factor = scale.reshape(-1, 1) if scale.numel() > 1 else scale
    assert torch.equal(checkpoint.load("a.weight"), codes.to(torch.float32) * factor)


def test_without_scales_values_are_taken_as_they_are(tmp_path: Path) -> None:
    codes = torch.randn(4, 4).to(torch.float8_e5m2)
    save_file({"a.weight": codes}, tmp_path / FILE)
    value = Checkpoint.open(ModelFolder.open(str(tmp_path))).load("a.weight")
    assert torch.equal(value, codes.to(torch.bfloat16))


def test_blocks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    codes = torch.randn(200, 130).to(torch.float8_e4m3fn)
    save_file({"a.weight": codes, "a.weight_scale_inv": torch.ones(3, 2)}, tmp_path / FILE)
    with pytest.raises(RecipeError, match=r"a\.weight_scale_inv of shape \[3, 2\] do not fit"):
        Checkpoint.open(ModelFolder.open(str(tmp_path)))
    save_file({"a.weight": codes, "a.weight_scale_inv": torch.ones(2, 2)}, tmp_path / FILE)
    value = Checkpoint.open(ModelFolder.open(str(tmp_path))).load("a.weight")
    assert torch.equal(value, codes.to(torch.bfloat16))


def test_an_expert_in_8_bit_floats_is_one_in_the_base_s_dtype(tmp_path: Path) -> None:
    models = build_tiny_text_generators(tmp_path, TEXT_GENERATORS["llama"])
    names = check_experts(open_sources(load_recipe(models.recipe)))
    expert = models.expert("first")
    tensors = load_file(expert / FILE)
    dense = {}
    for key in [key for key in tensors if "proj" in key]:
        codes, scales = quantized(tensors[key], tensors[key].shape[0], tensors[key].shape[1])
        dense[key] = codes.to(torch.float32) * scales
        tensors[key], tensors[f"{key}_scale"] = codes, scales
    save_file(tensors, expert / FILE)
    sources = open_sources(load_recipe(models.recipe))
    assert check_experts(sources) == names
    for key, value in dense.items():
        assert torch.equal(sources.experts["first"].load(key), value)


def test_nan_in_8_bit_floats_is_found(tmp_path: Path) -> None:
    models = build_tiny_text_generators(tmp_path, TEXT_GENERATORS["llama"])
    expert = models.expert("first")
    tensors = load_file(expert / FILE)
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] = torch.full_like(tensors[key], float("nan")).to(torch.float8_e4m3fn)
    save_file(tensors, expert / FILE)
    with pytest.raises(MismatchError, match=rf"expert 'first': NaN or infinite values in {key}"):
        check_experts(open_sources(load_recipe(models.recipe)))


def test_settings_of_a_quantization_that_weights_do_not_have_are_no_matter(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / FILE)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert list(Checkpoint.open(ModelFolder.open(str(tmp_path))).tensors) == ["a.weight"]


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_merged_model_is_dense_whatever_its_base_was(tmp_path: Path, key: str) -> None:
    models = build_tiny_text_generators(tmp_path, TEXT_GENERATORS["llama"])
    tensors = load_file(models.base / FILE)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name], tensors[f"{name}_scale_inv"] = quantized(tensors[name], 128, 128)
    save_file(tensors, models.base / FILE)
    config = json.loads((models.base / "config.json").read_text())
    settings = {key: {"quant_method": "fp8"}, "text_config": {key: {}, "é": 1}, "dtype": "float32"}
    (models.base / "config.json").write_text(json.dumps(config | settings))
    merge(load_recipe(models.recipe), tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert written == config | {"text_config": {"é": 1}, "dtype": "float32"}
    merged = load_file(tmp_path / "merged" / FILE)
    assert {value.dtype for value in merged.values()} == {torch.float32}
    assert not any("scale" in name for name in merged)
