"""The recipe: one YAML file, one frozen model per section."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from epmq_deploy.options import SEVERAL, Options, union_by_method
from epmq_deploy.options.merging import MergeOptions
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.recipe.prompt import Prompt
from epmq_deploy.registry import MERGE_METHODS, QUANTIZATION_METHODS, Method

# Where labels are when nothing else is said.
LABEL_COLUMN = "label"
# In place of names: the data number their classes as the head does.
SAME_AS_HEAD = "same_as_head"
# How many of the images that will be used are decoded before work starts.
Preflight = Literal["auto", "full", "sampled"]
# A task's name becomes part of the graph's output names.
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
# As transformers and the Hugging Face hub call them.
ProblemType = Literal[
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "token_classification",
    "feature_extraction",
]
MetricName = Literal[
    "accuracy",
    "f1",
    "macro_f1",
    "micro_f1",
    "matthews_correlation",
    "mean_average_precision",
    "seqeval_f1",
    "ndcg_at_10",
    "spearmanr",
    "pearsonr",
]
# From the first with 4-bit types to the last one that torch's exporter converts graphs with custom
# operators to (measured on torch 2.13).
OPSETS = range(21, 26)
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], SEVERAL]
if TYPE_CHECKING:
    MergeChoice = MergeOptions
    QuantizeChoice = QuantizeOptions
else:
    MergeChoice = union_by_method([method.options for method in MERGE_METHODS.values()])
    QuantizeChoice = union_by_method([target.options for target in QUANTIZATION_METHODS.values()])


# The sections with a choice of methods.
METHODS: Mapping[str, Mapping[str, Method]] = {
    "merge": MERGE_METHODS,
    "quantize": QUANTIZATION_METHODS,
}
DEFAULT_METHODS = {"merge": "task_arithmetic", "quantize": "epmq"}


def default_options(section: str) -> Any:
    """Return the options of a section that a recipe leaves out."""
    return METHODS[section][DEFAULT_METHODS[section]].options()


class Base(Options):
    """The model all experts were fine-tuned from."""

    path: str = Field(
        description="folder or hub id of the base model; a hub id may have a revision "
        "(owner/name@revision); for weights of open_clip give open_clip:NAME=PATH"
    )
    part: Literal["image", "text", "both"] | None = Field(
        None,
        description="for CLIP, the tower to merge: image (default), text or both; the merged text "
        "tower then makes heads from class names",
    )


class DataSource(Options):
    """Samples: anything ``datasets`` loads."""

    path: str = Field(description="image folder, Parquet/JSON/CSV file, saved dataset, or hub id")
    subset: str | None = Field(None, description="the dataset's configuration name")
    split: str | None = Field(None, description="split to use; default: the only one")
    input_column: str | None = Field(
        None,
        description="column with the inputs, a.b for field b of a; default: image or text, "
        "depending on the model, or the only column that can be meant",
    )
    input_columns: tuple[str, str] | None = Field(
        None,
        description="two columns with texts that the model reads together, as [premise, "
        "hypothesis]; in place of input_column",
    )
    label_column: str | None = Field(
        LABEL_COLUMN,
        description="column with integer labels, or with answers for text generation; with null, "
        "the task's expert generates pseudo-labels for text-generation calibration data",
    )
    label_columns: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="columns with 0 or 1 for one label each, called like the labels; in place of "
        "label_column where samples have any number of labels",
    )
    label_names: tuple[str, ...] | Literal["same_as_head"] | None = Field(
        None,
        description="names of the labels 0, 1, ..., as the head calls them; default: the names "
        "in the data, and without any the head's numbers; same_as_head: the head's numbers, "
        "whatever the data call them",
    )

    @field_validator("label_names", mode="before")
    @classmethod
    def _names_or_head(cls, given: Any) -> Any:
        """Refuse anything but a list and the one word, in one sentence."""
        if isinstance(given, str) and given != SAME_AS_HEAD:
            raise ValueError(f"must be a list of names, or {SAME_AS_HEAD}")
        return given

    @field_validator("input_columns", mode="before")
    @classmethod
    def _two_columns(cls, given: Any) -> Any:
        """Refuse anything but two columns, in one sentence."""
        if given is not None and not (isinstance(given, list | tuple) and len(given) == 2):
            raise ValueError("must be a list of two columns; for one, give input_column")
        return given

    @model_validator(mode="after")
    def _one_input(self) -> "DataSource":
        if self.input_column is not None and self.input_columns is not None:
            raise ValueError("input_column and input_columns exclude each other")
        return self


class Head(Options):
    """A task's classifier: class names through the text tower, a ready matrix, or the expert's."""

    classes: tuple[str, ...] | None = Field(
        None,
        description="class names, in the order of the logits; alone they make the classifier, with "
        "matrix or from_expert they name its classes",
    )
    templates: tuple[str, ...] = Field(
        ("a photo of a {}.",), description="prompts; {} is replaced by the class name"
    )
    matrix: str | None = Field(
        None, description="safetensors file with one [classes, features] tensor"
    )
    from_expert: bool = Field(
        False,
        description="take the classifier in the expert's checkpoint; the default for all models "
        "but CLIP",
    )

    problem_type: ProblemType | None = Field(
        None,
        description="what the logits mean; default: what the expert's config.json says, and "
        "without that regression for a single logit, one of several classes for more",
    )

    @property
    def is_zero_shot(self) -> bool:
        """Whether class names make the classifier."""
        return self.classes is not None and self.matrix is None and not self.from_expert

    @model_validator(mode="after")
    def _one_kind(self) -> "Head":
        if self.matrix is not None and self.from_expert:
            raise ValueError("matrix and from_expert exclude each other")
        if self.classes is None and self.matrix is None and not self.from_expert:
            raise ValueError("needs one of classes (with templates), matrix and from_expert: true")
        if not all("{}" in template for template in self.templates):
            raise ValueError("every template needs {} where the class name goes")
        if self.is_zero_shot and self.problem_type not in (None, "single_label_classification"):
            raise ValueError("class names alone make heads for single_label_classification")
        return self


class Task(Options):
    """One expert, and the data and head of its task."""

    expert: str = Field(description="folder or hub id of the expert, as base.path")
    adapter: str | None = Field(
        None, description="name of one of several adapters in the expert's folder"
    )
    calibration: DataSource | None = Field(None, description="samples for quantization")
    evaluation: DataSource | None = Field(None, description="labelled samples for evaluation")
    head: Head | None = Field(None, description="the task's classifier")
    prompt: Prompt | None = Field(None, description="the task in words, for text generation")
    inputs_from: Literal["base", "expert"] = Field(
        "base",
        description="whose image processor or tokenizer settings make the task's inputs: the "
        "base's, or those the expert was fine-tuned with",
    )
    metric: tuple[MetricName, ...] | None = Field(
        None,
        description="how answers are scored: the first metric counts, others are shown beside it; "
        "default: accuracy for classes, micro_f1 for any number of labels, spearmanr for values",
    )

    @property
    def text_pair(self) -> tuple[str, str] | None:
        """The two columns whose texts the model reads together; None where it reads one text."""
        source = self.evaluation or self.calibration
        return None if source is None else source.input_columns

    @field_validator("metric", mode="before")
    @classmethod
    def _one_metric(cls, given: Any) -> Any:
        """Return a metric that is given by itself as the only one, and none as not given."""
        return (given,) if isinstance(given, str) else (None if given in ([], ()) else given)

    @model_validator(mode="after")
    def _same_inputs(self) -> "Task":
        if self.calibration is not None and self.evaluation is not None:
            pairs = [source.input_columns for source in (self.calibration, self.evaluation)]
            if pairs.count(None) == 1:
                raise ValueError(
                    "calibration and evaluation must both give input_columns, or neither"
                )
        return self


class ExportOptions(Options):
    """Options of ``epmq export``."""

    target: str | None = Field(
        None,
        description="deployment target; picks formats and checks that its kernels support every "
        "layer; `epmq export --list` shows all targets",
    )
    formats: Annotated[tuple[str, ...] | None, SEVERAL] = Field(
        None,
        min_length=1,
        json_schema_extra={"flag": "--format"},
        description="formats to write; default: the target's, else those that `epmq export --list` "
        "marks as default",
    )
    opset: int | None = Field(
        None,
        ge=OPSETS[0],
        le=OPSETS[-1],
        description="ONNX opset, 21 to 25; default: 23 for int8-expand, which uses its Attention "
        "operator, and 21 for other formats",
    )
    accuracy_level: int = Field(
        0, ge=0, le=4, description="how MatMulNBits computes: 0 in float32, 4 in int8 (faster)"
    )
    two_bit_containers: bool | None = Field(
        None,
        description="store 2-bit codes of MatMulNBits in 2 bits instead of 4: half the size, but "
        "several times as slow at accuracy level 0; default: true at accuracy level 4, else false",
    )
    demo: bool = Field(
        False, description="write a page that runs the graph in the browser (webgpu and wasm)"
    )
    demo_libraries: str | None = Field(
        None,
        description="folder where npm has installed the page's libraries; "
        "default: ~/.cache/epmq-deploy/web",
    )
    int8_activations: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="ranges of int8-expand's activations: computed in each run (dynamic) or taken "
        "from calibration (static)",
    )
    int8_error_budget: float = Field(
        0.05,
        ge=0,
        description="largest relative error of a layer in int8-expand; layers above it stay "
        "MatMulNBits",
    )


class EvalOptions(Options):
    """Options of ``epmq eval``."""

    batch_size: int = Field(
        64,
        ge=1,
        description="samples per run; affects accuracy only with int8-expand, and slightly, "
        "because its dynamic ranges are those of the whole batch",
    )
    max_samples: int | None = Field(None, ge=1, description="samples per task; default: all")
    max_drop: float | None = Field(
        None, description="gate: largest loss of average accuracy against fp32 merged, in points"
    )
    max_tokens: int = Field(32, ge=1, description="longest generated answer, in tokens")
    max_latency_ratio: float | None = Field(
        None,
        gt=0,
        description="gate: largest latency relative to fp32 merged, at the first batch "
        "size and number of threads",
    )
    max_size: float | None = Field(
        None, gt=0, description="gate: largest size of a graph's files together, in MB (10^6 bytes)"
    )
    margin: float = Field(
        1.0, ge=0, description="points of accuracy that may be lost and still count as no worse"
    )
    provider: str = Field(
        "auto", description="onnxruntime's execution provider; auto is CUDA if available, else CPU"
    )
    threads: Counts = Field(
        (),
        description="numbers of onnxruntime's intra-op threads to compare; default: as many as the "
        "cores that this process may use",
    )
    latency_batches: Counts = Field((1, 8), min_length=1, description="batch sizes to time")
    latency_runs: int = Field(50, ge=1, description="timed runs per graph and setting")
    experts: bool = Field(True, description="also evaluate the experts, for reference")
    diagnose: bool = Field(False, description="compare every layer with fp32 merged")
    diagnose_samples: int = Field(8, ge=1, description="samples per task for diagnose")


# Keys of a recipe that are no sections.
_SCALARS = frozenset({"preflight"})


class Recipe(Options):
    """Everything the four commands need."""

    base: Base
    tasks: dict[TaskName, Task] = Field(min_length=1)
    merge: MergeChoice = Field(default_factory=lambda: default_options("merge"))
    quantize: QuantizeChoice = Field(default_factory=lambda: default_options("quantize"))
    export: ExportOptions = Field(default_factory=ExportOptions)
    eval: EvalOptions = Field(default_factory=EvalOptions)
    preflight: Preflight = Field(
        "auto",
        description="which images are decoded before any work: full, all that will be used; "
        "sampled, some of each data source; auto, all of up to 2000 and some of more",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_methods(cls, content: Any) -> Any:
        """Return the content with the default ``method`` in sections that name none."""
        if isinstance(content, dict):
            # An empty section means its defaults.
            content = {
                section: {} if options is None and section in cls.model_fields else options
                for section, options in content.items()
                if not (options is None and section in _SCALARS)
            }
            for section, method in DEFAULT_METHODS.items():
                if isinstance(content.get(section), dict):
                    content[section] = {"method": method, **content[section]}
        return content
