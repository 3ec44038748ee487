"""The recipe: one YAML file, one frozen model per section."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from epmq_deploy.errors import RecipeError, listed
from epmq_deploy.merging.methods.task_arithmetic import TaskArithmeticOptions
from epmq_deploy.options import SEVERAL, Options, shared_fields, union_by_method
from epmq_deploy.options.merging import MergeOptions
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.quantization.methods.epmq import EpmqOptions
from epmq_deploy.recipe.prompt import Prompt
from epmq_deploy.registry import MERGE_METHODS, QUANTIZATION_METHODS, Method

# Where labels are when nothing else is said.
LABEL_COLUMN = "label"
# A task's name becomes part of the graph's output names.
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]

# From the first with 4-bit types to the last one that torch's exporter converts graphs with custom
# operators to (measured on torch 2.13).
OPSETS = range(21, 26)

# Options of quantization that say how many bits weights have.
_WAYS_TO_BITS = {"bits", "target_bits", "target_size"}

Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], SEVERAL]
if TYPE_CHECKING:
    MergeChoice = MergeOptions
    QuantizeChoice = QuantizeOptions
else:
    MergeChoice = union_by_method([method.options for method in MERGE_METHODS.values()])
    QuantizeChoice = union_by_method([target.options for target in QUANTIZATION_METHODS.values()])


class Base(Options):
    """The model all experts were fine-tuned from."""

    path: str = Field(
        description="folder or hub id of the base model; hub ids may have a revision, "
        "owner/name@revision, and weights of open_clip are open_clip:NAME=PATH"
    )
    part: Literal["image", "text", "both"] | None = Field(
        None,
        description="of CLIP: the tower that is merged, image (default), text or both; heads from "
        "class names are made by the merged text tower",
    )


class DataSource(Options):
    """Samples: anything ``datasets`` loads."""

    path: str = Field(description="image folder, Parquet/JSON/CSV file, saved dataset, or hub id")
    subset: str | None = Field(None, description="the dataset's configuration name")
    split: str | None = Field(None, description="split to take; the only one when absent")
    input_column: str | None = Field(
        None, description="column with the inputs; image or text, as the model takes, when absent"
    )
    label_column: str | None = Field(
        LABEL_COLUMN,
        description="column with integer labels, or with answers where the model writes texts; "
        "without it the task's expert writes answers to its calibration data",
    )


class Head(Options):
    """A task's classifier: class names through the text tower, a ready matrix, or the expert's."""

    classes: tuple[str, ...] | None = Field(None, description="class names in label order")
    templates: tuple[str, ...] = Field(
        ("a photo of a {}.",), description="prompts; {} is replaced by the class name"
    )
    matrix: str | None = Field(
        None, description="safetensors file with one [classes, features] tensor"
    )
    from_expert: bool = Field(
        False,
        description="the classifier in the expert's checkpoint; the default of all models but CLIP",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "Head":
        if (self.classes is not None) + (self.matrix is not None) + self.from_expert != 1:
            raise ValueError("needs one of classes (with templates), matrix and from_expert: true")
        if not all("{}" in template for template in self.templates):
            raise ValueError("every template needs {} where the class name goes")
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("class names must differ")
        return self


class Task(Options):
    """One expert and what it was made for."""

    expert: str = Field(description="folder or hub id of the expert, as base.path")
    calibration: DataSource | None = Field(None, description="samples for quantization")
    evaluation: DataSource | None = Field(None, description="labelled samples for evaluation")
    head: Head | None = Field(None, description="the task's classifier")
    prompt: Prompt | None = Field(None, description="the task in words, of models that write texts")


class ExportOptions(Options):
    """Options of ``epmq export``."""

    target: str | None = Field(
        None,
        description="where to run; picks formats and checks what its kernels take: cpu, cuda, "
        "tensorrt, openvino, qnn, webgpu, wasm",
    )
    formats: Annotated[tuple[str, ...] | None, SEVERAL] = Field(
        None,
        min_length=1,
        json_schema_extra={"flag": "--format"},
        description="formats to write; when absent the target's, else matmulnbits and qdq",
    )
    opset: int | None = Field(
        None,
        ge=OPSETS[0],
        le=OPSETS[-1],
        description="ONNX opset, 21 to 25; when absent 21, the first with 4-bit types, or 23, the "
        "first with Attention, where int8-expand uses that",
    )
    accuracy_level: int = Field(
        0, ge=0, le=4, description="arithmetic of MatMulNBits: 0 float32, 4 int8 (faster)"
    )
    two_bit_containers: bool | None = Field(
        None,
        description="store 2-bit codes of MatMulNBits in 2 bits instead of 4: half the size, but "
        "several times as slow at accuracy level 0; when absent only at level 4",
    )
    demo: bool = Field(
        False, description="write a page that runs the graph in the browser (webgpu and wasm)"
    )
    demo_libraries: str | None = Field(
        None,
        description="folder where npm has installed what the page needs; "
        "~/.cache/epmq-deploy/web when absent",
    )
    int8_activations: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="ranges of int8-expand's activations: of each run, or those of calibration",
    )
    int8_error_budget: float = Field(
        0.05,
        ge=0,
        description="int8-expand leaves layers with a larger relative error to MatMulNBits",
    )


class EvalOptions(Options):
    """Options of ``epmq eval``."""

    batch_size: int = Field(
        64,
        ge=1,
        description="samples per run; changes accuracy, slightly, with int8-expand alone, whose "
        "dynamic ranges span the batch",
    )
    max_samples: int | None = Field(None, ge=1, description="samples per task; all when absent")
    max_drop: float | None = Field(
        None, description="gate: largest loss of average accuracy against fp32 merged, in points"
    )
    max_tokens: int = Field(
        32, ge=1, description="longest answer of models that write texts, in tokens"
    )
    max_latency_ratio: float | None = Field(
        None,
        gt=0,
        description="gate: largest latency relative to fp32 merged, at the first batch "
        "size and number of threads",
    )
    max_size: float | None = Field(None, gt=0, description="gate: largest file, in MB (10^6 bytes)")
    margin: float = Field(
        1.0, ge=0, description="points of accuracy that may be lost and still count as no worse"
    )
    provider: str = Field(
        "auto", description="onnxruntime's execution provider; auto is CUDA when there, else CPU"
    )
    threads: Counts = Field(
        (), description="onnxruntime intra-op threads, several to compare; its default when absent"
    )
    latency_batches: Counts = Field((1, 8), min_length=1, description="batch sizes to time")
    latency_runs: int = Field(50, ge=1, description="timed runs per graph and setting")
    experts: bool = Field(True, description="evaluate the experts as reference")
    diagnose: bool = Field(False, description="compare every layer with fp32 merged")
    diagnose_samples: int = Field(8, ge=1, description="samples per task for that comparison")


class Recipe(Options):
    """Everything the four commands need."""

    base: Base
    tasks: dict[TaskName, Task] = Field(min_length=1)
    merge: MergeChoice = Field(default_factory=TaskArithmeticOptions)
    quantize: QuantizeChoice = Field(default_factory=EpmqOptions)
    export: ExportOptions = Field(default_factory=ExportOptions)
    eval: EvalOptions = Field(default_factory=EvalOptions)

    @model_validator(mode="before")
    @classmethod
    def _default_methods(cls, content: Any) -> Any:
        """A section without ``method`` means the default one."""
        if isinstance(content, dict):
            defaults = {"merge": TaskArithmeticOptions().method, "quantize": EpmqOptions().method}
            # An empty section means its defaults.
            content = {
                section: {} if options is None and section in cls.model_fields else options
                for section, options in content.items()
            }
            for section, method in defaults.items():
                if isinstance(content.get(section), dict):
                    content[section] = {"method": method, **content[section]}
        return content


def parse_recipe(content: Any, source: str) -> Recipe:
    """Validate a recipe given as plain data.

    Args:
        content: mapping of sections.
        source: what to call it in error messages.

    Raises:
        RecipeError: names every wrong key, what was found and what is allowed.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(listed(source, _describe(error))) from error


def parse_complete(content: Any, source: str) -> Recipe:
    """As ``parse_recipe``, of a recipe with every value written out; defaults are not given."""
    recipe = parse_recipe(content, source)
    return parse_recipe(_with_methods(recipe, recipe.model_dump(exclude_defaults=True)), source)


def _with_methods(recipe: Recipe, content: dict[str, Any]) -> dict[str, Any]:
    """A recipe as plain data that lacks some values, with its methods in any case."""
    for name in ("merge", "quantize"):
        content.setdefault(name, {})["method"] = getattr(recipe, name).method
    return content


def load_recipe(file: Path) -> Recipe:
    """Read a recipe; relative paths in it are taken from its folder.

    Raises:
        RecipeError: unreadable, no YAML, or invalid.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not YAML ({' '.join(str(error).split())})") from error
    return absolute_paths(parse_recipe(content, str(file)), file.resolve().parent)


def absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Make every local path absolute, seen from ``folder``; hub ids stay as they are."""
    from epmq_deploy.checkpoints.hub import hub_id
    from epmq_deploy.checkpoints.open_clip_weights import PREFIX, split_named

    def local(path: str) -> str:
        return str((folder / Path(path).expanduser()).resolve())

    def located(path: str) -> str:
        named = split_named(path)
        if named is not None:
            return f"{PREFIX}{named[0]}={local(named[1])}"
        # ``data/cars`` has the form of a hub id too; a folder of that first name decides.
        beside = (folder / path).exists() or (folder / Path(path).parts[0]).is_dir()
        return path if hub_id(path) and not beside else local(path)

    def source(data: DataSource | None) -> DataSource | None:
        return data and data.model_copy(update={"path": located(data.path)})

    def head(head: Head | None) -> Head | None:
        if head is None or head.matrix is None:
            return head
        return head.model_copy(update={"matrix": local(head.matrix)})

    tasks = {
        name: task.model_copy(
            update={
                "expert": located(task.expert),
                "calibration": source(task.calibration),
                "evaluation": source(task.evaluation),
                "head": head(task.head),
            }
        )
        for name, task in recipe.tasks.items()
    }
    base = recipe.base.model_copy(update={"path": located(recipe.base.path)})
    return recipe.model_copy(update={"base": base, "tasks": tasks})


def override(recipe: Recipe, section: str, flags: dict[str, Any]) -> Recipe:
    """Replace options of one section; a new ``method`` keeps only what all methods share.

    Args:
        recipe: to start from.
        section: ``merge``, ``quantize``, ``export`` or ``eval``.
        flags: options by name; None means not given.

    Raises:
        RecipeError: an option the method does not have, or a value it does not allow.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if not given:
        return recipe
    # What was not given stays so: options that have no effect are refused where they were given.
    content = _with_methods(recipe, recipe.model_dump(exclude_unset=True))
    options = content.get(section, {})
    if "target" in given:
        # A target brings formats of its own, unless some are given with it.
        options = options | {"formats": None}
    if not _WAYS_TO_BITS.isdisjoint(given):
        # One takes the place of the others, unless several are given.
        options = {key: value for key, value in options.items() if key not in _WAYS_TO_BITS}
    registries: dict[str, Mapping[str, Method]] = {
        "merge": MERGE_METHODS,
        "quantize": QUANTIZATION_METHODS,
    }
    known = registries.get(section, {})
    wanted = given.get("method")
    if isinstance(wanted, str) and wanted in known and wanted != options["method"]:
        old, new = known[options["method"]].options, known[wanted].options
        kept = shared_fields(old, new) - {"method"}
        options = {name: value for name, value in options.items() if name in kept}
    content[section] = options | given
    changed = parse_recipe(content, f"{section} options")
    # What a flag puts out of use is no mistake of the recipe's.
    if known:
        before, after = (getattr(each, section).idle().keys() for each in (recipe, changed))
        idle = after - before - given.keys()
        if not idle.isdisjoint(content[section]):
            used = {key: value for key, value in content[section].items() if key not in idle}
            changed = parse_recipe(content | {section: used}, f"{section} options")
    return changed


def _describe(error: ValidationError) -> list[str]:
    """One line per problem: the key, what was found, what is allowed."""
    lines = []
    for item in error.errors():
        # Members of a union appear in the location by their tag; the user's file has no such key.
        tags = {*MERGE_METHODS, *QUANTIZATION_METHODS}
        path = item["loc"]
        tagged = len(path) > 1 and path[0] in ("merge", "quantize") and path[1] in tags
        key = ".".join(str(part) for part in (path[:1] + path[2:] if tagged else path))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"no such option; allowed here: {', '.join(_allowed_keys(path))}"
        elif item["type"] == "model_type":
            message = "must be a mapping of options"
        elif item["type"] == "union_tag_invalid":
            tag, known = item["ctx"]["tag"], item["ctx"]["expected_tags"]
            key, message = f"{key}.method", f"{tag!r} is no method; known: {known}"
        found = item["input"]
        shown = f", found {found!r}" if isinstance(found, str | int | float | bool) else ""
        lines.append(f"{key or 'recipe'}: {message}{shown}")
    return lines


def _allowed_keys(path: tuple[int | str, ...]) -> list[str]:
    """Keys of the section an unknown key was found in."""
    known: dict[str, Mapping[str, Method]] = {
        "merge": MERGE_METHODS,
        "quantize": QUANTIZATION_METHODS,
    }
    if len(path) == 1:
        return list(Recipe.model_fields)
    if path[0] in known:
        return list(known[str(path[0])][str(path[1])].options.model_fields)
    models: dict[str, type[Options]] = {
        "base": Base,
        "tasks": Task,
        "calibration": DataSource,
        "evaluation": DataSource,
        "head": Head,
        "prompt": Prompt,
        "export": ExportOptions,
        "eval": EvalOptions,
    }
    section = next(part for part in reversed(path[:-1]) if part in models)
    return list(models[str(section)].model_fields)
