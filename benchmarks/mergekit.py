"""Merging the same checkpoints as mergekit does: results, time and memory.

    OMP_NUM_THREADS=1 python benchmarks/mergekit.py --mergekit ENVIRONMENT/bin/mergekit-yaml

mergekit (PyPI) needs an environment of its own. Writes random RoBERTas of base size into a
temporary folder, merges them by both programs, each from its command line in a process of its own,
and removes them. Task Arithmetic is the same formula in both. mergekit's TIES trims each tensor by
itself and takes the mean, so only its cost is compared. Writes
``benchmarks/results/mergekit.json``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "mergekit.json"
DENSITY, SCALING = 0.2, 0.3


def build(folder: Path, experts: int) -> None:
    """Write a base, experts, a recipe, and mergekit's configurations."""
    import torch
    import yaml
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    base = RobertaForSequenceClassification(RobertaConfig())
    base.save_pretrained(folder / "base")
    state = {name: value.clone() for name, value in base.state_dict().items()}
    names = [f"expert{index}" for index in range(experts)]
    for name in names:
        base.load_state_dict(state)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        base.save_pretrained(folder / name)
    tasks = {name: {"expert": name} for name in names}
    recipe = {"base": {"path": "./base"}, "tasks": tasks}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shared = {"task_arithmetic": {"weight": SCALING}, "ties": {"weight": 1.0, "density": DENSITY}}
    for method, parameters in shared.items():
        models = [{"model": str(folder / name), "parameters": parameters} for name in names]
        config = {
            "merge_method": method,
            "base_model": str(folder / "base"),
            "models": models,
            "dtype": "float32",
        }
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(config))


def run(command: list[str]) -> dict[str, float]:
    """Seconds and peak resident memory of a program."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return {"seconds": round(seconds, 2), "peak_mb": round(usage.ru_maxrss * 1024 / 1e6)}


def largest_difference(first: Path, second: Path) -> float:
    """Over all tensors that both files hold and that merging changed."""
    from safetensors.torch import load_file

    # mergekit keeps the prefix of fine-tuned checkpoints.
    ours, theirs = (
        {
            name.removeprefix("roberta."): value
            for name, value in load_file(folder / "model.safetensors").items()
        }
        for folder in (first, second)
    )
    # Classifiers are heads to us, and stay the base's.
    shared = [name for name in ours.keys() & theirs.keys() if "classifier" not in name]
    assert len(shared) > 150, "the two programs wrote other tensors"
    return max(float((ours[name] - theirs[name]).abs().max()) for name in shared)


def main() -> None:
    """Measure both programs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", required=True, help="the program mergekit-yaml")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--temporary", type=Path, help="where to make the temporary folder")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"model": "RoBERTa base, float32", "experts": arguments.experts}
    with tempfile.TemporaryDirectory(dir=arguments.temporary) as name:
        folder = Path(name)
        build(folder, arguments.experts)
        for method in ("task_arithmetic", "ties"):
            ours, theirs = folder / f"ours-{method}", folder / f"theirs-{method}"
            flags = ["--method", method, "--scaling", str(SCALING)]
            flags += ["--density", str(DENSITY)] if method == "ties" else []
            recipe = str(folder / "recipe.yaml")
            start = "from epmq_deploy.cli.main import main; main()"
            program = [sys.executable, "-c", start]
            row: dict[str, Any] = {
                "epmq": run([*program, "merge", recipe, "-o", str(ours), "--quiet", *flags]),
                "mergekit": run([arguments.mergekit, str(folder / f"{method}.yaml"), str(theirs)]),
            }
            if method == "task_arithmetic":
                row["largest_difference"] = largest_difference(ours, theirs)
            results[method] = row
            print(method, row, flush=True)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
