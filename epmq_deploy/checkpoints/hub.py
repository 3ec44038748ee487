"""The Hugging Face hub: ids of models and data sets, and fetching models."""

import re
from dataclasses import dataclass
from pathlib import Path

from epmq_deploy.checkpoints.adapter_settings import ADAPTER_CONFIG
from epmq_deploy.checkpoints.files import SETTINGS_SUFFIXES
from epmq_deploy.checkpoints.pickle_conversion import PICKLES, pickled_weights
from epmq_deploy.errors import RecipeError

# The card (README.md) names the license.
_PATTERNS = ["*.safetensors", *(f"*{suffix}" for suffix in SETTINGS_SUFFIXES), "README.md"]
_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@(\S+))?", re.ASCII)
_FILES = (".parquet", ".json", ".jsonl", ".csv", ".safetensors", ".yaml", *PICKLES)


@dataclass(frozen=True)
class HubId:
    """A repository on the hub.

    Attributes:
        repository: ``owner/name``.
        revision: a branch, a tag, a commit or ``refs/pr/N``; None means the main branch.
    """

    repository: str
    revision: str | None


def hub_id(text: str) -> HubId | None:
    """Parse ``owner/name`` or ``owner/name@revision``; None where ``text`` is neither.

    Text that ends like a file name is taken for a file.
    """
    match = _ID.fullmatch(text)
    if match is None or text.startswith(".") or text.endswith(("/", *_FILES)):
        return None
    return HubId(match[1], match[2])


def fetch_snapshot(model: HubId) -> Path:
    """Fetch a model's safetensors and settings; return the local folder.

    Raises:
        RecipeError: loading fails, or there are no safetensors.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(model.repository, revision=model.revision, allow_patterns=_PATTERNS)
        )
    except Exception as error:
        raise RecipeError(
            f"{_shown(model)}: no such folder, and loading it from the hub failed "
            f"({_reason(error)})"
        ) from error
    # Adapters may each have a folder of their own.
    if not any(folder.glob("*.safetensors")) and not any(folder.glob(f"*/{ADAPTER_CONFIG}")):
        _explain_missing(model)
    return folder


def _explain_missing(model: HubId) -> None:
    """Raise an error that says what a repository without safetensors has instead."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(model.repository, revision=model.revision)
    except Exception as error:
        raise RecipeError(
            f"{_shown(model)}: no safetensors here, and listing its files on the hub failed "
            f"({_reason(error)})"
        ) from error
    top = [name for name in names if "/" not in name]
    pickles = pickled_weights(top)
    if pickles is None:
        raise RecipeError(f"{_shown(model)}: its repository on the hub has no safetensors")
    local = Path(model.repository.split("/")[1])
    revision = f" --revision {model.revision}" if model.revision else ""
    raise RecipeError(
        f"{_shown(model)}: its repository on the hub has only pickled weights ({pickles.first}), "
        f"which are never loaded; give a revision with safetensors as {model.repository}@REVISION "
        "(a pull request is refs/pr/NUMBER), or convert them and give the folder: hf download "
        f"{model.repository}{revision} --local-dir {local} && {pickles.conversion(local)}"
    )


def _shown(model: HubId) -> str:
    return f"{model.repository}@{model.revision}" if model.revision else model.repository


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
