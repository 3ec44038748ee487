"""Merges of the tiny text-generation models, and what tests do with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_text_generators import TinyTextGenerators
from torch import Tensor, nn
from torch.nn.functional import kl_div

from epmq_deploy.data.samples import Samples, batches
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.models.text_generation.base import TextGenerationFamily, TextPair, generates_text
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.sequential import quantize_model
from epmq_deploy.quantization.stage import calibration_samples
from epmq_deploy.recipe import Recipe, load_recipe, override


@dataclass(frozen=True)
class MergedTextGenerator:
    """Tiny models of one architecture and their merge."""

    models: TinyTextGenerators
    folder: Path

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.models.recipe)

    @property
    def family(self) -> TextGenerationFamily:
        family = family_of(self.folder)
        assert generates_text(family)
        return family


two_streams = pytest.mark.parametrize("merged_text_generator", ["t5", "flan-t5"], indirect=True)


def inputs_of(recipe: Recipe, merged: MergedTextGenerator) -> list[tuple[Tensor, ...]]:
    """Calibration batches of all tasks."""
    return [
        batch
        for chosen in calibration_samples(recipe, merged.family, merged.folder).values()
        for batch in batches(chosen, merged.family, merged.folder, 8)
    ]


def quantized(merged: MergedTextGenerator, **options: object) -> tuple[nn.Module, QuantizedModel]:
    """Quantize in memory; the model with dequantized weights, and the result."""
    recipe, family, folder = merged.recipe, merged.family, merged.folder
    recipe = override(recipe, "quantize", options)
    model = family.load(folder)
    result = quantize_model(
        model,
        family,
        QUANTIZATION_METHODS[recipe.quantize.method],
        recipe.quantize,
        batches={
            name: partial(batches, chosen, family, folder, 8)
            for name, chosen in calibration_samples(recipe, family, folder).items()
        },
        experts=ExpertBackbone(open_sources(recipe), torch.device("cpu")),
    )
    return model, result


def logits(merged: MergedTextGenerator, model: nn.Module) -> Tensor:
    """What a model says of all calibration samples."""
    with torch.inference_mode():
        outputs = [merged.family.embed(model, *batch) for batch in inputs_of(merged.recipe, merged)]
    return torch.cat(outputs)


def plain_scores(merged: MergedTextGenerator, model: nn.Module, pair: TextPair) -> Tensor:
    """Log-probabilities ``[n, V]`` where a token of the answer or its end is due, one by one."""
    ids, _ = merged.family.prompts(merged.folder, [pair.text])
    tokenizer = merged.family.tokenizer(merged.folder)
    answer = tokenizer(pair.answer, add_special_tokens=False)["input_ids"]
    start = merged.family.special_tokens(merged.folder).start
    if start is None:
        # Cut on the left, as texts are.
        row = torch.tensor([[*ids[0].tolist(), *answer, 1][-int(tokenizer.model_max_length) :]])
        answer_logits = model(input_ids=row).logits[0, -len(answer) - 2 : -1]
    else:
        behind = torch.tensor([[start, *answer]])
        answer_logits = model(input_ids=ids, decoder_input_ids=behind).logits[0]
    scores: Tensor = answer_logits.log_softmax(dim=1)
    return scores


def plain_divergence(
    merged: MergedTextGenerator, samples: Mapping[str, Samples], model: nn.Module
) -> float:
    """Mean over tasks, samples and tokens of the divergence from the experts."""
    means = []
    for task, chosen in samples.items():
        expert = merged.models.load(merged.models.expert(task))
        divergences = []
        for pair in chosen.inputs(0, len(chosen)):
            with torch.no_grad():
                target, predicted = (plain_scores(merged, each, pair) for each in (expert, model))
            divergences.append(
                kl_div(predicted, target, log_target=True, reduction="none").sum(1).mean()
            )
        means.append(torch.stack(divergences).mean())
    return float(torch.stack(means).mean())
