"""YAML as people mean it: nothing is given twice, and every part knows its line.

Scalars follow the core schema of YAML 1.2: ``yes``, ``on``, ``010``, ``1:30`` and ``2024-01-01``
are text, ``3e-1`` is a number. Keys are always text.
"""

import re
from collections.abc import Hashable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import yaml

# Keys and indexes from the top; parts that the document does not have are passed over.
Path = Sequence[str | int]


class YamlError(ValueError):
    """A text is not YAML, or says something twice; one sentence with the line."""


@dataclass(frozen=True)
class YamlDocument:
    """What a YAML text says, and where it says it.

    Attributes:
        content: plain data.
        root: the node of ``content``; None for an empty text.
    """

    content: Any
    root: yaml.Node | None

    def line(self, path: Path) -> int | None:
        """Return the line of a key or an entry, or of the nearest part above it that is there."""
        if self.root is None:
            return None
        line = self.root.start_mark.line
        for key, value in self._steps(path):
            line = (key or value).start_mark.line
        return int(line) + 1

    def with_text(self, paths: Sequence[Path]) -> "YamlDocument":
        """Return the document with scalars as they are written, in place of what they mean.

        Paths to something else, or to a scalar that means nothing (``~``), change nothing.
        """
        content = deepcopy(self.content)
        for path in paths:
            nodes = [self.root, *(value for _, value in self._steps(path))]
            holder, key = _holder(content, path)
            if key == path[-1] and _says_something(nodes[-1]):
                holder[key] = nodes[-1].value  # type: ignore[union-attr]
        return replace(self, content=content)

    def _steps(self, path: Path) -> Iterator[tuple[yaml.Node | None, yaml.Node]]:
        """Yield key and value (entries of lists have no key) of every part that is there."""
        node = self.root
        for part in path:
            if isinstance(node, yaml.MappingNode):
                # What a merge key brings in stands before the mapping's own keys.
                pairs = [pair for pair in node.value if pair[0].value == str(part)]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                pairs = [(None, value) for value in node.value[part : part + 1]]
            else:
                return
            if pairs:
                node = pairs[-1][1]
                yield pairs[-1]


def read_yaml(text: str) -> YamlDocument:
    """Read one YAML document.

    Raises:
        YamlError: it is not YAML, or a key is given twice in one mapping; names every such key.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if problems := list(_problems(root, set(), set())):
            raise YamlError("; ".join(problems))
        content = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise YamlError(_described(error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"line {line}: not YAML ({error.reason})") from error
    except RecursionError as error:
        raise YamlError("not YAML that can be read (nested too deeply)") from error
    return YamlDocument(content, root)


class _Loader(yaml.SafeLoader):
    """Plain data, scalars by the core schema, keys as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep) for key, value in node.value}

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        try:
            return int(node.value, 0)
        except ValueError as error:
            raise self._not(node, "number") from error

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        try:
            return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError as error:
            raise self._not(node, "number") from error

    @staticmethod
    def _not(node: yaml.ScalarNode, kind: str) -> yaml.MarkedYAMLError:
        problem = f"{node.value[:20]!r} is not a {kind}"
        return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_Loader.yaml_implicit_resolvers = {}
_PREFIX = "tag:yaml.org,2002:"
# The core schema, and merge keys, which YAML 1.2 leaves out and people use.
for tag, pattern, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"{_PREFIX}{tag}", re.compile(f"^(?:{pattern})$"), first)
_Loader.add_constructor(f"{_PREFIX}int", _Loader.construct_yaml_int)
_Loader.add_constructor(f"{_PREFIX}float", _Loader.construct_yaml_float)


def _problems(node: yaml.Node | None, above: set[int], seen: set[int]) -> Iterator[str]:
    """Yield what is given twice, contains itself, or is not a key; every node once."""
    if not isinstance(node, yaml.CollectionNode):
        return
    line = node.start_mark.line + 1
    if id(node) in above:
        yield f"line {line}: contains itself by an alias"
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield from _key_problems(node)
        children = [value for _, value in node.value]
    else:
        children = node.value
    for child in children:
        yield from _problems(child, above | {id(node)}, seen)


def _key_problems(node: yaml.MappingNode) -> Iterator[str]:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            yield f"line {line}: a key must be text"
        elif key.value in lines:
            advice = "write <<: [*first, *second]" if key.value == "<<" else "keep one of them"
            yield (
                f"line {line}: {key.value} is given twice, first in line {lines[key.value]}; "
                f"{advice}"
            )
        else:
            lines[key.value] = line


def _described(error: yaml.MarkedYAMLError) -> str:
    """Return one sentence with the line."""
    mark = error.problem_mark or error.context_mark
    where = "" if mark is None else f"line {mark.line + 1}: "
    problem = error.problem or error.context or "unreadable"
    if mark is not None and "'\\t'" in problem:
        return f"{where}not YAML (a tab); indent with spaces"
    advice = "put text with special characters in quotes"
    return f"{where}not YAML ({problem}); {advice}"


def _says_something(node: yaml.Node | None) -> bool:
    """Tell whether a node is a scalar without quotes, and not null."""
    return isinstance(node, yaml.ScalarNode) and not node.style and node.tag != f"{_PREFIX}null"


def _holder(content: Any, path: Path) -> tuple[Any, str | int | None]:
    """Return the innermost list or mapping of a path, and the part of the path that it holds."""
    holder, key = None, None
    for part in path:
        is_key = isinstance(content, dict) and part in content
        if is_key or (isinstance(content, list) and part in range(len(content))):
            holder, key, content = content, part, content[part]
    return holder, key
