"""Finding out how a classifier of ``transformers`` gets from hidden states to logits.

The classifier is built from its ``config.json`` with random weights and run once; what lies between
the encoder's last hidden state and the logits is read off that run and confirmed by its numbers.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epmq_deploy.compat import classifier_modalities, renamed, weight_renamings
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.encoders.classifier import HeadLayout
from epmq_deploy.models.head import ACTIVATIONS
from epmq_deploy.models.text_inputs import example_texts

Pooling = Literal["first", "mean", "patches", "first_and_patches"]
# Hidden states [B, T, D] and weights of tokens [B, T] to embeddings.
POOLINGS: Mapping[Pooling, Callable[[Tensor, Tensor], Tensor]] = {
    "first": lambda hidden, mask: hidden[:, 0],
    "mean": lambda hidden, mask: (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    "patches": lambda hidden, mask: hidden[:, 1:].mean(dim=1),
    "first_and_patches": lambda hidden, mask: torch.cat(
        [hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=1
    ),
}
_BUILDERS = {
    "text": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
}


@dataclass(frozen=True)
class Anatomy:
    """How the classifiers of one model type are put together.

    Attributes:
        modality: what they read.
        input_names: of the encoder.
        pooling: how hidden states become embeddings.
        head: what turns embeddings into logits.
        prefix: what stands before the encoder's tensor names in classifiers.
        encoder: names of the encoder's parameters.
        positions: the longest text, in tokens; 0 for images.
        renamings: transformers' own, from the names files have to those the loaded model has.
    """

    modality: Literal["text", "image"]
    input_names: tuple[str, ...]
    pooling: Pooling
    head: HeadLayout
    prefix: str
    encoder: frozenset[str]
    positions: int
    renamings: tuple[Any, ...]

    def rename(self, key: str) -> str:
        """Return the loaded encoder's name for a stored tensor."""
        return renamed(key, self.renamings).removeprefix(self.prefix)


class NotUnderstood(Exception):  # noqa: N818 - becomes a RecipeError that names the folder
    """The model is put together in a way that the generic family cannot take apart."""


def anatomy_of(config: Mapping[str, Any], where: object) -> Anatomy:
    """Find out how classifiers with this ``config.json`` are put together.

    Args:
        config: the base's.
        where: what to call it in messages.

    Raises:
        RecipeError: they cannot be taken apart; says why.
    """
    try:
        return _anatomy(json.dumps(config, sort_keys=True))
    except NotUnderstood as error:
        raise RecipeError(
            f"{where}: model type {config.get('model_type')!r} has no family of its own, and the "
            f"generic one cannot take it: {error}"
        ) from error


@lru_cache(maxsize=2)
def _anatomy(content: str) -> Anatomy:
    config = json.loads(content)
    modality = _modality(config)
    model = _build(config, modality)
    prefix = str(model.base_model_prefix)
    encoder = getattr(model, prefix, None)
    if not isinstance(encoder, nn.Module):
        raise NotUnderstood("its classifier has no encoder of its own")
    names = _input_names(encoder, modality)
    inputs = _examples(names, config, modality)
    named = dict(zip(names, inputs, strict=True))
    hidden, tail, logits = _run(model, encoder, named)
    mask = _mask(hidden, names, inputs)
    head = _head(tail, logits, f"{prefix}.")
    if isinstance(getattr(encoder, "pooler", None), nn.Module):
        setattr(encoder, "pooler", None)  # noqa: B010 - no attribute that types know
        _check_without_pooler(encoder, named, hidden)
    return Anatomy(
        modality=modality,
        input_names=names,
        pooling=_pooling(tail[0].entered, hidden, mask),
        head=head,
        prefix=f"{prefix}.",
        encoder=frozenset(name for name, _ in encoder.named_parameters()),
        positions=_positions(encoder, config) if modality == "text" else 0,
        renamings=_renamings(model, encoder),
    )


def _check_without_pooler(encoder: nn.Module, inputs: Mapping[str, Tensor], hidden: Tensor) -> None:
    try:
        again = _hidden(encoder(**inputs))
    except Exception as error:  # models raise anything
        raise NotUnderstood(f"its encoder does not run without pooler ({error})") from error
    if not torch.allclose(again, hidden, atol=1e-5):
        raise NotUnderstood("its encoder gives something else without pooler")


def _modality(config: Mapping[str, Any]) -> Literal["text", "image"]:
    modalities = classifier_modalities(config.get("model_type"))
    if len(modalities) != 1:
        raise NotUnderstood(
            "transformers has no AutoModel with one classifier, of texts or of images, for it"
        )
    if config.get("is_encoder_decoder") or config.get("is_decoder"):
        raise NotUnderstood("it is a decoder, not an encoder alone")
    return "text" if "text" in modalities else "image"


def _build(config: Mapping[str, Any], modality: str) -> Any:
    import transformers

    plain = {name: value for name, value in config.items() if name != "model_type"}
    plain |= {"architectures": [], "num_labels": 3, "id2label": None, "label2id": None}
    try:
        settings = transformers.AutoConfig.for_model(config["model_type"], **plain)
        settings.num_labels = 3
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            builder = getattr(transformers, _BUILDERS[modality])
            model = builder.from_config(settings, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # constructors raise anything
        raise NotUnderstood(f"transformers cannot build it ({error})") from error
    return model.eval().requires_grad_(False)


def _input_names(encoder: nn.Module, modality: str) -> tuple[str, ...]:
    taken = inspect.signature(encoder.forward).parameters
    if modality == "image":
        return ("pixel_values",)
    if not {"input_ids", "attention_mask"} <= set(taken):
        raise NotUnderstood("its encoder does not take input_ids and attention_mask")
    segments = getattr(encoder.config, "type_vocab_size", 0) > 1
    more = ("token_type_ids",) if segments and "token_type_ids" in taken else ()
    return ("input_ids", "attention_mask", *more)


def _examples(names: Sequence[str], config: Mapping[str, Any], modality: str) -> tuple[Tensor, ...]:
    if modality == "text":
        if "vocab_size" not in config or "max_position_embeddings" not in config:
            raise NotUnderstood("its config.json lacks vocab_size or max_position_embeddings")
        return example_texts(names, dict(config), 8, 2)
    size, channels = config.get("image_size"), config.get("num_channels", 3)
    if not isinstance(size, int):
        raise NotUnderstood("its config.json has no image_size that is one number")
    return (torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)),)


@dataclass(frozen=True)
class _Step:
    """A layer with weights that ran after the encoder: its name, itself, input and output."""

    name: str
    module: nn.Module
    entered: Tensor
    left: Tensor


@torch.no_grad()
def _run(
    model: nn.Module, encoder: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, list[_Step], Tensor]:
    """Return the last hidden state, the layers that ran after it, and the logits."""
    steps: list[_Step] = []
    hidden: list[Tensor] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            left = output[0] if isinstance(output, tuple) else output
            entered = args[0] if args and isinstance(args[0], Tensor) else None
            if isinstance(left, Tensor):
                steps.append(_Step(name, module, left if entered is None else entered, left))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    handles.append(encoder.register_forward_hook(lambda _m, _a, out: hidden.append(_hidden(out))))
    try:
        output = model(**inputs)
    except Exception as error:  # models raise anything
        raise NotUnderstood(f"it does not run on {', '.join(inputs)} ({error})") from error
    finally:
        for handle in handles:
            handle.remove()
    indices = [index for index, step in enumerate(steps) if step.left is hidden[0]]
    if not indices:
        raise NotUnderstood("its last hidden state is no layer's output")
    after = steps[indices[0] + 1 :]
    tail = [step for step in after if list(step.module.parameters(recurse=False))]
    logits: Tensor = output.logits
    return hidden[0], tail, logits


def _hidden(output: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise NotUnderstood("its encoder gives no last_hidden_state [batch, tokens, width]")
    return hidden


def _mask(hidden: Tensor, names: Sequence[str], inputs: Sequence[Tensor]) -> Tensor:
    if "attention_mask" in names:
        return inputs[names.index("attention_mask")].to(hidden.dtype)
    return torch.ones(hidden.shape[:2])


def _head(tail: Sequence[_Step], logits: Tensor, prefix: str) -> HeadLayout:
    shown = ", ".join(f"{step.name} ({type(step.module).__name__})" for step in tail) or "nothing"
    linear = all(
        isinstance(step.module, nn.Linear) and step.module.bias is not None for step in tail
    )
    if len(tail) not in (1, 2) or not linear or not torch.equal(tail[-1].left, logits):
        raise NotUnderstood(
            f"between its last hidden state and its logits there is {shown}, not one or two linear "
            "layers with bias"
        )
    names = [step.name.removeprefix(prefix) for step in tail]
    if len(tail) == 1:
        return HeadLayout(names[0])
    for activation, function in ACTIVATIONS.items():
        if torch.allclose(function(tail[0].left), tail[1].entered, atol=1e-6):
            return HeadLayout(names[1], names[0], activation)
    raise NotUnderstood(
        f"between {tail[0].name} and {tail[1].name} there is none of {', '.join(ACTIVATIONS)}"
    )


def _pooling(embedding: Tensor, hidden: Tensor, mask: Tensor) -> Pooling:
    for name, pool in POOLINGS.items():
        pooled = pool(hidden, mask)
        if pooled.shape == embedding.shape and torch.allclose(pooled, embedding, atol=1e-5):
            return name
    raise NotUnderstood(
        "its classifier reads neither the first token, nor the mean, nor both side by side"
    )


def _positions(encoder: nn.Module, config: Mapping[str, Any]) -> int:
    """Return the longest text; some models number positions after the padding token's id."""
    most = int(config["max_position_embeddings"])
    for name, module in encoder.named_modules():
        table = isinstance(module, nn.Embedding) and module.num_embeddings == most
        if table and "position" in name and module.padding_idx is not None:
            return most - int(module.padding_idx) - 1
    return most


def _renamings(model: Any, encoder: nn.Module) -> tuple[Any, ...]:
    renamings = weight_renamings(model)
    if renamings is None:
        raise NotUnderstood("its files hold several of its tensors as one")
    # What is stored under the loaded model's names, as merged models are, must stay as it is.
    if any(renamed(name, renamings) != name for name, _ in encoder.named_parameters()):
        raise NotUnderstood("the names of its tensors in files and in the loaded model overlap")
    return renamings
