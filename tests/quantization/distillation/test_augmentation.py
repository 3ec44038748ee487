"""Augmented samples: shifted and mixed images, texts with words dropped or joined."""

import torch

from epmq_deploy.models.text_generation.base import TextPair
from epmq_deploy.models.token_batch import Words
from epmq_deploy.quantization.distillation.augmentation import Augmentation, mixed, moved


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_images_move_by_an_eighth_of_their_size_at_most() -> None:
    columns = torch.arange(64.0).expand(16, 1, 64, 64)
    centre = moved(columns, seeded())[:, 0, 32, 32]
    assert bool(((centre - 32).abs() <= 8 + 1e-4).all())
    assert float(centre.std()) > 1


def test_images_are_never_mirrored() -> None:
    columns = torch.arange(64.0).expand(64, 1, 64, 64)
    assert bool((moved(columns, seeded())[:, 0, 32, 40:48].diff(dim=1) > 0).all())


def test_mixed_images_lie_between_two_of_the_batch() -> None:
    pixels = torch.eye(4)[:, :, None, None]
    changed = 0
    for seed in range(20):
        result = mixed(pixels, seeded(seed))[:, :, 0, 0]
        torch.testing.assert_close(result.sum(dim=1), torch.ones(4))
        assert bool(((result > 0).sum(dim=1) <= 2).all())
        changed += not torch.equal(result, torch.eye(4))
    assert 3 < changed < 17


def test_texts_keep_their_kind_and_lose_few_words() -> None:
    words = [f"w{number}" for number in range(200)]
    others = [f"v{number}" for number in range(100)]
    batch = [" ".join(words), " ".join(others)]
    lengths = []
    for seed in range(20):
        first, second = Augmentation("text").of_samples(batch, seeded(seed))
        assert set(first.split()) <= {*words, *others}
        lengths.append(len(first.split()))
        assert second
    assert min(lengths) >= 50
    assert max(lengths) < 200
    pair = Augmentation("text").of_samples([("a b c", "d e f"), ("g h", "i j")], seeded())
    assert all(isinstance(texts, tuple) and len(texts) == 2 for texts in pair)
    tagged = Augmentation("text").of_samples([Words(("a", "b")), Words(("c",))], seeded())
    assert all(isinstance(sample, Words) and sample.words for sample in tagged)


def test_empty_texts_and_answers_stay() -> None:
    assert Augmentation("text").of_samples(["", ""], seeded()) == ["", ""]
    pairs = [TextPair("a text of words", "answer")] * 4
    assert Augmentation("text").of_samples(pairs, seeded()) == pairs
    inputs = (torch.ones(2, 3), torch.ones(2, 3))
    assert Augmentation("text").of_inputs(inputs, seeded()) is inputs
    assert Augmentation().of_inputs(inputs, seeded()) is inputs


def test_numbers_come_from_the_generator_alone() -> None:
    pixels = torch.rand(4, 3, 8, 8)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(Augmentation("image").of_inputs((pixels,), seeded())[0])
    assert torch.equal(*results)
    assert not torch.equal(results[0], Augmentation("image").of_inputs((pixels,), seeded(1))[0])
