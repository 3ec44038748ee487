"""Models that write texts: T5 and decoders, from checkpoints to codes."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_writers import TOKENS, WRITER_TASKS, WRITERS, TinyWriters, build_tiny_writers
from torch import Tensor, nn

from epmq_deploy.calibration.cache import Kept
from epmq_deploy.calibration.statistics import Accumulator
from epmq_deploy.calibration.targets import TARGETS
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.experts import ExpertBackbone, open_sources
from epmq_deploy.merging.merge import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.writer import TextPair, WriterFamily
from epmq_deploy.quantization.artifact import load_artifact, load_reports
from epmq_deploy.quantization.model import apply_quantized, quantize_model
from epmq_deploy.quantization.quantize import calibration_samples, quantize
from epmq_deploy.quantization.quantized_model import QuantizedModel
from epmq_deploy.quantization.walk import Walk
from epmq_deploy.recipe import Recipe, load_recipe, override, parse_recipe
from epmq_deploy.stage import read_manifest
from epmq_deploy.tasks.data import batches

EXACT = {"products": "float32", "solver": "float64"}


@dataclass
class OneExpert:
    """A model that serves as base and only expert."""

    model: nn.Module
    tasks: Collection[str] = ("all",)

    def base_tensor(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach()

    def tensor(self, task: str, name: str) -> Tensor:
        return self.base_tensor(name)

    def become(self, task: str, *, without: Collection[str] = ()) -> nn.Module:
        return self.model

    def module(self, task: str, name: str) -> nn.Module:
        return self.model.get_submodule(name)


@dataclass(frozen=True)
class Merged:
    """Tiny models of one architecture and their merge."""

    models: TinyWriters
    folder: Path

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.models.recipe)

    @property
    def family(self) -> WriterFamily:
        family = family_of(self.folder)
        assert isinstance(family, WriterFamily)
        return family


@pytest.fixture(scope="module", params=WRITERS)
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """One architecture, merged."""
    models = build_tiny_writers(tmp_path_factory.mktemp(request.param), WRITERS[request.param])
    merge(load_recipe(models.recipe), models.folder / "merged")
    return Merged(models, models.folder / "merged")


two_streams = pytest.mark.parametrize("merged", ["t5", "flan-t5"], indirect=True)


def inputs_of(recipe: Recipe, merged: Merged) -> list[tuple[Tensor, ...]]:
    """Calibration batches of all tasks."""
    return [
        batch
        for chosen in calibration_samples(recipe, merged.family, merged.folder).values()
        for batch in batches(chosen, merged.family, merged.folder, 8)
    ]


def quantized(merged: Merged, **options: object) -> tuple[nn.Module, QuantizedModel]:
    """Quantize in memory; the model with dequantized weights, and the result."""
    recipe, family, folder = merged.recipe, merged.family, merged.folder
    recipe = override(recipe, "quantize", options)
    model = family.load(folder)
    result = quantize_model(
        model,
        family,
        TARGETS[recipe.quantize.method],
        recipe.quantize,
        batches={
            name: partial(batches, chosen, family, folder, 8)
            for name, chosen in calibration_samples(recipe, family, folder).items()
        },
        experts=ExpertBackbone(open_sources(recipe), torch.device("cpu")),
    )
    return model, result


def logits(merged: Merged, model: nn.Module) -> Tensor:
    """What a model says of all calibration samples."""
    with torch.inference_mode():
        found = [merged.family.embed(model, *batch) for batch in inputs_of(merged.recipe, merged)]
    return torch.cat(found)


def test_a_folder_loads_as_transformers_loads_it(merged: Merged) -> None:
    """Tied and untied, and whatever copies the files hold."""
    for folder in (merged.models.base, merged.models.expert("second"), merged.folder):
        ours, theirs = merged.family.load(folder), merged.models.load(folder)
        embedding, output = theirs.get_input_embeddings(), theirs.get_output_embeddings()
        assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == torch.equal(
            embedding.weight, output.weight
        )
        assert torch.equal(logits(merged, ours), logits(merged, theirs))


def test_the_merge_is_task_arithmetic_on_every_tensor(merged: Merged) -> None:
    states = [
        merged.models.load(folder).state_dict()
        for folder in (merged.models.base, *(merged.models.expert(task) for task in WRITER_TASKS))
    ]
    found = merged.models.load(merged.folder).state_dict()
    base, *experts = states
    for name, start in base.items():
        wanted = start + 0.3 * sum(expert[name] - start for expert in experts)
        assert torch.allclose(found[name], wanted, atol=1e-6), name
    stored = load_file(merged.folder / "model.safetensors")
    assert ("lm_head.weight" in stored) != merged.models.writer.settings["tie_word_embeddings"]


def test_an_expert_whose_output_layer_is_its_own_does_not_fit_a_tied_base(tmp_path: Path) -> None:
    models = build_tiny_writers(tmp_path, WRITERS["t5"])
    file = models.expert("first") / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["shared.weight"] + 1}, file)
    with pytest.raises(MismatchError, match=r"has lm_head\.weight, which the base lacks"):
        merge(load_recipe(models.recipe), tmp_path / "merged")


@two_streams
def test_one_embedding_serves_encoder_and_decoder(merged: Merged, tmp_path: Path) -> None:
    for file in merged.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RecipeError, match=r"decoder\.embed_tokens\.weight differs from shared"):
        merged.family.load(tmp_path)


def test_groups_are_the_layers_that_share_an_input(merged: Merged) -> None:
    """Recorded while the model runs: who receives the same tensor, who the norm's output."""
    family = merged.family
    model = family.load(merged.folder)
    received: dict[str, Tensor] = {}
    gave: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, name=name: received.update({name: args[0]})
            )
        elif "norm" in name:
            module.register_forward_hook(
                lambda module, args, output, name=name: gave.update({name: output})
            )
    family.embed(model, *family.example_inputs(merged.folder, 2))
    blocks = family.blocks(model)
    seen: dict[int, tuple[str, ...]] = {}
    order = list(received)
    for block in blocks:
        inside = {name for name in received if name.startswith(f"{block.name}.")}
        assert set(block.layers) == inside
        for group in block.groups:
            (place,) = {id(received[name]) for name in group.layers}
            if group.stream is None:
                assert place not in seen, "two groups share an input"
            seen[place] = group.layers
            if group.norm is not None:
                assert received[group.layers[0]] is gave[group.norm]
        firsts = [order.index(group.layers[0]) for group in block.groups]
        assert firsts == sorted(firsts)
    assert len(blocks) == sum(
        len(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and any(isinstance(child, nn.Module) and hasattr(child, "forward") for child in module)
        and type(module[0]).__name__.endswith(("Block", "DecoderLayer"))
    )


@two_streams
def test_cross_attention_reads_the_encoder_s_tokens(merged: Merged) -> None:
    family = merged.family
    blocks = family.blocks(family.load(merged.folder))
    streams = {
        group.layers[0].rpartition(".")[2]
        for block in blocks
        for group in block.groups
        if group.stream == "encoder"
    }
    assert streams == {"k"}
    pairs = [TextPair("red", "yes no"), TextPair("red green blue", "no")]
    inputs = family.collate(merged.folder, pairs)
    assert family.tokens(*inputs, stream="encoder").real.sum(1).tolist() == [2, 4]
    assert family.tokens(*inputs, stream="decoder").real.sum(1).tolist() == [3, 2]


@two_streams
def test_a_decoder_is_taught_the_answer_and_its_end(merged: Merged) -> None:
    ids, mask, behind, _ = merged.family.collate(
        merged.folder, [TextPair("red green", "no maybe"), TextPair("blue", "no")]
    )
    words = [[TOKENS[index] for index in row] for row in ids.tolist()]
    assert words == [["red", "green", "[END]"], ["blue", "[END]", "[PAD]"]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    start = merged.models.writer.settings["decoder_start_token_id"]
    assert behind[0].tolist() == [start, TOKENS.index("no"), TOKENS.index("maybe")]


def test_texts_are_cut_where_they_matter_least(merged: Merged) -> None:
    text = " ".join(["red"] * 20 + ["blue"])
    ids, _ = merged.family.prompts(merged.folder, [text])
    last = merged.family.tokenizer(merged.folder).decode(ids[0, -1:]).strip()
    assert ids.shape == (1, 16)
    assert last == ("[END]" if merged.models.writer.model_type == "t5" else "blue")


@pytest.mark.parametrize("method", sorted(TARGETS))
def test_every_layer_of_all_blocks_is_quantized(
    merged: Merged, tmp_path: Path, method: str
) -> None:
    recipe = override(merged.recipe, "quantize", {"method": method, "group_size": 16})
    quantize(recipe, merged.folder, tmp_path / "out")
    layers, replaced = load_artifact(tmp_path / "out")
    model = merged.family.load(merged.folder)
    names = {name for block in merged.family.blocks(model) for name in block.layers}
    assert names <= layers.keys()
    assert {layers[name].bits for name in names} == {4}
    assert all(
        report.status in ("solved", "refitted", "kept") for report in load_reports(tmp_path / "out")
    )
    norms = {name for name in replaced if name.endswith("norm.weight")}
    wanted = {
        f"{group.norm}.weight"
        for block in merged.family.blocks(model)
        for group in block.groups
        if group.norm
    }
    assert norms == (wanted if method == "epmq" else set())
    apply_quantized(model, layers, replaced)
    assert bool(torch.isfinite(logits(merged, model)).all())


def test_tied_weights_have_the_same_codes(merged: Merged) -> None:
    model, result = quantized(merged, method="rtn")
    name = "shared" if merged.models.writer.model_type == "t5" else "model.embed_tokens"
    table, output = result.layers[name], result.layers["lm_head"]
    tied = merged.models.writer.settings["tie_word_embeddings"]
    assert torch.equal(table.codes, output.codes) == tied
    assert (table.bits, table.group_size, table.symmetric) == (8, 32, True)
    assert torch.equal(model.lm_head.weight, output.dequantize())
    assert torch.equal(model.get_input_embeddings().weight, table.dequantize())
    kept, _ = quantized(merged, method="rtn", skip=("lm_head",))
    original = merged.family.load(merged.folder)
    assert torch.equal(kept.lm_head.weight, original.lm_head.weight)
    assert torch.equal(kept.get_input_embeddings().weight, table.dequantize()) != tied


def test_one_expert_almost_without_anchor_is_given_back(merged: Merged) -> None:
    """Encoder and decoder alike: the expert differs in all the preset may change."""
    flags = {"bits": 8, "anchor": 1e-7, "preset": "outputs", "outer": False, **EXACT}
    recipe = override(merged.recipe, "quantize", flags)
    family = merged.family
    expert, model, original = (family.load(merged.folder) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    inside = tuple(f"{block.name}." for block in family.blocks(model))
    for name, parameter in expert.named_parameters():
        # Norms of queries and keys are no part of what is re-fitted.
        fixed = "relative" in name or ".q_norm." in name or ".k_norm." in name
        if name.startswith(inside) and not fixed:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.3 * noise * parameter.abs().mean()
    inputs = inputs_of(recipe, merged)
    quantize_model(
        model,
        family,
        TARGETS["epmq"],
        recipe.quantize,
        batches={"all": lambda: inputs},
        experts=OneExpert(expert),
        rounding=False,
    )
    wanted = logits(merged, expert)
    before = (logits(merged, original) - wanted).norm()
    assert (logits(merged, model) - wanted).norm() < 0.02 * before


def test_later_layers_see_the_quantized_earlier_ones(merged: Merged) -> None:
    """Of every group of the last block, against the inputs the quantized model really gives."""
    model, result = quantized(merged, method="gptq", bits=2, bias="keep")
    family = merged.family
    original = family.load(merged.folder)
    block = family.blocks(model)[-1]
    for group in block.groups:
        name = group.layers[-1]
        stream = block.stream if group.stream is None else group.stream
        gram = sum(gram_of_inputs(merged, model, name, stream, task) for task in WRITER_TASKS)
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        reported = next(report for report in result.reports if report.layer == name)
        weight = original.get_parameter(f"{name}.weight").double()
        error = result.layers[name].dequantize().double() - weight
        expected = float(((error @ damped) * error).sum() / ((weight @ gram) * weight).sum())
        assert reported.error_after == pytest.approx(expected, rel=0.02), name


def gram_of_inputs(merged: Merged, model: nn.Module, name: str, stream: str, task: str) -> Tensor:
    """Mean over the real tokens of one task's samples, as the whole model runs."""
    family, folder = merged.family, merged.folder
    accumulator, weights = Accumulator(), []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: accumulator.add(args[0], weights[-1])
    )
    samples = calibration_samples(merged.recipe, family, folder)[task]
    for inputs in batches(samples, family, folder, 8):
        real = family.tokens(*inputs, stream=stream).real
        assert real is not None
        weights.append(real.float())
        with torch.inference_mode():
            family.embed(model, *inputs)
    hook.remove()
    return accumulator.statistics().gram.double()


@two_streams
@pytest.mark.parametrize("killed_in", [1, 3])
def test_a_killed_run_goes_on_and_gives_the_same_codes(
    merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: int
) -> None:
    """Killed in the encoder and in the decoder."""
    recipe = merged.recipe
    quantize(recipe, merged.folder, tmp_path / "whole")
    done = []
    original = Walk.quantize_block

    def killed(self: Walk, block: object) -> QuantizedModel:
        done.append(block)
        if len(done) > killed_in:
            raise KeyboardInterrupt
        return original(self, block)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "quantize_block", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe, merged.folder, tmp_path / "resumed")
    quantize(recipe, merged.folder, tmp_path / "resumed")
    first, second = (
        read_manifest(tmp_path / name, "quantize").outputs for name in ("whole", "resumed")
    )
    for name in ("quantized.safetensors", "replaced.safetensors"):
        assert first[name] == second[name]


@two_streams
def test_activations_on_disk_change_nothing(
    merged: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What blocks receive besides hidden states, too: the encoder's output, masks and biases."""
    _, in_memory = quantized(merged, cache_limit=None)
    shapes = set()
    original = Kept.peek
    monkeypatch.setattr(
        Kept, "peek", lambda self: shapes.add(original(self).dim()) or original(self)
    )
    _, on_disk = quantized(merged, cache_limit=0)
    assert {3, 4} <= shapes
    for name, linear in in_memory.layers.items():
        assert torch.equal(linear.codes, on_disk.layers[name].codes)


def test_the_answers_written_are_those_of_transformers(merged: Merged) -> None:
    """Batched and padded here, one by one there."""
    texts = ["first : red tree", "second : blue house runs sings", "red"]
    model = merged.models.load(merged.folder)
    found = merged.family.write(merged.family.load(merged.folder), merged.folder, texts, 6)
    for text, answer in zip(texts, found, strict=True):
        ids, _ = merged.family.prompts(merged.folder, [text])
        written = model.generate(ids, max_new_tokens=6, do_sample=False)[0]
        start = 1 if model.config.is_encoder_decoder else ids.shape[1]
        assert answer == merged.family.tokenizer(merged.folder).decode(
            written[start:], skip_special_tokens=True
        )


def with_prompt(recipe: Recipe, prompt: dict[str, object] | None, **data: object) -> Recipe:
    """The recipe with another prompt and calibration source of the first task."""
    content = recipe.model_dump()
    content["tasks"]["first"]["prompt"] = prompt
    content["tasks"]["first"]["calibration"] |= data
    return parse_recipe(content, "test")


@two_streams
@pytest.mark.parametrize("method", ["regmean", "regmean_pp"])
def test_least_squares_merging_takes_one_sequence_of_blocks(
    merged: Merged, tmp_path: Path, method: str
) -> None:
    recipe = override(merged.recipe, "merge", {"method": method})
    with pytest.raises(RecipeError, match=f"{method} takes models whose blocks form one sequence"):
        merge(recipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("merged", ["t5"], indirect=True)
@pytest.mark.parametrize(
    ("prompt", "data", "message"),
    [
        ({"template": "{text} {nothing}"}, {}, r"has no column 'nothing'"),
        ({"answers": ["yes", "no"]}, {}, r"row \d+: column 'label' holds 2, .* for 0 to 1"),
        (None, {}, r"column 'label' holds .*, expected texts"),
        (None, {"label_column": None}, "label_column is not set"),
        (None, {"label_column": "answer"}, "has no column 'answer'"),
    ],
)
def test_data_that_give_no_texts_are_named(
    merged: Merged, prompt: dict[str, object] | None, data: dict[str, object], message: str
) -> None:
    recipe = with_prompt(merged.recipe, prompt, **data)
    with pytest.raises(MismatchError, match=f"task 'first'.*{message}"):
        calibration_samples(recipe, merged.family, merged.folder)


@pytest.mark.parametrize("template", ["no column", "{text", "{text.strip}", "{text!r}", "{}"])
def test_templates_name_columns_and_nothing_else(template: str) -> None:
    models = {"base": {"path": "b"}, "tasks": {"a": {"expert": "e"}}}
    models["tasks"]["a"]["prompt"] = {"template": template}
    with pytest.raises(RecipeError, match=r"tasks\.a\.prompt\.template"):
        parse_recipe(models, "test")


@pytest.mark.parametrize("merged", ["mistral"], indirect=True)
def test_attention_in_a_window_is_refused(merged: Merged, tmp_path: Path) -> None:
    told = json.loads((merged.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {"sliding_window": 8}))
    with pytest.raises(RecipeError, match="sliding window"):
        merged.family.load(tmp_path)
