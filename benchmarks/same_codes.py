"""Record what the product computes, and compare a later version with it, hash by hash.

    python benchmarks/same_codes.py record before.json
    python benchmarks/same_codes.py compare before.json     # exit code 1 where anything differs

Uses the command line and files alone, so that it outlives changes of the code: the bundled zoo, and
tiny models (BERT, T5, Llama) with every merge method, every quantization method and preset, and
every format. Codes depend on processor, number of threads and library versions in their last
digits, so records are compared only where these are the same. ``--only`` takes names of cases.
"""

import argparse
import contextlib
import hashlib
import io
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import torch
from safetensors import safe_open
from tiny_text import build_tiny_text
from tiny_text_generators import TEXT_GENERATORS, build_tiny_text_generators

from epmq_deploy.cli.main import main as epmq

CASES = ("zoo", "bert", "t5", "llama")
PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
# Fewer epochs and steps than by default: enough to show a difference.
MERGE_FLAGS = {"adamerging": ["--steps", "3"], "wudi": ["--steps", "5"]}
QUANTIZATIONS = {
    "rtn": ["--method", "rtn"],
    "gptq": ["--method", "gptq"],
    "gptaq": ["--method", "gptaq"],
    "paper": ["--preset", "paper"],
    "features": ["--preset", "features"],
    "outputs": ["--preset", "outputs"],
    "weights": ["--preset", "weights"],
    "outputs, 3 bits": ["--bits", "3"],
    "outputs, 2 bits": ["--bits", "2"],
    "outputs, symmetric": ["--symmetric"],
    "outputs, per channel": ["--group-size", "-1"],
    "outputs, joint bias": ["--bias", "joint"],
    "outputs, distilled": ["--distill", "1"],
    "outputs, anchor auto": ["--anchor", "auto"],
    "outputs, 3.5 bits": ["--target-bits", "3.5"],
    "outputs, float64": ["--solver", "float64", "--products", "float32"],
}


FORMATS = "fp32,fp16,matmulnbits,qdq,int8-expand"


def machine() -> dict[str, str]:
    """Return what codes depend on beside the code."""
    versions = {name: version(name) for name in PACKAGES}
    return versions | {
        "python": platform.python_version(),
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def record(only: list[str]) -> dict[str, Any]:
    """Run all cases; hashes by case and artifact."""
    hashes = {}
    for case in only:
        with tempfile.TemporaryDirectory() as folder:
            hashes[case] = dict(_zoo(Path(folder)) if case == "zoo" else _tiny(case, Path(folder)))
        print(f"{case}: {len(hashes[case])} hashes", file=sys.stderr)
    return {"machine": machine(), "hashes": hashes}


def _zoo(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the demo's own chain in one pass, all else at its defaults, in all formats."""
    recipe = Path(str(files("epmq_deploy"))) / "zoo" / "recipe.yaml"
    yield from _run(folder, "merged", "merge", str(recipe), "-o")
    fast = ["--effort", "fast"]
    yield from _run(folder, "quantized", "quantize", str(folder / "merged"), *fast, "-o")
    formats = ["--formats", FORMATS]
    yield from _run(folder, "exported", "export", str(folder / "quantized"), *formats, "-o")


def _tiny(case: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Every method and preset on a tiny model, and every format of its default quantization."""
    if case == "bert":
        build_tiny_text(folder)
    else:
        build_tiny_text_generators(folder, TEXT_GENERATORS[case])
    recipe = str(folder / "recipe.yaml")
    for method in _merge_methods():
        flags = ["--method", method, *MERGE_FLAGS.get(method, ())]
        yield from _run(folder, f"merged by {method}", "merge", recipe, *flags, "-o")
    yield from _run(folder, "merged by search", "merge", recipe, "--search", "-o")
    merged = str(folder / "merged by task_arithmetic")
    for name, flags in QUANTIZATIONS.items():
        yield from _run(folder, name, "quantize", merged, *flags, "-o")
    for name in ("outputs", "gptq", "outputs, 2 bits"):
        quantized = str(folder / name)
        flags = ["--formats", FORMATS]
        yield from _run(folder, f"exported {name}", "export", quantized, *flags, "-o")


def _merge_methods() -> list[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        epmq(["merge", "--list", "--json"])
    return [method["name"] for method in json.loads(printed.getvalue())["methods"]]


def _run(folder: Path, name: str, *command: str) -> Iterator[tuple[str, str]]:
    """Run a command into a folder of this name; its exit code and hashes of what it wrote."""
    output = folder / name
    code: Any = None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            epmq([*command, str(output), "--quiet"])
        except SystemExit as ended:
            code = ended.code
    yield f"{name}: exit code", str(code or 0)
    for file in sorted(output.rglob("*")):
        stem = f"{name}: {file.relative_to(output).as_posix()}"
        if "/merged/" in f"/{file.relative_to(output).as_posix()}" or not file.is_file():
            continue
        if file.suffix == ".safetensors":
            yield from ((f"{stem}: {key}", digest) for key, digest in _tensors(file).items())
        elif ".onnx" in file.name:
            yield stem, hashlib.sha256(file.read_bytes()).hexdigest()


def _tensors(file: Path) -> dict[str, str]:
    hashes = {}
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - not a mapping
            tensor = stored.get_tensor(name).contiguous()
            content = tensor.flatten().view(torch.uint8).numpy().tobytes()
            label = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
            hashes[name] = hashlib.sha256(label + content).hexdigest()
    return hashes


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """One line for every artifact that is missing, new or different."""
    lines = [f"missing: {key}" for key in before if key not in after]
    lines += [f"new: {key}" for key in after if key not in before]
    lines += [f"differs: {key}" for key in before if key in after and before[key] != after[key]]
    return lines


def main() -> None:
    """Record, or compare with a record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    arguments = parser.parse_args()
    if arguments.action == "record":
        content = record(arguments.only)
        arguments.file.write_text(json.dumps(content, indent=1) + "\n")
        return
    before = json.loads(arguments.file.read_text())
    other = [key for key, value in machine().items() if before["machine"].get(key) != value]
    if other:
        sys.exit(f"recorded with another {', '.join(other)}: {before['machine']}")
    after = record(arguments.only)
    lines = [
        f"{case}: {line}"
        for case in arguments.only
        for line in differences(before["hashes"][case], after["hashes"][case])
    ]
    print("\n".join(lines) or "everything is the same")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
