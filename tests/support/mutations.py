"""Structure-aware mutations of plain data and of bytes, as hypothesis draws them."""

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

# What stands where something else belongs.
ODD = (
    None,
    True,
    0,
    -1,
    1,
    7,
    2**31,
    2**70,
    -0.5,
    1e300,
    "",
    "x",
    "0",
    "../..",
    "/etc/passwd",
    "\0",
    "ü" * 300,
    [],
    {},
    [None],
    [[]],
    [1, "x"],
    {"": None},
    {"x": {"x": []}},
)


def paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in plain data, the whole first."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from paths(value, (*path, key))
        else:
            yield (*path, key)


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


@st.composite
def mutated(draw: st.DrawFn, data: Any, most: int = 3) -> Any:
    """Plain data with up to ``most`` changes: replaced, nudged, left out, renamed, copied."""
    data = deepcopy(data)
    for _ in range(draw(st.integers(1, most))):
        places = list(paths(data)) if isinstance(data, dict | list) else [()]
        path = draw(st.sampled_from(places))
        if not path:
            if draw(st.integers(0, 30)) == 0:
                return deepcopy(draw(st.sampled_from(ODD)))
            continue
        parent, key = _at(data, path[:-1]), path[-1]
        value = parent[key]
        kind = draw(st.sampled_from(("replace", "replace", "nudge", "delete", "rename", "swap")))
        if kind == "delete":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(("x", "", f"{key}s", str(key).upper())))] = parent.pop(key)
        elif kind == "swap":
            parent[key] = deepcopy(_at(data, draw(st.sampled_from(places[1:]))[:1]))
        elif kind == "nudge" and isinstance(value, int | float):
            parent[key] = draw(
                st.sampled_from((value + 1, value - 1, -value, value * 2, str(value)))
            )
        elif kind == "nudge" and isinstance(value, list):
            parent[key] = draw(st.sampled_from((value[:-1], value * 2, value[::-1], [value])))
        elif kind == "nudge" and isinstance(value, str):
            parent[key] = draw(st.sampled_from((value[:-1], value * 2, value.upper(), [value])))
        else:
            parent[key] = deepcopy(draw(st.sampled_from(ODD)))
    return data


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut short, overwritten, left out or put in somewhere."""
    start = draw(st.integers(0, max(0, len(content) - 1)))
    length = draw(st.integers(0, 8))
    new = draw(st.binary(max_size=8))
    kind = draw(st.sampled_from(("cut", "overwrite", "delete", "insert")))
    if kind == "cut":
        return content[:start]
    if kind == "overwrite":
        return content[:start] + new + content[start + len(new) :]
    return content[:start] + (new if kind == "insert" else b"") + content[start + length :]


@st.composite
def broken_json(draw: st.DrawFn, data: Any) -> bytes:
    """A JSON file: mostly valid JSON with odd values, sometimes damaged bytes."""
    if draw(st.integers(0, 7)) == 0:
        return draw(damaged(json.dumps(data).encode()))
    return json.dumps(draw(mutated(data))).encode()
