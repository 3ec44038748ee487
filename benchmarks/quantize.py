"""Time and memory of quantization on CLIP ViT-B/32 at full size, random weights, as ratios.

    python benchmarks/quantize.py                       # all figures
    python benchmarks/quantize.py --experts 8 --samples 32 --set products=bfloat16

Time is that of ``quantize_model`` over that of the bare forward passes it needs: the merged model
and every expert once over the same samples, measured before and after it in the same process. There
are two yardsticks where they differ: those passes in float32, as a model is usually run, and under
autocast to the dtype in which calibration runs the blocks (``products``).
Peak resident memory is the process's own (``ru_maxrss``), one process per number of experts.
Writes ``benchmarks/results/quantize.json``.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from epmq_deploy.models import family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.sequential import quantize_model
from epmq_deploy.recipe import Recipe, override, parse_recipe

RESULTS = Path(__file__).parent / "results" / "quantize.json"
# Time at the size users have; memory with activations bounded far below what all of them take.
RUNS: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (8, 32, {}),
    (8, 8, {"cache_limit": 0.1}),
    (20, 8, {"cache_limit": 0.1}),
)
# Experts on disk; tasks take turns with them, so that 20 tasks do not need 20 files.
DISTINCT = 4


def write_models(folder: Path, experts: int = DISTINCT) -> None:
    """Return a ViT-B/32 with random weights and experts near it, in the published layout."""
    torch.manual_seed(0)
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = CLIPConfig(
        vision_config=CLIPVisionConfig(patch_size=32).to_dict(),
        text_config=text | {"num_attention_heads": 2, "eos_token_id": 63},
    )
    base = CLIPModel(config)
    base.save_pretrained(folder / "base")
    for index in range(experts):
        expert = CLIPVisionModel(config.vision_config)
        expert.load_state_dict(base.vision_model.state_dict())
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.1 * parameter.std().nan_to_num(0.0) * torch.randn_like(parameter))
        expert.save_pretrained(folder / f"expert{index}")


def make_recipe(folder: Path, experts: int) -> Recipe:
    """Return a recipe over the written models."""
    tasks = {
        f"task{index}": {"expert": str(folder / f"expert{index % DISTINCT}")}
        for index in range(experts)
    }
    return parse_recipe({"base": {"path": str(folder / "base")}, "tasks": tasks}, "benchmark")


def images(task: str, samples: int, batch: int) -> Iterable[tuple[Tensor, ...]]:
    """Random images, always the same for a task, made when asked for."""
    generator = torch.Generator().manual_seed(sum(task.encode()))
    for start in range(0, samples, batch):
        size = min(batch, samples - start)
        # Smooth noise: pixels that are all independent would give every token the same statistics.
        coarse = torch.randn(size, 3, 14, 14, generator=generator)
        yield (torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bilinear"),)


def measure(folder: Path, experts: int, samples: int, options: dict[str, Any]) -> dict[str, Any]:
    """Quantize once, with the bare forward passes before and after."""
    recipe = override(make_recipe(folder, experts), "quantize", {"samples": samples, **options})
    chosen: Any = recipe.quantize
    family = family_of(folder / "base")
    model = family.load(folder / "base")
    sources = ExpertBackbone(open_sources(recipe), torch.device("cpu"))
    size = getattr(chosen, "batch_size", samples)
    products = QUANTIZATION_METHODS[chosen.method].products_dtype(chosen)

    def bare(dtype: torch.dtype) -> float:
        """Seconds for the merged model and every expert, without loading weights."""
        seconds = 0.0
        for task in recipe.tasks:
            inputs = list(images(task, samples, size))
            started = time.perf_counter()
            # Student and expert cost the same whatever their weights are.
            for _ in range(2):
                with torch.inference_mode():
                    for batch in inputs:
                        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                            family.embed(model, *batch)
            seconds += time.perf_counter() - started
        return seconds

    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, products)}
    before = {name: bare(dtype) for name, dtype in dtypes.items()}
    started = time.perf_counter()
    result = quantize_model(
        model,
        family,
        QUANTIZATION_METHODS[chosen.method],
        chosen,
        batches={task: (lambda task=task: images(task, samples, size)) for task in recipe.tasks},
        experts=sources,
    )
    seconds = time.perf_counter() - started
    forward = {name: (before[name] + bare(dtype)) / 2 for name, dtype in dtypes.items()}
    solving = sum(report.seconds for report in result.reports)
    return {
        "experts": experts,
        "samples": samples,
        "options": chosen.model_dump(),
        "threads": torch.get_num_threads(),
        "products": str(products).removeprefix("torch."),
        "ratio": {name: seconds / passes for name, passes in forward.items()},
        "solver_ratio": {name: solving / passes for name, passes in forward.items()},
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "seconds": seconds,
        "forward_seconds": forward,
    }


def main() -> None:
    """Measure what the command line asks for; without it, time and memory of the defaults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--set", action="append", default=[], metavar="option=value")
    parser.add_argument("--models", type=Path, help="folder for the models; temporary when absent")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    options = {key: yaml.safe_load(value) for key, value in (s.split("=") for s in arguments.set)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.models or Path(temporary)
        if not (folder / "base").is_dir():
            write_models(folder)
        if arguments.experts:
            print(json.dumps(measure(folder, arguments.experts, arguments.samples, options)))
            return
        rows = []
        for experts, samples, settings in RUNS:
            command = [sys.executable, __file__, "--models", str(folder)]
            command += ["--experts", str(experts), "--samples", str(samples)]
            command += [f"--set={key}={value}" for key, value in (options | settings).items()]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
            row = rows[-1]
            ratios = ", ".join(
                f"{ratio:.2f} x {dtype} forward (of it solver {row['solver_ratio'][dtype]:.2f})"
                for dtype, ratio in row["ratio"].items()
            )
            print(
                f"{experts} experts x {samples} samples {settings}, {row['products']}: {ratios}, "
                f"peak {row['peak_gib']:.2f} GiB",
                flush=True,
            )
        arguments.output.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
