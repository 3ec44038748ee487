"""Every kind of adapter is the model that ``peft`` merges it into."""

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import ARCHITECTURES
from tiny_text_generators import DECODER
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from epmq_deploy.checkpoints import adapter_layers
from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.errors import EpmqError, MismatchError
from epmq_deploy.models import family_of

TARGETS = ["query", "value", "output.dense"]
FILE = "adapter_model.safetensors"
KINDS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        target_modules=r".*\.(query|value|intermediate\.dense)",
        rank_pattern={"layer.0.attention.self.query": 2, ".*value": 3},
        alpha_pattern={"value": 5, r"encoder\.layer\.1\..*": 7},
    ),
    "some-layers": lambda: peft.LoraConfig(
        r=4, target_modules=TARGETS, layers_to_transform=[1], layers_pattern="layer"
    ),
    "lora-bias": lambda: peft.LoraConfig(r=4, lora_bias=True, target_modules=TARGETS),
    "bias-all": lambda: peft.LoraConfig(r=4, bias="all", target_modules=TARGETS),
    "bias-lora-only": lambda: peft.LoraConfig(r=4, bias="lora_only", target_modules=TARGETS),
    "pissa": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=TARGETS),
    "olora": lambda: peft.LoraConfig(r=4, init_lora_weights="olora", target_modules=TARGETS),
    "dora-embedding": lambda: peft.LoraConfig(
        r=4, use_dora=True, target_modules=["word_embeddings", "query"]
    ),
    "embedding": lambda: peft.LoraConfig(r=4, target_modules=["word_embeddings", "query"]),
    "whole-embedding": lambda: peft.LoraConfig(
        r=4, target_modules=["query"], modules_to_save=["word_embeddings"]
    ),
    "tokens-and-lora": lambda: peft.LoraConfig(
        r=4, target_modules=["query"], trainable_token_indices={"word_embeddings": [1, 3]}
    ),
    "tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[1, 3], target_modules=["word_embeddings"]
    ),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=6, target_r=4, total_step=9, target_modules=TARGETS
    ),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS, rank_dropout=0.5),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha=6, decompose_both=True, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["output.dense"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=[*TARGETS, "intermediate.dense"]),
    "vera-without-projections": lambda: peft.VeraConfig(
        r=4, target_modules=TARGETS, save_projection=False, projection_prng_key=5
    ),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "oft-shared-blocks": lambda: peft.OFTConfig(
        oft_block_size=8, block_share=True, coft=True, target_modules=TARGETS
    ),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
    "c3a": lambda: peft.C3AConfig(block_size=8, target_modules=TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=TARGETS),
    "layer-norms": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
    "road": lambda: peft.RoadConfig(group_size=8, target_modules=TARGETS),
    "delora": lambda: peft.DeloraConfig(r=4, target_modules=TARGETS),
    "vblora": lambda: peft.VBLoRAConfig(
        r=4, num_vectors=8, vector_length=8, target_modules=TARGETS
    ),
    "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=["query", "intermediate.dense"]),
}


def saved(model: nn.Module, folder: Path, config: peft.PeftConfig) -> dict[str, Tensor]:
    """Train an adapter, save it, and return the model's tensors after ``peft`` merged it."""
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise)
    adapted.save_pretrained(folder)
    return merged(model, folder)


def merged(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """A model's tensors after ``peft`` has merged the adapter in a folder into it."""
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    tensors: dict[str, Tensor] = loaded.merge_and_unload().state_dict()
    return tensors


def read(base: Path, folder: Path, adapter: str | None = None) -> dict[str, Tensor]:
    """The adapter's tensors as this project reads them, by canonical name."""
    family = family_of(base)
    opened = Checkpoint.open(ModelFolder.open(str(base)), family.canonical_key, family.tied)
    source = ModelFolder.open(str(folder), adapter)
    expert = Checkpoint.open_expert(
        source, opened, family.canonical_key, family.tied, family.is_head
    )
    return {name: expert.load(name) for name in expert.tensors}


def differences(base: Path, result: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not what ``peft`` makes them."""
    rename = family_of(base).canonical_key
    expected = {str(rename(name)): value for name, value in wanted.items()}
    return [
        name
        for name, value in result.items()
        if name not in expected or not torch.allclose(value, expected[name], atol=1e-6, rtol=0)
    ]


def random_weights(model: nn.Module) -> nn.Module:
    """Give a fresh model weights and biases that differ from their defaults."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A RoBERTa with a head, and the folder of the encoder alone."""
    kind = ARCHITECTURES["roberta"]
    config = AutoConfig.for_model(kind.model_type, **kind.settings, num_labels=3)
    model: Any = random_weights(AutoModelForSequenceClassification.from_config(config))
    folder = tmp_path_factory.mktemp("classifier")
    model.roberta.save_pretrained(folder)
    return model, folder


def decoder(folder: Path, *, tied: bool) -> Any:
    """A Qwen2 that is saved in a folder."""
    settings = DECODER | {"tie_word_embeddings": tied, "vocab_size": 40, "pad_token_id": 0}
    model = random_weights(
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **settings))
    )
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_what_peft_makes_of_it(
    classifier: tuple[Any, Path], tmp_path: Path, kind: str
) -> None:
    model, base = classifier
    expected = saved(model, tmp_path, KINDS[kind]())
    result = read(base, tmp_path)
    assert differences(base, result, expected) == []
    start = model.roberta.state_dict()
    changed = [name for name, value in start.items() if not torch.equal(value, result[name])]
    assert len(changed) >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_the_running_model_is_read_alike(
    classifier: tuple[Any, Path], tmp_path: Path, kind: str
) -> None:
    """With the base, its head, names of adapters and everything that is kept twice."""
    model, base = classifier
    expected = saved(model, tmp_path, KINDS[kind]())
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    whole = {name: value.clone() for name, value in loaded.state_dict().items()}
    assert any(".default" in name for name in whole)
    save_file(whole, tmp_path / FILE)
    result = read(base, tmp_path)
    assert differences(base, result, expected) == []
    assert "classifier.out_proj.weight" in result


def test_pruned_ranks(classifier: tuple[Any, Path], tmp_path: Path) -> None:
    model, base = classifier
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=0, tfinal=1, total_step=6, deltaT=1, target_modules=TARGETS
    )
    training = peft.get_peft_model(copy.deepcopy(model), config)
    optimizer = torch.optim.SGD(training.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        ids = torch.randint(2, 12, (4, 8), generator=generator)
        training(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
        optimizer.step()
        training.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    training.save_pretrained(tmp_path)
    ranks = {value.shape[0] for key, value in load_file(tmp_path / FILE).items() if "lora_A" in key}
    assert ranks != {6}
    assert differences(base, read(base, tmp_path), merged(model, tmp_path)) == []


def test_a_module_that_the_base_splits(tmp_path: Path) -> None:
    """One linear layer of the adapter's model may be several tensors of the base."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 12)

    model = Fused()
    config = peft.LoraConfig(r=2, lora_bias=True, target_modules=["qkv"])
    expected = saved(model, tmp_path / "adapter", config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")

    def split(name: str) -> tuple[str, ...]:
        return tuple(name.replace("qkv", part) for part in ("q", "k", "v"))

    opened = Checkpoint.open(ModelFolder.open(str(tmp_path / "model.safetensors")), split)
    expert = Checkpoint.open_expert(ModelFolder.open(str(tmp_path / "adapter")), opened, split)
    for kind in ("weight", "bias"):
        parts = [expert.load(f"{part}.{kind}") for part in ("q", "k", "v")]
        assert torch.allclose(torch.cat(parts), expected[f"qkv.{kind}"], atol=1e-6)


def test_modules_are_freed_as_soon_as_they_are_merged(
    classifier: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = classifier
    saved(model, tmp_path, KINDS["dora"]())
    family = family_of(base)
    opened = Checkpoint.open(ModelFolder.open(str(base)), family.canonical_key)
    expert = Checkpoint.open_expert(ModelFolder.open(str(tmp_path)), opened, family.canonical_key)
    weights: list[weakref.ref[Tensor]] = []
    build = adapter_layers._module

    def watched(weight: Tensor, *rest: Any, **options: Any) -> nn.Module:
        weights.append(weakref.ref(weight))
        return build(weight, *rest, **options)

    monkeypatch.setattr(adapter_layers, "_module", watched)
    gc.collect()
    gc.disable()
    try:
        for name in expert.tensors:
            expert.load(name)
            assert sum(weight() is not None for weight in weights) == 0
    finally:
        gc.enable()
    assert weights


def test_convolutions(tmp_path: Path) -> None:
    kind = ARCHITECTURES["vit"]
    config = AutoConfig.for_model(kind.model_type, **kind.settings, num_labels=3)
    model: Any = random_weights(AutoModelForImageClassification.from_config(config))
    model.vit.save_pretrained(tmp_path / "base")
    targets = ["projection", "q_proj"]
    for number, settings in enumerate(
        (
            peft.LoraConfig(r=4, use_dora=True, target_modules=targets),
            peft.LoHaConfig(r=4, target_modules=targets),
            peft.LoKrConfig(r=4, target_modules=targets, use_effective_conv2d=True),
            peft.IA3Config(target_modules=targets, feedforward_modules=["q_proj"]),
            peft.OFTConfig(oft_block_size=8, target_modules=targets),
        )
    ):
        folder = tmp_path / str(number)
        expected = saved(model, folder, settings)
        assert differences(tmp_path / "base", read(tmp_path / "base", folder), expected) == []


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_heads_are_taken_whether_they_are_listed_or_not(
    classifier: tuple[Any, Path], tmp_path: Path, listed: bool, bias: str
) -> None:
    model, base = classifier
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "dense"], bias=bias)
    expected = saved(model, tmp_path, config)
    if not listed:
        # As peft up to 0.10 wrote it.
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": None}))
    result = read(base, tmp_path)
    assert differences(base, result, expected) == []
    assert {name for name in result if name.startswith("classifier")} == {
        f"classifier.{layer}.{kind}"
        for layer in ("dense", "out_proj")
        for kind in ("weight", "bias")
    }


def test_names_of_adapters_and_wrappers_in_keys(
    classifier: tuple[Any, Path], tmp_path: Path
) -> None:
    model, base = classifier
    config = peft.LoraConfig(
        r=4,
        use_dora=True,
        task_type="SEQ_CLS",
        target_modules=["query", "word_embeddings"],
        modules_to_save=["classifier"],
    )
    expected = saved(model, tmp_path, config)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    # The state of the whole model: base layers, modules that were replaced, names of adapters.
    whole = {name: value.clone() for name, value in loaded.state_dict().items()}
    assert any("lora_A.default" in name for name in whole)
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        save_file({prefix + name: value for name, value in whole.items()}, tmp_path / FILE)
        assert differences(base, read(base, tmp_path), expected) == []
    without = {name.removeprefix("base_model.model."): value for name, value in whole.items()}
    save_file(without, tmp_path / FILE)
    assert differences(base, read(base, tmp_path), expected) == []


def test_one_of_several_adapters_in_one_file(classifier: tuple[Any, Path], tmp_path: Path) -> None:
    model, base = classifier
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query"])
    expected = {name: saved(model, tmp_path / name, config) for name in ("one", "other")}
    files = {name: load_file(tmp_path / name / FILE) for name in expected}
    named = {
        _named(key, name): value + (name == "other")
        for name, tensors in files.items()
        for key, value in tensors.items()
    }
    both = tmp_path / "both"
    both.mkdir()
    (both / "adapter_config.json").write_bytes((tmp_path / "one/adapter_config.json").read_bytes())
    save_file(named, both / FILE)
    assert differences(base, read(base, both, "one"), expected["one"]) == []
    assert differences(base, read(base, both, "other"), expected["one"]) != []
    with pytest.raises(EpmqError, match=r"holds the adapters one, other; choose one with adapter"):
        read(base, both)
    with pytest.raises(EpmqError, match="holds the adapters one, other; not third; choose one"):
        read(base, both, "third")


def _named(key: str, adapter: str) -> str:
    head = "base_model.model.classifier."
    if key.startswith(head):
        return key.replace(head, f"{head}modules_to_save.{adapter}.")
    return key.replace(".weight", f".{adapter}.weight")


def test_adapted_embeddings_of_a_decoder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = decoder(base, tied=False)
    for number, config in enumerate(
        (
            # peft saves the base's table along with these.
            peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"]),
            peft.LoraConfig(
                r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
            ),
            peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
            peft.LoraConfig(r=4, target_modules="all-linear"),
        )
    ):
        folder = tmp_path / str(number)
        expected = saved(model, folder, config)
        assert differences(base, read(base, folder), expected) == []
    keys = load_file(tmp_path / "0" / FILE)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys


@pytest.mark.parametrize(
    ("config", "warns"),
    [
        (lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), True),
        (lambda: peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"]), True),
        (lambda: peft.TrainableTokensConfig(token_indices=[1, 2]), False),
        (
            lambda: peft.LoraConfig(
                r=4,
                target_modules=["q_proj"],
                modules_to_save=["embed_tokens", "lm_head"],
                ensure_weight_tying=True,
            ),
            False,
        ),
    ],
)
def test_tied_embeddings_stay_tied(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    config: Callable[[], peft.PeftConfig],
    warns: bool,
) -> None:
    base = tmp_path / "base"
    model = decoder(base, tied=True)
    expected = saved(model, tmp_path / "adapter", config())
    result = read(base, tmp_path / "adapter")
    assert "lm_head.weight" not in result
    assert differences(base, result, expected) == []
    assert torch.equal(expected["lm_head.weight"], expected["model.embed_tokens.weight"])
    assert ("both are changed, as peft's merge_and_unload does" in caplog.text) == warns


def test_factors_that_are_tied_count_once(tmp_path: Path) -> None:
    """The running model adds them once to either; merging adds them twice to the one tensor."""
    base = tmp_path / "base"
    model = decoder(base, tied=True)
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    saved(model, tmp_path / "adapter", config)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    table = loaded.base_model.model.model.embed_tokens
    expected = table.base_layer.weight + table.get_delta_weight("default")
    result = read(base, tmp_path / "adapter")["model.embed_tokens.weight"]
    assert torch.allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        lambda: peft.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
        ),
    ],
)
def test_embeddings_that_would_come_apart_are_refused(
    tmp_path: Path, config: Callable[[], peft.PeftConfig]
) -> None:
    base = tmp_path / "base"
    model = decoder(base, tied=True)
    saved(model, tmp_path / "adapter", config())
    with pytest.raises(MismatchError, match=r"lm_head.* and .*embed_tokens.* would differ"):
        read(base, tmp_path / "adapter")


def test_resized_embeddings_are_of_another_shape(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = decoder(base, tied=False)
    model.resize_token_embeddings(43)
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    saved(model, tmp_path / "adapter", config)
    assert read(base, tmp_path / "adapter")["model.embed_tokens.weight"].shape == (43, 32)


def test_half_precision_bases_are_changed_in_float32(
    classifier: tuple[Any, Path], tmp_path: Path
) -> None:
    model, _ = classifier
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.roberta.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["query"], modules_to_save=["word_embeddings"])
    exact = copy.deepcopy(half).to(torch.float32)
    expected = saved(exact, tmp_path / "adapter", config)
    result = read(tmp_path / "base", tmp_path / "adapter")
    assert {value.dtype for value in result.values()} == {torch.bfloat16}
    rounded = {name: value.to(torch.bfloat16) for name, value in expected.items()}
    assert differences(tmp_path / "base", result, rounded) == []


def test_prompts_are_no_change_of_weights(classifier: tuple[Any, Path], tmp_path: Path) -> None:
    model, base = classifier
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    with pytest.raises(EpmqError, match="PREFIX_TUNING, which leaves weights as they are"):
        read(base, tmp_path)


def test_listing_an_adapter_reads_no_weights(
    classifier: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from epmq_deploy.checkpoints.tensors import StoredTensor

    model, base = classifier
    saved(model, tmp_path, KINDS["dora"]())
    family = family_of(base)
    opened = Checkpoint.open(ModelFolder.open(str(base)), family.canonical_key)
    loaded: list[str] = []
    read_into = StoredTensor.read_into
    monkeypatch.setattr(
        StoredTensor,
        "read_into",
        lambda self, target: (loaded.append(self.key), read_into(self, target))[1],
    )
    expert = Checkpoint.open_expert(ModelFolder.open(str(tmp_path)), opened, family.canonical_key)
    assert loaded == []
    expert.load("encoder.layer.0.attention.self.query.weight")
    assert loaded and all("layer.0.attention.self.query" in key for key in loaded)
