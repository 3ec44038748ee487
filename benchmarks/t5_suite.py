"""A small T5 trained from scratch on two real text tasks: experts, merged, 4 bits.

    python benchmarks/t5_suite.py

News topics (BBC) and newswire subjects (Reuters R8) in words, from the packages of the text suite
(`text_sources.py`). A base is trained briefly on both, then each expert on its own; all models,
data and a recipe are written into ``--cache`` and kept there. Exact answers of test texts, written
greedily in torch, go to ``benchmarks/results/t5_suite.json``.
"""

from __future__ import annotations

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from packages import fetch
from text_sources import SOURCES
from text_suite import CACHE as TEXT_CACHE
from text_tasks import TextTask, split_task, write_splits
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from epmq_deploy.cli.run import assign
from epmq_deploy.data.loading import load_samples
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.models.text_generation.base import TextPair
from epmq_deploy.models.text_generation.t5 import FAMILY
from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.sequential import apply_quantized
from epmq_deploy.quantization.stage import quantize
from epmq_deploy.recipe import Recipe, load_recipe, parse_recipe
from epmq_deploy.runtime.evaluation.text_scoring import normalised

CACHE = TEXT_CACHE.with_name("t5_suite")
RESULTS = Path(__file__).parent / "results" / "t5_suite.json"
TASKS = ("bbc", "reuters")
VOCABULARY, MAX_TOKENS, ANSWER = 4096, 48, 4
BASE_EPOCHS, EXPERT_EPOCHS, BATCH, RATE = 1, 4, 32, 1e-3
SHAPE = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
METHODS = {
    "round to nearest": ["quantize.method=rtn"],
    "GPTQ": ["quantize.method=gptq"],
    "E-PMQ, preset paper": ["quantize.preset=paper"],
    "E-PMQ, default": [],
    "E-PMQ, anchor auto": ["quantize.anchor=auto"],
    "E-PMQ, default, distill 2": ["quantize.distill=2"],
}
MERGES = {
    "Task Arithmetic, searched scaling": ["merge.search=true"],
    "RegMean": ["merge.method=regmean"],
    "RegMean++": ["merge.method=regmean_pp"],
    "Fisher": ["merge.method=fisher"],
    "AdaMerging": ["merge.method=adamerging"],
}
# Once more with calibration data that have no labels: experts write answers of their own.
UNLABELLED = ("E-PMQ, default", "E-PMQ, anchor auto", "RegMean")


def prompt_of(task: TextTask) -> dict[str, Any]:
    """Return the task in words."""
    return {"template": f"{task.name} : {{text}}", "answers": list(task.classes)}


def pairs_of(task: TextTask) -> list[TextPair]:
    """Training texts with answers."""
    return [TextPair(f"{task.name} : {text}", task.classes[label]) for text, label in task.train]


def write_tokenizer(pairs: list[TextPair], folder: Path) -> None:
    """Lower-cased words and punctuation, the most frequent of the training texts."""
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.WordLevelTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False
    )
    core.train_from_iterator((f"{pair.answer} {pair.text}" for pair in pairs), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    ).save_pretrained(folder)


def train(model: Any, pairs: list[TextPair], folder: Path, epochs: int, seed: int) -> None:
    """Fine-tune on pairs of texts and answers; ``folder`` has the tokenizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    order = random.Random(seed)
    model.train()
    for epoch in range(epochs):
        shuffled = order.sample(pairs, len(pairs))
        losses = []
        for start in range(0, len(shuffled), BATCH):
            ids, mask, behind, real = FAMILY.collate(folder, shuffled[start : start + BATCH])
            logits = model(
                input_ids=ids, attention_mask=mask, decoder_input_ids=behind, use_cache=False
            ).logits
            # What follows each token the decoder reads; the end's id is 1.
            wanted = torch.cat([behind[:, 1:], torch.zeros_like(behind[:, :1])], dim=1)
            wanted[torch.arange(len(wanted)), real.sum(dim=1) - 1] = 1
            loss = cross_entropy(logits[real.bool()], wanted[real.bool()])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
        print(f"  epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}", flush=True)
    model.eval()


def build(cache: Path, seed: int) -> Path:
    """Train what is not there yet and write the recipe; returns it."""
    recipe = cache / "recipe.yaml"
    if recipe.is_file():
        return recipe
    sources = {source.name: source for source in SOURCES}
    work = TEXT_CACHE / "packages"
    tasks = [
        split_task(
            sources[name],
            list(sources[name].read(fetch(sources[name].package, work))),
            seed + number,
        )
        for number, name in enumerate(TASKS)
    ]
    base = cache / "base"
    base.mkdir(parents=True, exist_ok=True)
    every = [pair for task in tasks for pair in pairs_of(task)]
    write_tokenizer(every, base)
    torch.manual_seed(seed)
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **SHAPE, **special))
    model.config.save_pretrained(base)
    print("base", flush=True)
    train(model, every, base, BASE_EPOCHS, seed)
    model.save_pretrained(base)
    for number, task in enumerate(tasks):
        write_splits(task, cache / "tasks" / task.name)
        expert = T5ForConditionalGeneration.from_pretrained(base)
        print(f"expert {task.name}", flush=True)
        train(expert, pairs_of(task), base, EXPERT_EPOCHS, seed + number)
        expert.save_pretrained(cache / "experts" / task.name)
    content = {
        "base": {"path": "base"},
        "tasks": {
            task.name: {
                "expert": f"experts/{task.name}",
                "prompt": prompt_of(task),
                "calibration": {"path": f"tasks/{task.name}/calibration.jsonl"},
                "evaluation": {"path": f"tasks/{task.name}/test.jsonl"},
            }
            for task in tasks
        },
        "merge": {"method": "task_arithmetic", "scaling": 0.3},
        "quantize": {"method": "epmq", "bits": 4, "group_size": 64, "samples": 128},
        "eval": {"max_tokens": ANSWER},
    }
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return recipe


def accuracy(recipe: Recipe, folder: Path, model: Any, task: str, limit: int) -> float:
    """Percent of test texts answered exactly."""
    given = recipe.tasks[task]
    assert given.evaluation is not None, "build gives every task evaluation data"
    samples = load_samples(task, given.evaluation, FAMILY, prompt=given.prompt, limit=limit)
    pairs = samples.inputs(0, len(samples))
    found = FAMILY.generate(model, folder, [pair.text for pair in pairs], ANSWER)
    hits = [
        normalised(text) == normalised(pair.answer) for text, pair in zip(found, pairs, strict=True)
    ]
    return 100.0 * sum(hits) / len(hits)


def without_labels(recipe: Recipe) -> Recipe:
    """Return the recipe with the labels of its calibration data left unread."""
    content = recipe.model_dump()
    for task in content["tasks"].values():
        task["calibration"]["label_column"] = None
        task["prompt"]["max_tokens"] = ANSWER
    return parse_recipe(content, "without labels")


def variants(recipe: Recipe, ways: dict[str, list[str]]) -> Iterator[tuple[str, Recipe]]:
    """Yield the recipe in every way, by name."""
    for name, flags in ways.items():
        chosen = assign(recipe, flags)
        yield name, chosen
        if name in UNLABELLED:
            yield f"{name}, no labels", without_labels(chosen)


def measure(recipe: Recipe, cache: Path, limit: int) -> dict[str, dict[str, float]]:
    """Accuracy by model and task."""
    merged = cache / "merged"
    if not merged.is_dir():
        merge(recipe, merged)
    family, device = family_of(merged), torch.device("cpu")
    experts = ExpertBackbone(open_sources(recipe), device)

    def scores(model: Any) -> dict[str, float]:
        return {task: accuracy(recipe, merged, model, task, limit) for task in recipe.tasks}

    rows = {
        "base": scores(family.load(cache / "base")),
        "experts": {
            task: accuracy(recipe, merged, experts.become(task), task, limit)
            for task in recipe.tasks
        },
        "merged, fp32": scores(family.load(merged)),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, chosen in variants(recipe, METHODS):
            output = Path(folder) / name
            quantize(chosen, merged, output)
            model = family.load(merged)
            apply_quantized(model, *load_artifact(output))
            rows[f"{name}, 4 bits"] = scores(model)
        for name, chosen in variants(recipe, MERGES):
            output = Path(folder) / name
            merge(chosen, output)
            rows[f"{name}, fp32"] = scores(family.load(output))
    return rows


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for everything written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=500, help="test texts per task")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the report")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(build(arguments.cache, arguments.seed))
    rows = measure(recipe, arguments.cache, arguments.limit)
    for name, scores in rows.items():
        mean = sum(scores.values()) / len(scores)
        shown = ", ".join(f"{task} {value:.1f}" for task, value in scores.items())
        print(f"{name}: {shown}; average {mean:.2f}")
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
