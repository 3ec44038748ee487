"""The folder of a sentence-transformers model: what follows its encoder.

``modules.json`` lists the modules: the encoder, pooling, dense layers, normalization.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmq_deploy.checkpoints.files import read_json_if_there
from epmq_deploy.errors import RecipeError

MODULES = "modules.json"
# What earlier versions wrote in place of pooling_mode, in the order they join results in.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_EMBEDDING = "sentence_embedding"
_KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")


@dataclass(frozen=True)
class DenseModule:
    """A linear layer after pooling.

    Attributes:
        folder: with its weights.
        activation: name of the class of its activation.
    """

    folder: Path
    activation: str = "Identity"


@dataclass(frozen=True)
class SentenceTransformer:
    """What follows the encoder.

    Attributes:
        pooling: ways to pool hidden states.
        dense: linear layers after that, in order.
        normalize: whether embeddings get the length 1.
        longest: tokens of a text that are read, special ones included; None where nothing says so.
        default_prompt: what stands before every text; empty for nothing.
    """

    pooling: tuple[str, ...]
    dense: tuple[DenseModule, ...] = ()
    normalize: bool = False
    longest: int | None = None
    default_prompt: str = ""

    @classmethod
    def open(cls, folder: Path) -> "SentenceTransformer | None":
        """Read a folder; None where it has no ``modules.json``.

        Raises:
            RecipeError: it has modules that are not supported, or in another order.
        """
        file = folder / MODULES
        if not file.is_file():
            return None
        names, paths = zip(*_modules(file), strict=True)
        kinds = [name for name in names if name != "Dense"]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise RecipeError(
                f"{file}: modules {', '.join(names)}; supported are Transformer, Pooling, then "
                "Dense and Normalize where there are such"
            )
        last = 2 + names.count("Dense")
        if set(names[2:last]) - {"Dense"} or names[1] != "Pooling":
            raise RecipeError(f"{file}: Dense modules are supported right after Pooling only")
        return cls(
            _pooling(folder / paths[1] / "config.json"),
            tuple(_dense(folder / path) for path in paths[2:last]),
            "Normalize" in names,
            _longest(folder),
            _default_prompt(folder),
        )


def _modules(file: Path) -> list[tuple[str, str]]:
    """Return each module's class and folder, in order.

    Raises:
        RecipeError: the file is none, or the encoder is in a folder of its own.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        modules = [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in content]
    except (ValueError, TypeError, KeyError) as error:
        raise RecipeError(f"{file}: no list of modules with type and path ({error})") from error
    if unknown := sorted({name for name, _ in modules} - {*_KNOWN}):
        raise RecipeError(f"{file}: module {unknown[0]} is not supported, only {', '.join(_KNOWN)}")
    for _, path in modules:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise RecipeError(f"{file}: {path} is outside the folder")
    if not modules or modules[0][1]:
        raise RecipeError(f"{file}: the encoder has to be in the folder itself, as first module")
    return modules


def _settings(file: Path) -> dict[str, Any]:
    """Read the settings of a module.

    Raises:
        RecipeError: they are missing, or no JSON object.
    """
    settings = read_json_if_there(file)
    if settings is None:
        raise RecipeError(f"{file}: listed in {MODULES}, but not in the folder")
    return settings


def _dense(folder: Path) -> DenseModule:
    """Read the settings of a dense module.

    Raises:
        RecipeError: it takes or gives something else than the embedding, or adds its input to it.
    """
    file = folder / "config.json"
    settings = _settings(file)
    if settings.get("use_residual"):
        raise RecipeError(f"{file}: Dense modules with use_residual are not supported")
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, _EMBEDDING):
            raise RecipeError(
                f"{file}: {key} is {settings[key]!r}; Dense modules are supported on {_EMBEDDING}"
            )
    activation = str(settings.get("activation_function", "Identity"))
    return DenseModule(folder, activation.rpartition(".")[2])


def _pooling(file: Path) -> tuple[str, ...]:
    content = _settings(file)
    modes = content.get("pooling_mode")
    if modes is None:
        modes = [name for flag, name in _FLAGS.items() if content.get(flag)]
    if content.get("include_prompt") is False:
        raise RecipeError(f"{file}: prompts that are not pooled (include_prompt) are not supported")
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not all(isinstance(mode, str) for mode in modes):
        raise RecipeError(f"{file}: pooling_mode is {modes!r}, expected names of ways to pool")
    return tuple(modes)


def _longest(folder: Path) -> int | None:
    settings: Mapping[str, Any] = read_json_if_there(folder / "sentence_bert_config.json") or {}
    tokenizer: Mapping[str, Any] = read_json_if_there(folder / "tokenizer_config.json") or {}
    longest = settings.get("max_seq_length") or tokenizer.get("model_max_length")
    return int(longest) if isinstance(longest, int) and 0 < longest < 10**9 else None


def _default_prompt(folder: Path) -> str:
    settings = read_json_if_there(folder / "config_sentence_transformers.json") or {}
    prompts, name = settings.get("prompts"), settings.get("default_prompt_name")
    return str(prompts.get(name, "")) if isinstance(prompts, dict) and isinstance(name, str) else ""
