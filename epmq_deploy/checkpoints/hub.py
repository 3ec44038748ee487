"""Models and data on the Hugging Face hub: what they are called, and models fetched from there."""

import re
from dataclasses import dataclass
from pathlib import Path

from epmq_deploy.checkpoints.pickle_conversion import PICKLES, pickled_weights
from epmq_deploy.errors import RecipeError

# The card says under which license a model is.
_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md"]
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
    """What ``owner/name`` or ``owner/name@revision`` names; None where ``text`` is neither.

    A name with the ending of a file is that file's.
    """
    found = _ID.fullmatch(text)
    if found is None or text.startswith(".") or text.endswith(("/", *_FILES)):
        return None
    return HubId(found[1], found[2])


def fetch_snapshot(wanted: HubId) -> Path:
    """A local folder with a model's safetensors and settings.

    Raises:
        RecipeError: the hub does not deliver it, or it has pickled weights only.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(wanted.repository, revision=wanted.revision, allow_patterns=_PATTERNS)
        )
    except Exception as error:
        raise RecipeError(
            f"{_shown(wanted)}: no such folder, and the hub did not deliver it ({_reason(error)})"
        ) from error
    if not any(folder.glob("*.safetensors")):
        _explain_missing(wanted)
    return folder


def _explain_missing(wanted: HubId) -> None:
    """Say what a repository without safetensors has in their place."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(wanted.repository, revision=wanted.revision)
    except Exception as error:
        raise RecipeError(
            f"{_shown(wanted)}: no safetensors here, and the hub does not say what it has "
            f"({_reason(error)})"
        ) from error
    top = [name for name in names if "/" not in name]
    found = pickled_weights(top)
    if found is None:
        raise RecipeError(f"{_shown(wanted)}: the hub has no safetensors of it")
    local = Path(wanted.repository.split("/")[1])
    revision = f" --revision {wanted.revision}" if wanted.revision else ""
    raise RecipeError(
        f"{_shown(wanted)}: the hub has only pickled weights of it ({found.first}), which are "
        f"never loaded; give a revision with safetensors as {wanted.repository}@REVISION (a pull "
        "request is refs/pr/NUMBER), or convert them and give the folder: "
        f"hf download {wanted.repository}{revision} --local-dir {local} && "
        f"{found.conversion(local)}"
    )


def _shown(wanted: HubId) -> str:
    return f"{wanted.repository}@{wanted.revision}" if wanted.revision else wanted.repository


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
