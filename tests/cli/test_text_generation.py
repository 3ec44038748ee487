"""The four commands on tiny text-generation models, compared with ``transformers``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from command_line import run
from tiny_text_generators import (
    TEXT_GENERATORS,
    TEXT_TASKS,
    TinyTextGenerators,
    build_tiny_text_generators,
)

from epmq_deploy.artifacts.manifest import GraphEntry, read_manifest
from epmq_deploy.data.loading import load_samples
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.models import family_of
from epmq_deploy.models.text_generation.base import TextGenerationFamily, generates_text
from epmq_deploy.pipeline import preflight
from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.methods.epmq import PRESETS
from epmq_deploy.quantization.sequential import apply_quantized
from epmq_deploy.recipe import Task, load_recipe, override
from epmq_deploy.recipe.prompt import Prompt
from epmq_deploy.runtime import Answer, ExportedTextGenerator, load
from epmq_deploy.runtime.evaluation import bench
from epmq_deploy.runtime.evaluation.text_scoring import TextScorer, normalised
from epmq_deploy.runtime.ort.generation import TextGenerator

# Tracing takes seconds a block, so there are few.
T5_BLOCKS = {"num_layers": 1, "num_decoder_layers": 1}
BLOCKS = {
    "t5": T5_BLOCKS,
    "flan-t5": T5_BLOCKS,
    "llama": {"num_hidden_layers": 1},
    "qwen2": {"num_hidden_layers": 1},
    "qwen3": {},
}
TEXTS = ["first : red tree runs", "second : blue", "green house sleeps tree river red"]
TOKENS = 7


@dataclass(frozen=True)
class Chain:
    """Tiny models and the folder with the outputs of the four commands."""

    models: TinyTextGenerators
    out: Path

    @property
    def exported(self) -> Path:
        return self.out / "exported"

    @property
    def family(self) -> TextGenerationFamily:
        family = family_of(self.models.base)
        assert generates_text(family)
        return family

    @property
    def graphs(self) -> list[Mapping[str, Any]]:
        manifest = json.loads((self.exported / "manifest.json").read_text())
        graphs: list[Mapping[str, Any]] = manifest["details"]["graphs"]
        return graphs

    @property
    def entries(self) -> tuple[GraphEntry, ...]:
        """The same graphs, as the library reads them."""
        return read_manifest(self.exported, "export").details.graphs

    def writer(self, name: str) -> TextGenerator:
        scorer = TextScorer(self.family, self.exported, self.entries, "cpu", 4, TOKENS)
        return scorer.open(1)[name]

    def model(self, name: str) -> Any:
        """What a format's graphs have to agree with, as ``transformers`` loads it."""
        model = self.models.load(self.out / "merged")
        if name not in ("fp32", "fp16"):
            # As this library loads it: one module for all uses of the embedding.
            model.set_input_embeddings(model.get_input_embeddings())
            apply_quantized(model, *load_artifact(self.out / "quantized"))
        return model


@pytest.fixture(scope="module", params=BLOCKS)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """All four commands on one architecture."""
    name = request.param
    models = build_tiny_text_generators(
        tmp_path_factory.mktemp(name), TEXT_GENERATORS[name], **BLOCKS[name]
    )
    out = models.folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        # Processes that measure memory; medians of several say no more here.
        patch.setattr(bench, "_FOOTPRINTS", 1)
        assert run("run", models.recipe, "-o", out, "--quiet") == 0
    return Chain(models, out)


def test_the_files_are_those_optimum_and_transformers_js_look_for(chain: Chain) -> None:
    stems = ["model"]
    if chain.family.encoder_decoder:
        stems = ["encoder_model", "decoder_model", "decoder_with_past_model"]
    assert {path.name for path in (chain.exported / "onnx").iterdir()} == {
        f"{stem}{suffix}.onnx" for stem in stems for suffix in ("", "_q4", "_qdq")
    }
    assert not (chain.exported / "heads.safetensors").exists()
    for graph in chain.graphs:
        session = onnxruntime.InferenceSession(chain.exported / graph["file"])
        inputs = {item.name for item in session.get_inputs()}
        outputs = {item.name for item in session.get_outputs()}
        own = {
            f"0.{stream}{part}" for stream in ("decoder.", "encoder.") for part in ("key", "value")
        }
        if graph["part"] == "encoder_model":
            assert (inputs, outputs) == ({"input_ids", "attention_mask"}, {"last_hidden_state"})
        elif graph["part"] == "decoder_model":
            assert inputs == {"input_ids", "encoder_attention_mask", "encoder_hidden_states"}
            assert {"logits"} | {f"present.{name}" for name in own} <= outputs
        elif graph["part"] == "decoder_with_past_model":
            past = {f"past_key_values.{name}" for name in own}
            assert {"input_ids", "encoder_attention_mask"} | past <= inputs
            assert {"logits", "present.0.decoder.key", "present.0.decoder.value"} <= outputs
            assert not any(".encoder." in name for name in outputs)
        else:
            past = {"past_key_values.0.key", "past_key_values.0.value"}
            assert {"input_ids", "attention_mask", "position_ids"} | past <= inputs
            assert {"logits", "present.0.key", "present.0.value"} <= outputs


def test_graphs_are_compared_with_torch_on_calibration_samples(chain: Chain) -> None:
    details = json.loads((chain.exported / "manifest.json").read_text())["details"]
    assert (details["parity_inputs"], details["tasks_without_parity"]) == ("calibration", {})
    for graph in chain.graphs:
        parity = graph["parity"]
        # Four a task; a decoder reads, then goes on.
        assert parity["samples"] == 4 * len(TEXT_TASKS) * (2 if graph["part"] == "model" else 1)
        assert parity["relative"] < 1e-5
        assert parity["agreement"] == (None if graph["part"] == "encoder_model" else 1)


def test_every_layer_runs_in_low_bits_where_it_is_part_of_the_graph(chain: Chain) -> None:
    layers, _ = load_artifact(chain.out / "quantized")
    tables = 1
    linear = len(layers) - tables
    low = {
        (graph["format"], graph["part"]): graph["low_bit_nodes"]
        for graph in chain.graphs
        if graph["format"] != "fp32"
    }
    for name in ("matmulnbits", "qdq"):
        if not chain.family.encoder_decoder:
            assert low[name, "model"] == linear
            continue
        assert low[name, "encoder_model"] + low[name, "decoder_model"] == linear
        # Keys and values of cross attention are computed once.
        again = 2 * chain.models.load(chain.models.base).config.num_decoder_layers
        assert low[name, "decoder_with_past_model"] == low[name, "decoder_model"] - again


@pytest.mark.parametrize("name", ["fp32", "matmulnbits", "qdq"])
def test_answers_are_those_of_transformers_token_by_token(chain: Chain, name: str) -> None:
    """Batched, padded, with a cache here; one text by itself there."""
    family, model = chain.family, chain.model(name)
    special = family.special_tokens(chain.exported)
    found = chain.writer(name).write(*family.prompts(chain.exported, TEXTS))
    lengths = set()
    for row, text in zip(found.tolist(), TEXTS, strict=True):
        ids, _ = family.prompts(chain.exported, [text])
        start = {} if special.start is None else {"decoder_start_token_id": special.start}
        written = model.generate(
            ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=list(special.end), **start
        )
        expected = written[0, 1 if family.encoder_decoder else ids.shape[1] :].tolist()
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {special.padding}
        lengths.add(len(expected))
    assert max(lengths) > 2, "nothing was written with a past"


@pytest.mark.parametrize("name", ["fp32", "matmulnbits", "qdq"])
def test_every_step_has_the_logits_of_a_pass_without_cache(chain: Chain, name: str) -> None:
    steps, logits = logits_of_steps(chain, chain.model(name), chain.writer(name))
    assert np.allclose(steps, logits, atol=2e-3 * float(logits.std()))


def logits_of_steps(chain: Chain, model: Any, writer: TextGenerator) -> tuple[Any, Any]:
    """Ten steps with answers that do not end, and one forward pass over all of them."""
    family = chain.family
    ids, mask = family.prompts(chain.exported, TEXTS)
    tokens = torch.randint(2, 15, (len(TEXTS), 10), generator=torch.Generator().manual_seed(1))
    found, values = writer.begin(ids.numpy(), mask.numpy())
    steps = [found]
    for token in tokens.split(1, dim=1):
        found, values = writer.go_on(token.numpy(), values)
        steps.append(found)
    with torch.inference_mode():
        if family.encoder_decoder:
            start = torch.full_like(tokens[:, :1], family.special_tokens(chain.exported).start or 0)
            behind = torch.cat([start, tokens], dim=1)
            logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=behind).logits
        else:
            whole = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            logits = model(
                input_ids=torch.cat([ids, tokens], dim=1),
                attention_mask=whole,
                position_ids=(whole.cumsum(1) - 1).clamp(min=0),
            ).logits[:, ids.shape[1] - 1 :]
    return np.stack(steps, axis=1), logits.numpy()


@pytest.mark.parametrize("chain", ["t5", "llama"], indirect=True)
def test_int8_writes_with_a_cache_what_torch_computes_without(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what activations lose in int8, in which every layer of every part runs."""
    int8 = Chain(chain.models, tmp_path)
    source, formats = chain.out / "quantized", ["--formats", "int8-expand"]
    assert run("export", source, "-o", int8.exported, *formats, "-q") == 0
    graphs = [graph for graph in int8.graphs if graph["format"] == "int8-expand"]
    assert {layer["kernel"] for item in graphs for layer in item["layers"].values()} == {"int8"}
    steps, logits = logits_of_steps(int8, chain.model("int8-expand"), int8.writer("int8-expand"))
    assert np.sqrt(np.square(steps - logits).mean()) < 0.06 * logits.std()
    monkeypatch.setattr(bench, "_FOOTPRINTS", 1)
    assert run("eval", int8.exported, "--no-experts", "--latency-runs", "1", "-q") == 0
    row = json.loads((int8.exported / "eval.json").read_text())["rows"][1]
    assert (row["name"], row["files"]) == ("int8-expand", [graph["file"] for graph in graphs])


def test_experts_score_as_transformers_scores_them(chain: Chain) -> None:
    """Exact answers, counted here once more from the models' own."""
    rows = json.loads((chain.exported / "eval.json").read_text())["rows"]
    scores = {row["name"]: row["accuracy"] for row in rows}
    assert set(scores) == {"experts", "fp32", "matmulnbits", "qdq"}
    recipe = load_recipe(chain.models.recipe)
    tokenizer = chain.family.tokenizer(chain.exported)
    for task in TEXT_TASKS:
        model, hits = chain.models.load(chain.models.expert(task)), 0
        given = recipe.tasks[task]
        assert given.evaluation is not None
        samples = load_samples(task, given.evaluation, chain.family, prompt=given.prompt)
        for pair in samples.inputs(0, len(samples)):
            ids, _ = chain.family.prompts(chain.exported, [pair.text])
            written = model.generate(ids, max_new_tokens=32, do_sample=False)
            answer = written[0, 1 if chain.family.encoder_decoder else ids.shape[1] :]
            text = tokenizer.decode(answer, skip_special_tokens=True)
            hits += normalised(text) == normalised(pair.answer)
        assert scores["experts"][task] == pytest.approx(100 * hits / len(samples))
    assert scores["matmulnbits"] == scores["qdq"]


@pytest.mark.parametrize("chain", ["flan-t5", "qwen3"], indirect=True)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_runs(chain: Chain, tmp_path: Path, preset: str) -> None:
    command = ["quantize", chain.out / "merged", "-o", tmp_path / "q", "-q", "--preset", preset]
    assert run(*command) == 0


def test_texts_are_timed_at_equal_length(chain: Chain) -> None:
    """What a format writes must not decide how fast it seems."""
    writer = chain.writer("fp32")
    ids, mask = chain.family.prompts(chain.exported, TEXTS)
    for length in (1, 3, 5):
        found = writer.run((ids, mask, torch.tensor(length)))
        assert found["answers"].shape == (len(TEXTS), length)


def test_all_files_of_a_format_are_measured_and_named(chain: Chain) -> None:
    report = json.loads((chain.exported / "eval.json").read_text())
    for row in report["rows"]:
        files = [graph["file"] for graph in chain.graphs if graph["format"] == row["name"]]
        assert row["files"] == files
        if files:
            assert row["bytes"] == sum((chain.exported / file).stat().st_size for file in files)


@pytest.mark.parametrize("name", ["fp32", "matmulnbits"])
def test_an_application_gets_what_evaluation_counts(chain: Chain, name: str) -> None:
    """From columns of the data, in other batches than evaluation's."""
    model = load(chain.exported, format=name, provider="cpu", threads=1, batch_size=3)
    assert model.tasks == tuple(TEXT_TASKS)
    scorer = TextScorer(chain.family, chain.exported, chain.entries, "cpu", 4, 32)
    writer = scorer.open(1)[name]
    recipe = load_recipe(chain.models.recipe)
    for task, labels in TEXT_TASKS.items():
        given = recipe.tasks[task]
        assert given.evaluation is not None
        samples = load_samples(task, given.evaluation, chain.family, prompt=given.prompt)
        found = [item[task] for item in model(list(samples.rows), tasks=[task])]
        predicted = scorer.predict({name: writer}, task, samples).predicted[name].tolist()
        assert [normalised(answer.text) for answer in found] == predicted
        for answer, text in zip(found, predicted, strict=True):
            assert answer.labels == labels
            assert answer.label == (text if text in labels else None)


def test_raw_texts_are_answered_as_transformers_answers_them(chain: Chain) -> None:
    model = load(chain.exported, format="fp32", max_tokens=TOKENS)
    assert isinstance(model, ExportedTextGenerator)
    merged, tokenizer = chain.model("fp32"), chain.family.tokenizer(chain.exported)
    expected = []
    for text in TEXTS:
        ids, _ = chain.family.prompts(chain.exported, [text])
        written = merged.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        answer = written[0, 1 if chain.family.encoder_decoder else ids.shape[1] :]
        expected.append(tokenizer.decode(answer, skip_special_tokens=True))
    assert model.write(TEXTS) == expected
    assert model.write(TEXTS[1]) == expected[1]
    assert any(expected)


def test_scores_are_the_probabilities_of_the_answers(chain: Chain) -> None:
    """Each by one forward pass of the merged model over text, answer and end."""
    merged = chain.model("fp32")
    inputs = [{"text": "red tree", "more": "blue"}, {"text": "green", "more": "river runs"}]
    found = load(chain.exported, format="fp32")(inputs)
    for item, given in zip(found, inputs, strict=True):
        for task, labels in TEXT_TASKS.items():
            prompt = f"{task} : {given['text']} {given['more']} :"
            for label, score in zip(labels, item[task].scores, strict=True):
                expected = log_probability(chain, merged, prompt, label)
                assert np.log(score) == pytest.approx(expected, rel=1e-3)
    quick = load(chain.exported, format="fp32", scores=False)(inputs[0])
    assert [answer.scores for answer in quick.values()] == [None] * len(TEXT_TASKS)
    assert [quick[task].text for task in quick] == [found[0][task].text for task in quick]


def log_probability(chain: Chain, model: Any, prompt: str, label: str) -> float:
    """Of writing a label and an end behind a prompt."""
    special = chain.family.special_tokens(chain.exported)
    answer = chain.family.tokenizer(chain.exported)(label, add_special_tokens=False)["input_ids"]
    ids, _ = chain.family.prompts(chain.exported, [prompt])
    with torch.inference_mode():
        if chain.family.encoder_decoder:
            behind = torch.tensor([[special.start, *answer]])
            logits = model(input_ids=ids, decoder_input_ids=behind).logits[0]
        else:
            whole = torch.cat([ids, torch.tensor([answer])], dim=1)
            logits = model(input_ids=whole).logits[0, ids.shape[1] - 1 :]
    wanted = torch.tensor([*answer, special.end[0]])
    return float(logits.log_softmax(dim=1).gather(1, wanted[:, None]).sum())


@pytest.mark.parametrize("chain", ["t5", "llama"], indirect=True)
def test_a_written_answer_is_the_label_it_equals(chain: Chain) -> None:
    """But for case and spaces; its score is that label's."""
    tasks = load_recipe(chain.models.recipe).tasks
    writer = chain.writer("matmulnbits")
    plain = ExportedTextGenerator(writer, chain.family, chain.exported, tasks, 4, scores=False)
    text = next(answer for sample in TEXTS if (answer := plain.write(sample)))
    sample = next(sample for sample in TEXTS if plain.write(sample) == text)
    labels = ("no", f"  {text.upper()}", "yes")
    tasks["first"] = Task(expert="x", prompt=Prompt(template="{it}", answers=labels))
    answer = ExportedTextGenerator(writer, chain.family, chain.exported, tasks, 4, scores=True)(
        sample, tasks=["first"]
    )["first"]
    assert (answer.text, answer.label, answer.labels) == (text, labels[1], labels)
    assert answer.score == answer.scores[1]
    tasks["first"] = Task(expert="x")
    free = ExportedTextGenerator(writer, chain.family, chain.exported, tasks, 4, scores=True)
    answer = free(sample, tasks=["first"])["first"]
    assert answer == Answer(text, None, None, None, None)


@pytest.mark.parametrize("chain", ["llama"], indirect=True)
def test_texts_that_do_not_fit_a_task_are_named(chain: Chain) -> None:
    model = load(chain.exported)
    assert isinstance(model, ExportedTextGenerator)
    with pytest.raises(MismatchError, match="'first' reads text and more; give a dictionary"):
        model("red")
    with pytest.raises(MismatchError, match=r"input 1: .*'second' reads more, which is not given"):
        model([{"text": "a", "more": "b"}, {"text": "a"}], tasks=["second"])
    with pytest.raises(MismatchError, match="expected a str, found int"):
        model({"text": "a", "more": 3})
    with pytest.raises(MismatchError, match="input 0: expected a str, found dict"):
        model.write([{"text": "a"}])  # type: ignore[list-item]
    assert model([]) == []


@pytest.mark.parametrize("chain", ["t5", "llama"], indirect=True)
def test_what_has_no_use_for_texts_is_refused_before_any_work(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", chain.exported, "--diagnose", "-q", "--overwrite") == 3
    assert "eval.diagnose compares layers of classifiers; leave it out" in capsys.readouterr().err
    demo = "export.demo: the page only classifies, but this model generates text; leave it out"
    command = ["export", chain.out / "quantized", "-o", tmp_path / "x", "-q"]
    assert run(*command, "--demo") == 2
    assert demo in capsys.readouterr().err
    out = tmp_path / "out"
    assert run("run", chain.models.recipe, "-o", out, "-q", "--set", "export.demo=true") == 3
    assert demo in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(RecipeError, match="max_tokens is 0; give 1 or more"):
        load(chain.exported, max_tokens=0)


@pytest.mark.parametrize("chain", ["t5"], indirect=True)
def test_what_asks_for_predictions_needs_no_head(chain: Chain, tmp_path: Path) -> None:
    flags = {"quantize": {"anchor": "auto"}, "merge": {"search": True}}
    recipe = load_recipe(chain.models.recipe)
    for section, given in flags.items():
        recipe = override(recipe, section, given)
    preflight(recipe)
    command = ["quantize", chain.out / "merged", "-o", tmp_path / "q", "-q", "--anchor", "auto"]
    assert run(*command) == 0
    assert run("merge", chain.models.recipe, "-o", tmp_path / "m", "-q", "--search") == 0
