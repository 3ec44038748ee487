"""Experts that embed texts, as sentence-transformers saves them, of tiny models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tiny_text import WORDS


def add_embedder(
    folder: Path,
    name: str,
    pooling: str | Sequence[str] = "mean",
    *,
    dense: int | Sequence[int] = (),
    normalize: bool = True,
    longest: int | None = None,
) -> None:
    """An expert that embeds texts, fine-tuned from the base in a folder."""
    encoder = Transformer(str(folder / "base"))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(len(name))
        for parameter in encoder.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise * parameter.std().nan_to_num(0.02))
    modules: list[Any] = [encoder, Pooling(encoder.get_embedding_dimension(), pooling)]
    width = modules[1].get_embedding_dimension()
    for size in (dense,) if isinstance(dense, int) else dense:
        # As in GTR and sentence-T5, some layers have no bias.
        modules.append(Dense(width, size, size % 2 == 0, activation_function=torch.nn.Tanh()))
        width = size
    if normalize:
        modules.append(Normalize())
    expert = folder / "experts" / name
    SentenceTransformer(modules=modules, device="cpu").save(str(expert))
    if longest is not None:
        # As versions before 6 say it.
        file = expert / "sentence_bert_config.json"
        file.write_text(json.dumps({"max_seq_length": longest, "do_lower_case": False}))
        settings = json.loads((expert / "tokenizer_config.json").read_text())
        settings["model_max_length"] = longest
        (expert / "tokenizer_config.json").write_text(json.dumps(settings))


def write_pairs(file: Path, count: int, **columns: str) -> list[dict[str, Any]]:
    """Pairs of texts with a score, under these names for first, second and score; the rows."""
    rng = np.random.default_rng(count)
    texts = [" ".join(rng.choice(WORDS[:-1], rng.integers(1, 21))) for _ in range(count)]
    rows = [
        {
            columns.get("first", "sentence1"): texts[index // 3],
            columns.get("second", "sentence2"): texts[-1 - index],
            columns.get("score", "score"): int(rng.integers(0, 3)),
        }
        for index in range(count)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return rows
