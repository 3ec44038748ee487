"""Fine-tune the text suites' experts, and probe the base linearly for comparison."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scoring import score
from text_sources import Passage
from text_tasks import TextTask
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

Labelled = Sequence[tuple[Passage, float]]


@dataclass(frozen=True)
class Schedule:
    """How experts are trained: AdamW, linear warm-up and decay, products in bfloat16.

    Pooler and classifier start from nowhere and learn faster than the encoder, which then need not
    move far from the base.

    Attributes:
        frozen: parts of the model that stay as they are; embeddings are half of its parameters.
    """

    epochs: int = 3
    batch: int = 32
    rate: float = 1e-4
    head_rate: float = 1e-3
    warmup: float = 0.1
    decay: float = 0.01
    frozen: tuple[str, ...] = ()


def train_expert(base: Path, task: TextTask, output: Path, schedule: Schedule, seed: int) -> float:
    """Fine-tune ``base`` on one task into ``output``, a complete folder or none.

    Returns:
        Percent correct on the test split, or the rank correlation of values times 100.
    """
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, **_labels_of(task))
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    order = random.Random(seed)
    steps = schedule.epochs * -(-len(task.train) // schedule.batch)
    for name in schedule.frozen:
        model.bert.get_submodule(name).requires_grad_(False)
    head = [*model.bert.pooler.parameters(), *model.classifier.parameters()]
    body = [*model.bert.embeddings.parameters(), *model.bert.encoder.parameters()]
    groups = [
        {"params": [parameter for parameter in body if parameter.requires_grad]},
        {"params": head, "lr": schedule.head_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.rate, weight_decay=schedule.decay, fused=True)
    warm = max(1, int(schedule.warmup * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / (steps - warm)))
    )
    model.train()
    for _ in range(schedule.epochs):
        shuffled = order.sample(task.train, len(task.train))
        for inputs, labels in _batches(tokenizer, shuffled, schedule.batch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(**inputs).logits
            loss = _loss(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    model.eval()
    reached = _reached(model, tokenizer, task.test)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for file in base.glob("*token*"):
        shutil.copyfile(file, partial / file.name)
    shutil.copyfile(base / "vocab.txt", partial / "vocab.txt")
    partial.rename(output)
    return reached


def described(schedule: Schedule, seed: int) -> dict[str, Any]:
    """Return what decides an expert's weights besides its data."""
    settings = asdict(schedule)
    # Files of schedules that freeze nothing are older than the option.
    if not schedule.frozen:
        del settings["frozen"]
    return {**settings, "seed": seed}


def probe_score(base: Path, task: TextTask, weight_decay: float = 1e-3) -> float:
    """Score, as ``train_expert``, of a linear head on the base's last [CLS] hidden states."""
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    model = AutoModel.from_pretrained(base).eval()
    train, labels = _features(model, tokenizer, task.train)
    test, truth = _features(model, tokenizer, task.test)
    mean, spread = train.mean(dim=0), train.std(dim=0)
    train, test = (train - mean) / spread, (test - mean) / spread
    outputs = len(task.classes) or 1
    weight = torch.zeros(outputs, train.shape[1], requires_grad=True)
    bias = torch.zeros(outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(train @ weight.T + bias, labels)
        loss = loss + weight_decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return score((test @ weight.T + bias).detach(), truth)


def _labels_of(task: TextTask) -> dict[str, Any]:
    """Return the settings of a model that say what its logits mean."""
    if not task.classes:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(task.classes))
    return {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {v: k for k, v in names.items()},
    }


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return what transformers trains with: cross-entropy, or the squared error of values."""
    if labels.is_floating_point():
        return torch.nn.functional.mse_loss(logits[:, 0], labels)
    return torch.nn.functional.cross_entropy(logits, labels)


def _batches(tokenizer: Any, rows: Labelled, size: int) -> Iterator[tuple[Any, Tensor]]:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        inputs = tokenizer(
            [passage for passage, _ in part], padding=True, truncation=True, return_tensors="pt"
        )
        yield inputs, torch.tensor([label for _, label in part])


def _reached(model: Any, tokenizer: Any, rows: Labelled) -> float:
    with torch.inference_mode():
        parts = [
            (model(**inputs).logits, labels) for inputs, labels in _batches(tokenizer, rows, 64)
        ]
    logits, truth = (torch.cat(part) for part in zip(*parts, strict=True))
    return score(logits, truth)


def _features(model: Any, tokenizer: Any, rows: Labelled) -> tuple[Tensor, Tensor]:
    features, truth = [], []
    with torch.no_grad():
        for inputs, labels in _batches(tokenizer, rows, 64):
            features.append(model(**inputs).last_hidden_state[:, 0])
            truth.append(labels)
    return torch.cat(features), torch.cat(truth)
