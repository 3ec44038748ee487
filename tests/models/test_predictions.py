"""What text-generation models predict: every token of the answer."""

import pytest
import torch
from merged_text_generators import MergedTextGenerator, plain_scores
from torch.nn.utils.rnn import pad_sequence

from epmq_deploy.data.agreement import predictions_of
from epmq_deploy.models.predictions import PredictedLogits
from epmq_deploy.models.text_generation.base import TextPair
from epmq_deploy.quantization.stage import calibration_samples


def test_they_are_those_of_each_sample_alone(merged_text_generator: MergedTextGenerator) -> None:
    """Neither padding nor texts count, however long both are."""
    family, folder = merged_text_generator.family, merged_text_generator.folder
    ours, theirs = family.load(folder), merged_text_generator.models.load(folder)
    for chosen in calibration_samples(merged_text_generator.recipe, family, folder).values():
        found = predictions_of(ours, family, folder, chosen, None)
        with torch.no_grad():
            wanted = [
                plain_scores(merged_text_generator, theirs, pair)
                for pair in chosen.inputs(0, len(chosen))
            ]
        assert found.counts.tolist() == [len(scores) for scores in wanted]
        assert len(set(found.counts.tolist())) > 1
        scores = found.logits.log_softmax(dim=1)
        assert torch.allclose(scores, torch.cat(wanted), atol=1e-4)
        part = found.of_samples(3, 5)
        assert torch.allclose(part.logits.log_softmax(dim=1), torch.cat(wanted[3:5]), atol=1e-4)
        assert part.counts.tolist() == found.counts.tolist()[3:5]


def test_means_are_taken_by_sample() -> None:
    counts = torch.tensor([2, 0, 3, 1])
    values = torch.randn(6, generator=torch.Generator().manual_seed(0))
    found = PredictedLogits(torch.zeros(6, 4), counts).per_sample(values)
    rows = pad_sequence(list(values.split(counts.tolist())), batch_first=True)
    assert torch.allclose(found, rows.sum(dim=1) / torch.tensor([2, 1, 3, 1]))
    assert float(found[1]) == 0


@pytest.mark.parametrize("merged_text_generator", ["llama"], indirect=True)
def test_an_answer_longer_than_the_model_reads_is_counted_as_far_as_it_is(
    merged_text_generator: MergedTextGenerator,
) -> None:
    family, folder = merged_text_generator.family, merged_text_generator.folder
    inputs = family.collate(folder, [TextPair("red", "no " * 40), TextPair("red", "no")])
    assert family.prediction_counts(*inputs).tolist() == [15, 2]
    assert len(family.embed(family.load(folder), *inputs)) == 17
