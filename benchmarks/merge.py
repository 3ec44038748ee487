"""Time and memory of merging, against reading the inputs and writing the output once.

    OMP_NUM_THREADS=1 python benchmarks/merge.py --size base-32 --experts 8
    OMP_NUM_THREADS=1 python benchmarks/merge.py --size large-14 --experts 20

Writes a random CLIP of the size and experts of its image tower into a temporary folder, merges them
with each method in a process of its own, and removes them. Peak memory is the process's largest
resident set, Python and torch included; the bar is 2.5 times the base model. Files are dropped from
the page cache before every run, so that disks are measured, unless --warm. Checking that inputs are
finite and noting their hashes is part of merging; so are the passes before it that some methods
need (TIES one, for its thresholds). Prints Markdown and adds to ``benchmarks/results/merge.json``,
where other methods' rows stay.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "merge.json"
BLOCK = 2**23
# Image tower, then text tower: width, layers, heads; patch and width of the embedding.
SIZES = {
    "tiny": ((64, 2, 2), (64, 1, 2), 8, 32),
    "base-32": ((768, 12, 12), (512, 12, 8), 32, 512),
    "large-14": ((1024, 24, 16), (768, 12, 12), 14, 768),
}
# All but those that take two experts only, or hours on a processor.
METHODS = (
    "average",
    "task_arithmetic",
    "ties",
    "dare",
    "dare_ties",
    "della",
    "breadcrumbs",
    "breadcrumbs_ties",
    "consensus",
    "model_stock",
    "pcb",
    "iso_c",
)


def build(size: str, experts: int, folder: Path) -> None:
    """Write a base and experts of its image tower, and a recipe."""
    import torch
    import yaml
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

    image, text, patch, width = SIZES[size]

    def tower(numbers: tuple[int, int, int]) -> dict[str, int]:
        hidden, layers, heads = numbers
        return {
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }

    config = CLIPConfig(
        vision_config=tower(image) | {"patch_size": patch, "image_size": 224},
        text_config=tower(text),
        projection_dim=width,
    )
    torch.manual_seed(0)
    base = CLIPModel(config)
    base.save_pretrained(folder / "base")
    expert = CLIPVisionModel(config.vision_config)
    for index in range(experts):
        expert.load_state_dict(base.vision_model.state_dict())
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        expert.save_pretrained(folder / f"expert{index}")
    tasks = {f"task{index}": {"expert": f"expert{index}"} for index in range(experts)}
    recipe = {"base": {"path": "./base"}, "tasks": tasks}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def weights(folder: Path) -> list[Path]:
    """All weight files in ``folder``."""
    return sorted(folder.rglob("*.safetensors"))


def drop_from_cache(files: Iterable[Path]) -> None:
    """Let the next reader of these files go to the disk."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_through(inputs: list[Path], output: Path, size: int) -> float:
    """Seconds to read all inputs once and write ``size`` bytes once."""
    block = bytearray(BLOCK)
    start = time.perf_counter()
    for file in inputs:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(block):
                pass
    with output.open("wb", buffering=0) as handle:
        for first in range(0, size, BLOCK):
            handle.write(block[: min(BLOCK, size - first)])
    seconds = time.perf_counter() - start
    output.unlink()
    return seconds


def resident(field: str) -> float:
    """``VmHWM`` (the peak so far) or ``VmRSS`` of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {field} in /proc/self/status")


def merge_one(folder: Path, method: str) -> dict[str, Any]:
    """Merge in this process: seconds and memory."""
    from epmq_deploy.merging.stage import merge
    from epmq_deploy.recipe import load_recipe, override

    recipe = override(load_recipe(folder / "recipe.yaml"), "merge", {"method": method})
    before, start = resident("VmRSS"), time.perf_counter()
    merge(recipe, folder / "merged")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "before_mb": before, "peak_mb": resident("VmHWM")}


def measure(folder: Path, method: str, *, warm: bool) -> dict[str, Any]:
    """One method in a process of its own, relative to the model's size and to plain copying."""
    inputs = weights(folder)
    model = sum(file.stat().st_size for file in weights(folder / "base"))
    if not warm:
        drop_from_cache(inputs)
    plain = copy_through(inputs, folder / "copy.bin", model)
    if not warm:
        drop_from_cache(inputs)
    command = [sys.executable, __file__, "--one", method, "--folder", str(folder)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    subprocess.run(["rm", "-r", str(folder / "merged")], check=True)
    return {
        "seconds": round(found["seconds"], 2),
        "copy_seconds": round(plain, 2),
        "ratio": round(found["seconds"] / plain, 2),
        "peak_mb": round(found["peak_mb"]),
        "before_mb": round(found["before_mb"]),
        "peak_models": round(found["peak_mb"] * 1e6 / model, 2),
        # Other work on the machine slows what computes more than what waits for disks.
        "load": round(os.getloadavg()[0], 1),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown, a row per method."""
    lines = [
        "| method | seconds | copying once | ratio | peak MB | models | load |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    keys = ("seconds", "copy_seconds", "ratio", "peak_mb", "peak_models", "load")
    lines += [
        f"| {name} | " + " | ".join(str(found[key]) for key in keys) + " |"
        for name, found in results["methods"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Build, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="base-32")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--warm", action="store_true", help="leave files in the page cache")
    parser.add_argument("--temporary", type=Path, help="where to make the temporary folder")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(merge_one(arguments.folder, arguments.one)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.temporary) as name:
        folder = Path(name)
        # In a process of its own, so that this one stays small.
        script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import merge; "
        script += f"merge.build({arguments.size!r}, {arguments.experts}, merge.Path({name!r}))"
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
        model = sum(file.stat().st_size for file in weights(folder / "base"))
        inputs = sum(file.stat().st_size for file in weights(folder))
        results: dict[str, Any] = {
            "model_mb": round(model / 1e6),
            "inputs_mb": round(inputs / 1e6),
            "page_cache": "warm" if arguments.warm else "cold",
            "methods": {},
        }
        for method in arguments.methods:
            results["methods"][method] = measure(folder, method, warm=arguments.warm)
            print(method, results["methods"][method], file=sys.stderr, flush=True)
    print(table(results))
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    place = f"{arguments.size}, {arguments.experts} experts"
    # Methods measured earlier stay.
    results["methods"] = known.get(place, {}).get("methods", {}) | results["methods"]
    known[place] = results
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
