"""Opening a model folder's tokenizer."""

from pathlib import Path
from typing import Any

from epmq_deploy.checkpoints.open_clip_weights import given_folder
from epmq_deploy.errors import RecipeError

# What names of tokenizers' files begin with.
_NAMES = ("tokenizer", "vocab", "spm.", "spiece.", "sentencepiece.", "merges.")
# Those of every tokenizer.
_COMMON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def open_tokenizer(
    folder: Path, files: tuple[str, ...], vocabulary: int, purpose: str, **settings: Any
) -> Any:
    """Open the folder's tokenizer, of any kind that ``AutoTokenizer`` opens.

    Args:
        folder: a Hugging Face model folder.
        files: that the model's usual tokenizer has where it is not stored as ``tokenizer.json``,
            for the message.
        vocabulary: rows of the model's token embedding.
        purpose: what needs it, for the message.
        settings: in place of the folder's.

    Raises:
        RecipeError: files are missing or cannot be opened, or it has tokens the model has no
            embedding for.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **settings
        )
        is_stored = _is_stored(tokenizer, folder)
        if is_stored:
            _try(tokenizer)
    # Tokenizers raise anything.
    except Exception as error:
        whole = (folder / "tokenizer.json").is_file()
        if not whole and not all((folder / name).is_file() for name in files):
            raise _missing(folder, files, purpose) from error
        raise RecipeError(
            f"{folder}: {purpose} the base's tokenizer, which cannot be opened "
            f"({' '.join(str(error).split())[:200] or type(error).__name__})"
        ) from error
    if not is_stored:
        raise _missing(folder, files, purpose)
    if len(tokenizer) > vocabulary:
        tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        beyond = [f"{token!r} ({number})" for token, number in tokens if number >= vocabulary]
        named = ", ".join(beyond[:3]) + (f" and {len(beyond) - 3} more" if len(beyond) > 3 else "")
        raise RecipeError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}: it has "
            f"no embedding for {named or 'some of them'}; give the tokenizer that belongs to the "
            "model, or resize the embeddings of base and experts (resize_token_embeddings)"
        )
    return tokenizer


def stored_tokenizer(folder: Path) -> Any | None:
    """Return the tokenizer that a folder holds; None where it holds none that can be opened."""
    from transformers import AutoTokenizer

    # Without a file of a tokenizer, that of the model type would be made up.
    if not any(file.name.startswith(_NAMES) for file in folder.iterdir()):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        return tokenizer if _is_stored(tokenizer, folder) else None
    # Tokenizers raise anything.
    except Exception:
        return None


def tokenizer_files(tokenizer: Any, folder: Path) -> list[Path]:
    """Return the files of a folder that ``tokenizer`` was opened from."""
    names = {*tokenizer.vocab_files_names.values(), *_COMMON_FILES}
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def _is_stored(tokenizer: Any, folder: Path) -> bool:
    """Tell whether a folder holds the tokenizer's files; without, some are opened as empty ones.

    Tokenizers of bytes or characters have no files.
    """
    names = dict(tokenizer.vocab_files_names)
    whole = names.pop("tokenizer_file", None)
    if whole is not None and (folder / whole).is_file():
        return True
    if whole is not None and not names:
        return False
    parts = [name for key, name in names.items() if key != "tokenizer_config_file"]
    return all((folder / name).is_file() for name in parts)


def _missing(folder: Path, files: tuple[str, ...], purpose: str) -> RecipeError:
    parts = [name for name in files if name != "tokenizer.json"]
    others = f", or {' and '.join(parts)}" if parts else ""
    return RecipeError(
        f"{given_folder(folder)}: {purpose} the base's tokenizer: tokenizer.json{others}, or the "
        "files of another tokenizer that transformers opens"
    )


def _try(tokenizer: Any) -> None:
    """Make sure that a tokenizer encodes a text and says how long texts may be.

    Raises:
        ValueError: it does not; or anything else.
    """
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or longest < 1:
        raise ValueError(f"model_max_length is {longest!r}")
    tokenizer(["a", "a b"], truncation=True, max_length=min(int(longest), 8))
