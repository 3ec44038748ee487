"""Real accuracy on the bundled experts: the order the whole project stands for."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from epmq_deploy.data.accuracy import torch_accuracy
from epmq_deploy.data.heads import build_heads
from epmq_deploy.data.loading import load_samples
from epmq_deploy.data.samples import batches
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.sequential import quantize_model
from epmq_deploy.quantization.stage import calibration_samples
from epmq_deploy.recipe import Recipe, load_recipe, override


class Zoo:
    """The bundled zoo, merged, with all samples as tensors."""

    def __init__(self, work: Path) -> None:
        self.recipe: Recipe = load_recipe(Path(str(files("epmq_deploy") / "zoo" / "recipe.yaml")))
        self.folder = work / "merged"
        merge(self.recipe, self.folder)
        self.family = family_of(self.folder)
        self.calibration = {
            task: list(batches(chosen, self.family, self.folder, 64))
            for task, chosen in calibration_samples(self.recipe, self.family, self.folder).items()
        }
        self.test: dict[str, tuple[list[tuple[Tensor, ...]], Tensor]] = {}
        for task, spec in self.recipe.tasks.items():
            assert spec.evaluation is not None
            chosen = load_samples(task, spec.evaluation, self.family)
            inputs = list(batches(chosen, self.family, self.folder, 100))
            self.test[task] = inputs, torch.tensor(chosen.labels().numbers)
        self.heads = build_heads(self.recipe.tasks, self.family, self.folder, 128)

    def accuracy(self, model: nn.Module, task: str) -> float:
        inputs, labels = self.test[task]
        return torch_accuracy(model, self.family, self.heads[task], inputs, labels)

    def average(self, model: nn.Module) -> float:
        return sum(self.accuracy(model, task) for task in self.test) / len(self.test)

    def quantized(self, *, rounding: bool = True, **options: object) -> float:
        """Average accuracy after quantizing with the recipe's options but for ``options``."""
        recipe = override(self.recipe, "quantize", options)
        model = self.family.load(self.folder)
        quantize_model(
            model,
            self.family,
            QUANTIZATION_METHODS[recipe.quantize.method],
            recipe.quantize,
            batches={task: (lambda kept=kept: kept) for task, kept in self.calibration.items()},
            experts=ExpertBackbone(open_sources(recipe), torch.device("cpu")),
            rounding=rounding,
        )
        return self.average(model)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def merged_fp32(zoo: Zoo) -> float:
    return zoo.average(zoo.family.load(zoo.folder))


def test_the_zoo_shows_the_problem(zoo: Zoo, merged_fp32: float) -> None:
    expert = ExpertBackbone(open_sources(zoo.recipe), torch.device("cpu"))
    experts = [zoo.accuracy(expert.become(task), task) for task in zoo.test]
    base = zoo.average(zoo.family.load(Path(zoo.recipe.base.path)))
    assert 40 <= base <= 75
    assert sum(experts) / len(experts) >= base + 15
    assert base < merged_fp32 < sum(experts) / len(experts) - 5


@pytest.fixture(scope="module")
def paper(zoo: Zoo) -> float:
    return zoo.quantized(method="epmq", preset="paper")


def test_epmq_at_4_bits_is_above_the_fp32_merged_model(merged_fp32: float, paper: float) -> None:
    assert paper > merged_fp32 + 1


@pytest.fixture(scope="module")
def features(zoo: Zoo) -> float:
    return zoo.quantized(method="epmq", preset="features")


@pytest.fixture(scope="module")
def default(zoo: Zoo) -> float:
    return zoo.quantized()


@pytest.fixture(scope="module")
def gptq(zoo: Zoo) -> float:
    return zoo.quantized(method="gptq", bits=4)


def test_the_experts_features_help_further(paper: float, features: float) -> None:
    assert features > paper + 1


def test_the_experts_own_outputs_help_most(default: float, features: float) -> None:
    assert default > features + 1


def test_the_default_recovers_a_quarter_of_what_gptq_leaves(
    zoo: Zoo, default: float, gptq: float
) -> None:
    expert = ExpertBackbone(open_sources(zoo.recipe), torch.device("cpu"))
    experts = sum(zoo.accuracy(expert.become(task), task) for task in zoo.test) / len(zoo.test)
    assert default - gptq >= 0.25 * (experts - gptq)


def test_rounding_to_4_bits_costs_next_to_nothing(zoo: Zoo, default: float) -> None:
    # One standard error of an average over 4,000 images is about 0.7 points.
    assert default > zoo.quantized(rounding=False) - 0.7


def test_3_bits_are_above_gptq_at_4(zoo: Zoo, gptq: float) -> None:
    assert zoo.quantized(bits=3) > gptq + 1


def test_without_calibration_data_it_is_still_above_the_merged_model(
    zoo: Zoo, merged_fp32: float
) -> None:
    assert zoo.quantized(method="epmq", preset="weights") > merged_fp32 + 1


def test_gptq_at_4_bits_stays_at_the_fp32_merged_model(merged_fp32: float, gptq: float) -> None:
    # One standard error of an average over 4,000 images is about 0.7 points.
    assert merged_fp32 - 2 < gptq <= merged_fp32 + 0.5


def test_gptq_is_above_rounding_at_3_bits(zoo: Zoo) -> None:
    assert zoo.quantized(method="gptq", bits=3) > zoo.quantized(method="rtn", bits=3)
