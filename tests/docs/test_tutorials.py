"""Every tutorial runs as it stands, on tiny models under the names that it uses."""

import json
import shlex
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from command_line import run
from fenced_blocks import DOCS, blocks_of
from safetensors.torch import load_file, save_file
from tiny_families import ARCHITECTURES, FAMILY_TASKS, build_tiny_models
from tiny_text import build_tiny_text
from tiny_text_generators import TEXT_GENERATORS, build_tiny_text_generators

ZOO = Path(str(files("epmq_deploy") / "zoo"))


def execute(page: str) -> int:
    """Run a page's blocks in the present folder; the number of those that did something."""
    namespace: dict[str, object] = {}
    done = 0
    for block in blocks_of(page):
        if block.language == "yaml" and block.file:
            Path(block.file).write_text(block.text)
        elif block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "epmq", f"{page}: {line} is for ```text"
                assert run(*arguments) == 0, line
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), namespace)
        else:
            assert block.language in ("text", "yaml"), block.language
            continue
        done += 1
    return done


def texts(folder: Path) -> None:
    """A BERT with experts of two tasks, and their data."""
    tiny = build_tiny_text(folder)
    (folder / "base").rename(folder / "bert-base")
    for old, new in (("topic", "topics"), ("tone", "spam")):
        tiny.expert(old).rename(tiny.expert(new))
        data = folder / "data"
        (data / old / "calibration.jsonl").rename(data / f"{new}-train.jsonl")
        (data / old / "test.csv").rename(data / f"{new}-test.csv")


def adapters(folder: Path) -> None:
    """LoRA adapters of a RoBERTa with their classifiers, and data."""
    texts(folder)
    shutil.rmtree(folder / "experts")
    models = build_tiny_models(folder, ARCHITECTURES["roberta"])
    (folder / "base").rename(folder / "roberta-base")
    for old, new in zip(FAMILY_TASKS, ("topics", "spam"), strict=True):
        whole = load_file(models.expert(old) / "model.safetensors")
        prefix = "base_model.model."
        tensors = {f"{prefix}{k}": v for k, v in whole.items() if k.startswith("classifier.")}
        for layer in range(2):
            name = f"{prefix}roberta.encoder.layer.{layer}.attention.self.query.lora"
            tensors[f"{name}_A.weight"] = torch.randn(4, 32)
            tensors[f"{name}_B.weight"] = torch.randn(32, 4)
        target = folder / "adapters" / new
        target.mkdir(parents=True)
        save_file(tensors, target / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "modules_to_save": ["classifier"]}
        (target / "adapter_config.json").write_text(json.dumps(settings))


def images(folder: Path) -> None:
    """Two experts of the bundled zoo."""
    shutil.copytree(ZOO / "base", folder / "clip-base")
    (folder / "data").mkdir()
    for task in ("digits", "fashion"):
        shutil.copytree(ZOO / "experts" / task, folder / "experts" / task)
        for old, new in (("calibration", "train"), ("test", "test")):
            source = ZOO / "tasks" / task / f"{old}.parquet"
            shutil.copyfile(source, folder / "data" / f"{task}-{new}.parquet")


def text_generators(folder: Path) -> None:
    """A small FLAN-T5 with two experts that answer no or yes."""
    tiny = build_tiny_text_generators(folder, TEXT_GENERATORS["flan-t5"])
    (folder / "base").rename(folder / "flan-t5")
    (folder / "data").mkdir()
    for old, new in (("first", "cola"), ("second", "sst2")):
        tiny.expert(old).rename(tiny.expert(new))
        for kind, part in (("calibration", "train"), ("test", "test")):
            rows = map(json.loads, (folder / f"{old}-{kind}.jsonl").read_text().splitlines())
            lines = [json.dumps({"sentence": r["text"], "label": r["label"] % 2}) for r in rows]
            (folder / "data" / f"{new}-{part}.jsonl").write_text("\n".join(lines) + "\n")


def exported(folder: Path) -> None:
    """What the tutorial on BERT leaves behind."""
    texts(folder)
    execute("tutorials/bert.md")


@pytest.mark.parametrize(
    ("page", "prepare", "blocks"),
    [
        ("quickstart.md", texts, 5),
        ("tutorials/bert.md", texts, 6),
        ("tutorials/clip.md", images, 4),
        ("tutorials/flan-t5.md", text_generators, 3),
        ("tutorials/lora.md", adapters, 2),
        ("tutorials/application.md", exported, 4),
        ("tutorials/browser.md", exported, 2),
    ],
)
def test_a_page_runs_as_it_stands(
    page: str,
    prepare: Callable[[Path], None],
    blocks: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    assert execute(page) == blocks


def test_every_tutorial_is_run() -> None:
    marks = getattr(test_a_page_runs_as_it_stands, "pytestmark", [])
    pages = {arguments[0] for arguments in marks[0].args[1]}
    assert {f"tutorials/{file.name}" for file in (DOCS / "tutorials").glob("*.md")} <= pages
