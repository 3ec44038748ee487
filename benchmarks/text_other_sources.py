"""Read the texts of the second text suite from their packages: other tasks, pairs, values.

No task or text of the first suite is among them, and no default was chosen on them.
"""

from __future__ import annotations

import gzip
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from packages import only_file
from text_sources import Source, Text, rated

# Abbreviations of Webster's fields in the text.
_FIELDS = {
    "Zool.": "zoology",
    "Bot.": "botany",
    "Chem.": "chemistry",
    "Med.": "medicine",
    "Anat.": "anatomy",
    "Naut.": "seafaring",
    "Min.": "minerals",
    "Mus.": "music",
    "Arch.": "architecture",
    "Mil.": "warfare",
}
_FORTUNES = ("art", "computers", "politics", "science", "songs-poems", "work", "zippy")
_DEFINITION = re.compile(r"\n\n|\n\s*\[1913 Webster\]|\[[^\]]*\]\s*--|--[A-Z]")
# Raters go from 0 to 10; half of that, as similarities usually are given.
_RATING_SCALE = 0.5


def _fields(folder: Path) -> Iterator[Text]:
    """Yield Webster's definitions with the field of knowledge they are marked with."""
    for _, _, body in _webster(folder):
        marks = list(re.finditer(r"\(([A-Z][A-Za-z]+\.)\)", body))
        for mark in marks:
            if mark.group(1) in _FIELDS:
                definition = _definition(body[mark.end() :])
                if len(definition.split()) >= 4:
                    yield definition, _FIELDS[mark.group(1)]
                    break


def _terms(folder: Path) -> Iterator[Text]:
    """Yield words with definitions, in every second pair those of another word of its kind."""
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for word, kind, body in _webster(folder):
        definition = _definition(re.split(r"\n\s+1\.\s", body, maxsplit=1)[-1])
        # A definition that names its word gives itself away.
        named = word[:4].lower() in definition.lower() or "{" in definition
        if len(definition.split()) >= 5 and not named and "(" not in definition:
            kinds[kind].append((word, definition))
    order = random.Random(0)
    for entries in kinds.values():
        order.shuffle(entries)
        for number in range(0, len(entries) - 3, 3):
            (word, right), (other, _), (_, wrong) = entries[number : number + 3]
            yield (word, right), "fits"
            yield (other, wrong), "does not fit"


def _webster(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield words of the dictionary with part of speech and the rest of their entry."""
    with gzip.open(only_file(folder, "usr/share/dictd/gcide.dict.dz")) as lines:
        content = lines.read().decode("utf-8", errors="replace")
    heads = re.compile(r"\n\n([A-Z][a-z]+) \\[^\\\n]+\\,? *(?:\([^)]*\),? *)?(n|a|v)\.(?: [ti]\.)?")
    entries = list(heads.finditer(content))
    ends = [entry.start() for entry in entries[1:]] + [len(content)]
    for entry, end in zip(entries, ends, strict=True):
        body = content[entry.end() : end]
        # Forms and etymology stand in brackets before the first sense.
        yield entry.group(1), entry.group(2), re.sub(r"^[^\[\n]*\[[^\]]*\]", "", body)


def _definition(body: str) -> str:
    """Return the first sentences of an entry without quotations and marks."""
    text = _DEFINITION.split(body.lstrip(" \n"), maxsplit=1)[0]
    return " ".join(re.sub(r"[{}_]|\[[^\]]*\]", "", text).split())


def _fortunes(folder: Path) -> Iterator[Text]:
    """Yield fortune cookies, without who said them, with their file's name."""
    for topic in _FORTUNES:
        file = only_file(folder, f"usr/share/games/fortunes/{topic}")
        for cookie in file.read_text(encoding="utf-8", errors="replace").split("\n%\n"):
            yield cookie.split("\n\t\t-- ")[0], topic


def _movies(folder: Path) -> Iterator[Text]:
    """Yield sentences of movie reviews with the mean of 20 raters' sentiment, from -4 to 4."""
    yield from rated(folder, "movieReviewSnippets")


def _hypernyms(folder: Path) -> Iterator[Text]:
    """Yield a verb's definition with that of a more general verb, every second time a wrong one.

    The wrong one is more general than another verb of the same lexicographers' category.
    """
    glosses: dict[str, str] = {}
    above: dict[str, list[tuple[str, str]]] = defaultdict(list)
    file = folder / "usr/share/wordnet/data.verb"
    for line in file.read_text(encoding="utf-8").splitlines():
        fields, separator, gloss = line.partition(" | ")
        if separator:
            verb, category, *_ = fields.split(" ")
            glosses[verb] = gloss.split('; "')[0].strip()
            if general := re.search(r" @ (\d{8}) v ", fields):
                above[category].append((verb, general.group(1)))
    order = random.Random(0)
    for pairs in above.values():
        order.shuffle(pairs)
        for (verb, right), (other, _), (_, wrong) in zip(
            pairs[::3], pairs[1::3], pairs[2::3], strict=False
        ):
            yield (glosses[verb], glosses[right]), "more general"
            if (other, wrong) not in pairs and other != wrong:
                yield (glosses[other], glosses[wrong]), "something else"


def _similarity(folder: Path) -> Iterator[Text]:
    """Yield pairs of words with how similar raters found them, from 0 to 5."""
    for name in ("simlex999.txt", "wordsim353.tsv"):
        file = only_file(folder, f"gensim/test/test_data/{name}")
        for line in file.read_text(encoding="utf-8").splitlines():
            fields = line.split("\t")
            if not line.startswith("#") and len(fields) == 3:
                yield (fields[0], fields[1]), _RATING_SCALE * float(fields[2])


OTHER_SOURCES = (
    Source("fields", "dict-gcide", _fields, train=1000, cap=500),
    Source("terms", "dict-gcide", _terms, train=700),
    Source("movies", "vaderSentiment", _movies, train=700),
    Source("hypernyms", "wordnet-base", _hypernyms, train=700),
    Source("fortunes", "fortunes", _fortunes, train=700, cap=600),
    Source("similarity", "gensim", _similarity, train=700, test=300),
)
