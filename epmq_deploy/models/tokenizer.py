"""Opening a model folder's tokenizer."""

from pathlib import Path
from typing import Any

from epmq_deploy.checkpoints.open_clip_weights import given_folder
from epmq_deploy.errors import RecipeError


def open_tokenizer(
    folder: Path, files: tuple[str, ...], vocabulary: int, purpose: str, **settings: Any
) -> Any:
    """Open the folder's tokenizer; where it is missing, transformers would make up an empty one.

    Args:
        folder: a Hugging Face model folder.
        files: of a tokenizer that is not stored as ``tokenizer.json``.
        vocabulary: rows of the model's token embedding.
        purpose: what needs it, for the message.
        settings: in place of the folder's.

    Raises:
        RecipeError: files are missing or cannot be opened, or it has tokens the model has no
            embedding for.
    """
    from transformers import AutoTokenizer

    whole = (folder / "tokenizer.json").is_file()
    parts = all((folder / name).is_file() for name in files)
    if not (whole or parts):
        raise RecipeError(
            f"{given_folder(folder)}: {purpose} the base's tokenizer: tokenizer.json, or "
            f"{' and '.join(files)}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **settings
        )
        _try(tokenizer)
    # Tokenizers raise anything.
    except Exception as error:
        raise RecipeError(
            f"{folder}: {purpose} the base's tokenizer, which cannot be opened "
            f"({' '.join(str(error).split())[:200] or type(error).__name__})"
        ) from error
    if len(tokenizer) > vocabulary:
        raise RecipeError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}"
        )
    return tokenizer


def _try(tokenizer: Any) -> None:
    """Make sure that a tokenizer encodes a text and says how long texts may be.

    Raises:
        ValueError: it does not; or anything else.
    """
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or longest < 1:
        raise ValueError(f"model_max_length is {longest!r}")
    tokenizer(["a", "a b"], truncation=True, max_length=min(int(longest), 8))
