"""Train the zoo: a tiny CLIP base on all tasks, then one image tower per task."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, PreTrainedTokenizerFast

IMAGE_SIZE = 32
TEXT_LENGTH = 24
SPECIAL_TOKENS = ["<|pad|>", "<|startoftext|>", "<|unk|>", "<|endoftext|>"]

State = dict[str, torch.Tensor]


@dataclass
class TaskData:
    """One task as tensors: images normalised as the stored processor does it."""

    name: str
    classes: list[str]
    templates: list[str]
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mirror: bool  # whether a mirrored image still means the same


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train."""

    steps: int
    batch: int
    rate: float
    warmup: int
    decay: float = 0.05


def build_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """Return a small tokenizer that frames every text as CLIP expects: start, words, end.

    Words of ``sentences`` are one token each, any other word is spelled out. Nothing is
    trained, since trained merges may differ from one run to the next.
    """
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    words = {
        word
        for sentence in sentences
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence))
    }
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokens = [*letters, *(f"##{letter}" for letter in letters), *sorted(words - set(letters))]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *tokens])}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<|unk|>"))
    core.normalizer, core.pre_tokenizer = normalizer, splitter
    core.decoder = decoders.WordPiece(cleanup=False)
    start, end = SPECIAL_TOKENS[1], SPECIAL_TOKENS[3]
    core.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, 1), (end, 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token=start,
        unk_token="<|unk|>",
        eos_token=end,
        model_max_length=TEXT_LENGTH,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "projection_dim": 128,
        "hidden_act": "quick_gelu",
        "initializer_factor": 1.0,
    }
    text = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "projection_dim": 128,
        "hidden_act": "quick_gelu",
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    # Untrained position embeddings are far smaller than the patches they are added to, and a
    # training this short would end before the tower learns where things are.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.3)
    return model


def augment(images: torch.Tensor, mirror: bool, generator: torch.Generator) -> torch.Tensor:
    """Shift, turn and scale every image a little, and vary its brightness."""
    count = len(images)

    def draw(spread: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * spread

    angle, scale = draw(0.15), 1 + draw(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    flip = torch.where(draw(1.0) > 0, 1.0, -1.0) if mirror else torch.ones(count)
    matrix = torch.stack(
        [
            torch.stack([cos * flip, -sin, draw(0.12)], 1),
            torch.stack([sin * flip, cos, draw(0.12)], 1),
        ],
        1,
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved * (1 + draw(0.15))[:, None, None, None] + draw(0.15)[:, None, None, None]


def learning_rate(step: int, schedule: Schedule) -> float:
    if step < schedule.warmup:
        return schedule.rate * (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.rate * 0.5 * (1 + math.cos(math.pi * progress))


def _optimizer(parameters: list[torch.nn.Parameter], schedule: Schedule) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": schedule.decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98), eps=1e-6)


def _update(optimizer: torch.optim.AdamW, loss: torch.Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def encode_texts(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> torch.Tensor:
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    pooled = model.text_model(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
    ).pooler_output
    embedded: torch.Tensor = F.normalize(model.text_projection(pooled), dim=-1)
    return embedded


@torch.no_grad()
def zero_shot_head(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, task: TaskData
) -> torch.Tensor:
    """One row per class: the mean of its prompts, to be multiplied with an image embedding."""
    rows = []
    for name in task.classes:
        prompts = [template.format(name) for template in task.templates]
        rows.append(encode_texts(model, tokenizer, prompts).mean(0))
    head: torch.Tensor = F.normalize(torch.stack(rows), dim=-1) * model.logit_scale.exp()
    return head


def separate_texts(
    model: CLIPModel,
    tasks: list[TaskData],
    tokenizer: PreTrainedTokenizerFast,
    schedule: Schedule,
    chooser: random.Random,
) -> None:
    """Teach the text tower that two prompts of one class belong together, and of two do not.

    At first all prompts of a template come out almost equal, and images cannot be told apart
    by their likeness to them; a few hundred steps on text alone cost almost nothing.
    """
    parameters = [*model.text_model.parameters(), *model.text_projection.parameters()]
    optimizer = _optimizer(parameters, schedule)
    for step in range(schedule.steps):
        pairs = [(chooser.sample(t.templates, 2), name) for t in tasks for name in t.classes]
        prompts = [pair[side].format(name) for side in (0, 1) for pair, name in pairs]
        first, second = encode_texts(model, tokenizer, prompts).chunk(2)
        loss = F.cross_entropy(10 * first @ second.T, torch.arange(len(pairs)))
        _update(optimizer, loss, learning_rate(step, schedule))
    print(f"  text after {schedule.steps} steps: loss {loss.item():.3f}", flush=True)


def long_tail(labels: torch.Tensor, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Return sampling weights so that the commonest class is ``ratio`` times the rarest.

    Classes fall off geometrically in a random order, as things do in what is found on the web.
    """
    counts = torch.bincount(labels)
    rank = torch.randperm(len(counts), generator=generator)
    frequency = ratio ** (-rank / (len(counts) - 1))
    return (frequency / counts.clamp_min(1))[labels]


def train_base(
    tasks: list[TaskData],
    diet: dict[str, tuple[int, float]],
    tokenizer: PreTrainedTokenizerFast,
    schedule: Schedule,
    seed: int,
) -> CLIPModel:
    """Contrast images of all tasks with the prompts of all classes.

    ``diet`` holds, for each task, its images in a batch and how unevenly its classes are seen.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    chooser = random.Random(seed)
    model = build_model(tokenizer).train()
    separate_texts(model, tasks, tokenizer, Schedule(200, 0, 1e-3, 20), chooser)
    optimizer = _optimizer(list(model.parameters()), schedule)
    offsets, total = {}, 0
    for task in tasks:
        offsets[task.name] = total
        total += len(task.classes)
    weights = {t.name: long_tail(t.train_labels, diet[t.name][1], generator) for t in tasks}
    for step in range(schedule.steps):
        images, labels = [], []
        for task in tasks:
            share, _ = diet[task.name]
            index = torch.multinomial(weights[task.name], share, True, generator=generator)
            images.append(augment(task.train_images[index], task.mirror, generator))
            labels.append(task.train_labels[index] + offsets[task.name])
        prompts = [chooser.choice(t.templates).format(name) for t in tasks for name in t.classes]
        texts = encode_texts(model, tokenizer, prompts)
        pooled = model.vision_model(torch.cat(images)).pooler_output
        embedded = F.normalize(model.visual_projection(pooled), dim=-1)
        logits = model.logit_scale.exp() * embedded @ texts.T
        loss = F.cross_entropy(logits, torch.cat(labels))
        _update(optimizer, loss, learning_rate(step, schedule))
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 100 == 99:
            print(f"  base step {step + 1}/{schedule.steps}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def train_expert(
    base: CLIPModel, head: torch.Tensor, task: TaskData, schedule: Schedule, seed: int
) -> CLIPVisionModel:
    """Fine-tune a copy of the image tower on one task against its frozen zero-shot head."""
    generator = torch.Generator().manual_seed(seed)
    tower = CLIPVisionModel(base.config.vision_config)
    tower.load_state_dict(base.vision_model.state_dict())
    tower.train()
    projection = base.visual_projection.weight.detach()
    optimizer = _optimizer(list(tower.parameters()), schedule)
    order = torch.empty(0, dtype=torch.long)
    for step in range(schedule.steps):
        if len(order) < schedule.batch:
            fresh = torch.randperm(len(task.train_images), generator=generator)
            order = torch.cat([order, fresh])
        index, order = order[: schedule.batch], order[schedule.batch :]
        images = augment(task.train_images[index], task.mirror, generator)
        embedded = F.normalize(tower(images).pooler_output @ projection.T, dim=-1)
        loss = F.cross_entropy(embedded @ head.T, task.train_labels[index])
        _update(optimizer, loss, learning_rate(step, schedule))
    return tower.eval()


def half_precision(state: State) -> State:
    """Return the state as it reads back after being stored in float16."""
    return {name: tensor.detach().half().float() for name, tensor in state.items()}


def merge(base: State, experts: list[State], scaling: float) -> State:
    """Task Arithmetic: the base plus the scaled sum of what each expert changed."""
    return {
        name: tensor + scaling * sum(expert[name] - tensor for expert in experts)
        for name, tensor in base.items()
    }


def round_to_nearest(state: State, bits: int, group_size: int) -> State:
    """Symmetric round-to-nearest of every encoder matrix, one scale per row and group."""
    top = 2 ** (bits - 1) - 1
    rounded = dict(state)
    for name, weight in state.items():
        if ".layers." in name and weight.ndim == 2:
            groups = weight.reshape(weight.shape[0], -1, group_size)
            scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
            codes = (groups / scale).round().clamp(-top - 1, top)
            rounded[name] = (codes * scale).reshape(weight.shape)
    return rounded


@torch.no_grad()
def accuracy(base: CLIPModel, tower: State, head: torch.Tensor, task: TaskData) -> float:
    """Share of the test images whose nearest class prompt is the right one, in percent."""
    model = CLIPVisionModel(base.config.vision_config).eval()
    model.load_state_dict(tower)
    embedded = F.normalize(base.visual_projection(model(task.test_images).pooler_output), dim=-1)
    hits = (embedded @ head.T).argmax(-1) == task.test_labels
    return 100 * float(hits.float().mean())
