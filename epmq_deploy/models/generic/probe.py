"""Building a classifier of ``transformers`` from its config and running it once."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epmq_deploy.compat import classifier_modalities
from epmq_deploy.models.encoders.classifier import padding_is_token
from epmq_deploy.models.text_inputs import example_texts

_BUILDERS = {
    "text": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
}
_CLASSES = 3
# Of images for models that take any and so name none.
_IMAGE_SIZE = 224
# Stands for padding while a model is probed whose config names no token for it.
_PADDING = 0


class NotUnderstood(Exception):  # noqa: N818 - becomes a RecipeError that names the folder
    """The model is put together in a way that the generic family cannot take apart."""


@dataclass(frozen=True)
class Step:
    """A layer with weights that ran after the encoder: its name, itself, input and output."""

    name: str
    module: nn.Module
    entered: Tensor
    left: Tensor


@dataclass(frozen=True)
class Probe:
    """A classifier with random weights, and what it computed from random inputs.

    Attributes:
        modality: what it reads.
        model: the classifier.
        encoder: the part of it that is deployed.
        prefix: what stands before the encoder's parameters in the classifier's.
        input_names: of the encoder.
        inputs: as ``input_names``, of two samples; the second text is padded.
        padding: id of the padding token in ``inputs``.
        config_padding: id of the padding token that the config names, its default included.
        hidden: the encoder's last hidden state, ``[B, T, D]`` or ``[B, D, H, W]``.
        tail: the layers that ran after it.
        logits: ``[B, C]``.
    """

    modality: Literal["text", "image"]
    model: Any
    encoder: nn.Module
    prefix: str
    input_names: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    padding: int
    config_padding: int | None
    hidden: Tensor
    tail: tuple[Step, ...]
    logits: Tensor


def probe(config: Mapping[str, Any]) -> Probe:
    """Build a classifier with this ``config.json`` and run it.

    Raises:
        NotUnderstood: there is none, or it has no encoder that gives hidden states.
    """
    modality = _modality(config)
    model = build(config, modality)
    encoder, prefix = encoder_of(model)
    given: int | None = model.config.pad_token_id if modality == "text" else None
    padding = _PADDING if given is None else given
    if given is None:
        # Classifiers that read the last token refuse batches without one.
        model.config.pad_token_id = padding
    names = _input_names(encoder, modality)
    inputs = _examples(names, model.config, modality, padding)
    hidden, tail, logits = _run(model, encoder, dict(zip(names, inputs, strict=True)))
    return Probe(
        modality=modality,
        model=model,
        encoder=encoder,
        prefix=prefix,
        input_names=names,
        inputs=inputs,
        padding=padding,
        config_padding=given,
        hidden=hidden,
        tail=tuple(tail),
        logits=logits,
    )


def _modality(config: Mapping[str, Any]) -> Literal["text", "image"]:
    modalities = classifier_modalities(config.get("model_type"))
    if len(modalities) != 1:
        raise NotUnderstood(
            "transformers has no AutoModel with one classifier, of texts or of images, for it"
        )
    if config.get("is_encoder_decoder") or config.get("is_decoder"):
        raise NotUnderstood("it is a decoder, not an encoder alone")
    return "text" if "text" in modalities else "image"


def build(config: Mapping[str, Any], modality: str) -> Any:
    """Build a classifier with random weights, float32, in eval mode.

    Raises:
        NotUnderstood: ``transformers`` cannot.
    """
    import transformers

    plain = {name: value for name, value in config.items() if name != "model_type"}
    plain |= {"architectures": [], "num_labels": _CLASSES, "id2label": None, "label2id": None}
    try:
        settings = transformers.AutoConfig.for_model(config["model_type"], **plain)
        settings.num_labels = _CLASSES
        # Nothing is generated: what a decoder remembers of a text would be in the way.
        settings.use_cache = False
        if not padding_is_token(settings):
            settings.pad_token_id = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            builder = getattr(transformers, _BUILDERS[modality])
            model = builder.from_config(settings, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # constructors raise anything
        raise NotUnderstood(f"transformers cannot build it ({error})") from error
    return model.eval().requires_grad_(False)


def encoder_of(model: Any) -> tuple[nn.Module, str]:
    """Return the encoder of a classifier, and what stands before its parameters' names.

    Raises:
        NotUnderstood: it has none.
    """
    prefix = str(model.base_model_prefix)
    encoder = getattr(model, prefix, None)
    if isinstance(encoder, nn.Module):
        return encoder, f"{prefix}."
    parts = [name for name, part in model.named_children() if hasattr(part, "base_model_prefix")]
    if parts:
        raise NotUnderstood(f"its encoder, {parts[0]}, is one part of a larger model")
    raise NotUnderstood("its classifier has no encoder of its own")


def _input_names(encoder: nn.Module, modality: str) -> tuple[str, ...]:
    taken = inspect.signature(encoder.forward).parameters
    if modality == "image":
        return ("pixel_values",)
    if not {"input_ids", "attention_mask"} <= set(taken):
        raise NotUnderstood("its encoder does not take input_ids and attention_mask")
    segments = getattr(encoder.config, "type_vocab_size", 0) > 1
    more = ("token_type_ids",) if segments and "token_type_ids" in taken else ()
    return ("input_ids", "attention_mask", *more)


def _examples(
    names: Sequence[str], settings: Any, modality: str, padding: int
) -> tuple[Tensor, ...]:
    if modality == "text":
        sizes = {"vocab_size": getattr(settings, "vocab_size", None), "pad_token_id": padding}
        if (
            sizes["vocab_size"] is None
            or getattr(settings, "max_position_embeddings", None) is None
        ):
            raise NotUnderstood("its config.json lacks vocab_size or max_position_embeddings")
        return example_texts(names, sizes, 8, 2)
    size, channels = (
        getattr(settings, "image_size", _IMAGE_SIZE),
        getattr(settings, "num_channels", 3),
    )
    height, width = (size, size) if isinstance(size, int) else size
    return (torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0)),)


@torch.no_grad()
def _run(
    model: nn.Module, encoder: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, list[Step], Tensor]:
    """Return the last hidden state, the layers that ran after it, and the logits."""
    steps: list[Step] = []
    hidden: list[Tensor] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            left = output[0] if isinstance(output, tuple) else output
            entered = args[0] if args and isinstance(args[0], Tensor) else None
            if isinstance(left, Tensor):
                steps.append(Step(name, module, left if entered is None else entered, left))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    handles.append(
        encoder.register_forward_hook(lambda _m, _a, out: hidden.append(last_hidden(out)))
    )
    try:
        output = model(**inputs)
    except NotUnderstood:
        raise
    except Exception as error:  # models raise anything
        raise NotUnderstood(f"it does not run on {', '.join(inputs)} ({error})") from error
    finally:
        for handle in handles:
            handle.remove()
    after = steps[_index_of(steps, hidden[0]) + 1 :]
    tail = [step for step in after if list(step.module.parameters(recurse=False))]
    logits: Tensor = output.logits
    return hidden[0], tail, logits


def _index_of(steps: Sequence[Step], hidden: Tensor) -> int:
    """Return which step gave the last hidden state."""
    for at, step in enumerate(steps):
        if step.left is hidden:
            return at
    # Some models give their last layer's output a new shape.
    same = [at for at, step in enumerate(steps) if step.left.data_ptr() == hidden.data_ptr()]
    if not same:
        raise NotUnderstood("its last hidden state is no layer's output")
    return same[-1]


def last_hidden(output: Any) -> Tensor:
    """Return an encoder's last hidden state, ``[B, T, D]`` or ``[B, D, H, W]``.

    Raises:
        NotUnderstood: its output has none.
    """
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.dim() not in (3, 4):
        raise NotUnderstood("its encoder gives no last_hidden_state [batch, tokens, width]")
    return hidden
