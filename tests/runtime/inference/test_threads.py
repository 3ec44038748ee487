"""One opened model shared by many threads answers exactly as one thread does."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from merged_text_generators import MergedTextGenerator
from tiny_text import WORDS, TinyText
from tiny_zoo import TinyZoo

from epmq_deploy.exporters.stage import export
from epmq_deploy.merging.stage import merge
from epmq_deploy.models.image_inputs import image_processor
from epmq_deploy.quantization.stage import quantize
from epmq_deploy.recipe import Recipe, load_recipe, override
from epmq_deploy.runtime import load

THREADS, REQUESTS = 16, 50


def exported(recipe: Recipe, merged: Path, folder: Path) -> Path:
    """An export of a merged model, rounded to nearest."""
    chosen = override(recipe, "quantize", {"method": "rtn", "group_size": 16})
    quantize(chosen, merged, folder / "quantized")
    export(
        override(chosen, "export", {"formats": ["matmulnbits"]}),
        folder / "quantized",
        folder / "onnx",
    )
    return folder / "onnx"


def texts(longest: int) -> list[str]:
    """Texts of 1 to so many words: some are cut, and few are equally long."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS[:-1], rng.integers(1, longest))) for _ in range(REQUESTS)]


def same(first: Any, second: Any) -> bool:
    """Whether two answers are equal to the last bit."""
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if hasattr(first, "__dataclass_fields__"):
        return all(same(value, vars(second)[name]) for name, value in vars(first).items())
    return bool(first == second)


def check_threads(ask: Callable[[Any], dict[str, Any]], requests: list[Any]) -> None:
    """Ask every request in each of 16 threads, in an order of its own, all at once."""
    expected = [ask(request) for request in requests]
    start = Barrier(THREADS)

    def work(thread: int) -> list[int]:
        order = np.random.default_rng(thread).permutation(len(requests))
        start.wait()
        answers = [(index, ask(requests[index])) for index in order]
        return [
            index
            for index, answer in answers
            if not all(same(answer[task], expected[index][task]) for task in expected[index])
        ]

    with ThreadPoolExecutor(THREADS) as pool:
        different = [index for found in pool.map(work, range(THREADS)) for index in found]
    assert different == []


def test_image_classifiers_are_shared_by_threads(tiny: TinyZoo, tmp_path: Path) -> None:
    merge(load_recipe(tiny.recipe), tmp_path / "merged")
    folder = exported(load_recipe(tiny.recipe), tmp_path / "merged", tmp_path)
    rng = np.random.default_rng(0)
    shapes = rng.integers(8, 64, (REQUESTS, 2))
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    model = load(folder)
    check_threads(model, images)
    image_processor.cache_clear()
    check_threads(model, images)


def test_text_classifiers_are_shared_by_threads(tiny_text: TinyText, tmp_path: Path) -> None:
    merge(load_recipe(tiny_text.recipe), tmp_path / "merged")
    folder = exported(load_recipe(tiny_text.recipe), tmp_path / "merged", tmp_path)
    check_threads(load(folder), texts(40))


@pytest.mark.parametrize("merged_text_generator", ["flan-t5", "qwen3"], indirect=True)
def test_text_generators_are_shared_by_threads(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    folder = exported(merged_text_generator.recipe, merged_text_generator.folder, tmp_path)
    model = load(folder, max_tokens=4)
    requests = [{"text": text, "more": "blue"} for text in texts(60)]
    check_threads(model, requests)
