"""Manifests: how a stage's folder was made, and what the next stage reads of it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from epmq_deploy.artifacts.names import MANIFEST
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import ProblemType, Recipe, parse_complete
from epmq_deploy.recipe.paths import check_encoding
from epmq_deploy.version import __version__

FORMAT_VERSION = 1

Stage = Literal["merge", "quantize", "export"]


class _Record(BaseModel):
    """Plain data of a manifest, frozen; keys of later versions are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)


class ScalingLoss(_Record):
    """One point of a searched scaling's curve."""

    scaling: float
    loss: float


class MergeDetails(_Record):
    """What a merge reports; methods that take data add values of their own.

    Attributes:
        method: merge method.
        experts: number of experts.
        merged_tensors: tensors that were merged.
        copied_tensors: tensors that were taken from the base as they are.
        scaling: found by a search, where there was one.
        search: the search's curve.
        search_standard_error: of the loss at the scaling found.
        answers_by_experts: number of pseudo-labels by task, where data had no labels.
        refitted_heads: tasks whose heads were re-fitted to the quantized model.
        input_differences: by task, how its expert's own tokenizer or image processor makes other
            inputs than the base's; only tasks where it does.
    """

    method: str = ""
    experts: int = 0
    merged_tensors: int = 0
    copied_tensors: int = 0
    scaling: float | None = None
    search: tuple[ScalingLoss, ...] = ()
    search_standard_error: float | None = None
    answers_by_experts: Mapping[str, int] = Field(default_factory=dict)
    input_differences: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)


class AnchorPlan(_Record):
    """How strongly layers are held to the anchor, and the search that found it.

    Attributes:
        anchor: the strength chosen.
        curve: mean divergence from the experts by strength tried, as pairs, ascending.
        standard_error: of the difference between the best and the starting strength.
    """

    anchor: float
    curve: tuple[tuple[float, float], ...]
    standard_error: float


class TriedOptions(_Record):
    """Options that were tried on held-back calibration samples.

    Attributes:
        settings: values of the options that differ between candidates.
        losses: mean loss by the pull towards heads as they are, as pairs; None is no re-fitting.
    """

    settings: Mapping[str, float | str]
    losses: tuple[tuple[float | None, float], ...]


class OptionChoice(_Record):
    """Options chosen for one model on held-back calibration samples.

    Attributes:
        chosen: values of the options that differ between candidates.
        head_pull: towards heads as they are when heads are re-fitted; None to leave them so.
        tried: every candidate, in the order tried; the first is what stays unless another is
            better by more than the standard error.
        judged_by: what decided, by task: ``labels``, or the ``expert``'s predictions.
        fitted: how many samples of each task candidates were calibrated on, at most.
        judged: how many others they were judged on, at most.
        standard_error: of the difference between the best and the first candidate.
        reason: why nothing was tried; empty otherwise.
    """

    chosen: Mapping[str, float | str] = Field(default_factory=dict)
    head_pull: float | None = None
    tried: tuple[TriedOptions, ...] = ()
    judged_by: Mapping[str, str] = Field(default_factory=dict)
    fitted: int = 0
    judged: int = 0
    standard_error: float = 0.0
    reason: str = ""


class BitPlan(_Record):
    """Bits by layer under a budget.

    Attributes:
        layers: bits by layer name.
        mean_bits: average over the weights of these layers.
    """

    layers: Mapping[str, int]
    mean_bits: float


class Distillation(_Record):
    """What distillation did.

    Attributes:
        epochs: how often every sample was seen.
        before: mean divergence from the experts before it.
        after: the same after it.
        kept: whether its result was kept, because it lowered the divergence.
    """

    epochs: int
    before: float
    after: float
    kept: bool


class TrainedEpoch(_Record):
    """One epoch of training weights.

    Attributes:
        rate: highest learning rate of the attempt it belongs to.
        divergence: mean divergence from the experts on held-back samples after it.
    """

    rate: float
    divergence: float


class WeightDistillation(_Record):
    """What distillation of all weights did.

    Attributes:
        epochs: most that were asked for.
        curve: the epochs trained, over all attempts.
        chosen: epoch whose weights were kept, from 1; 0 for none.
        before: mean divergence from the experts on held-back samples at the start.
        after: the same of the weights kept.
        kept: whether its result was kept, because it lowered the divergence.
        passes: forward and backward passes of the student over all samples that it cost; the
            experts' forward passes count as a third each.
    """

    epochs: int
    curve: tuple[TrainedEpoch, ...]
    chosen: int
    before: float
    after: float
    kept: bool
    passes: float


class Residuals(_Record):
    """Corrections of layers for every task.

    Attributes:
        rank: of a layer's correction.
        layers: number of layers that have one.
        bytes: of all tasks' corrections.
        share: of these bytes in codes, scales, zero points and corrections together.
        without: layers in the blocks that have none, with the reason.
    """

    rank: int
    layers: int
    bytes: int
    share: float
    without: Mapping[str, str]


class QuantizeDetails(_Record):
    """What a quantization reports.

    Attributes:
        merge: of the merged model.
        layers: number of quantized layers.
        kept: names of layers left in float.
        status: number of layers by how they fared.
        input_statistics: number of layers whose inputs calibration saw.
        mean_error_before: mean relative error of layers after the solver.
        mean_error_after: the same after refinement.
        options: what was chosen on held-back samples, where the effort says so.
        anchor: the anchor's strength, where it was searched for.
        bits: bits by layer, where a budget chose them.
        distill_weights: distillation of all weights, where there was one.
        distill: distillation with fixed codes, where there was one.
        answers_by_experts: number of pseudo-labels by task, where data had no labels.
        residuals: corrections for every task, where there are any.
    """

    merge: MergeDetails = MergeDetails()
    layers: int = 0
    kept: tuple[str, ...] = ()
    status: Mapping[str, int] = Field(default_factory=dict)
    input_statistics: int = 0
    mean_error_before: float = 0.0
    mean_error_after: float = 0.0
    options: OptionChoice | None = None
    anchor: AnchorPlan | None = None
    bits: BitPlan | None = None
    distill_weights: WeightDistillation | None = None
    distill: Distillation | None = None
    answers_by_experts: Mapping[str, int] = Field(default_factory=dict)
    refitted_heads: tuple[str, ...] = ()
    residuals: Residuals | None = None


class Parity(_Record):
    """How far a graph is from torch.

    Attributes:
        samples: compared; each counts for every run it takes part in.
        max_abs: largest difference of any output.
        relative: Euclidean norm of the differences over that of torch's values; the worst output's.
        agreement: share of samples and tasks, or of tokens, with the same highest logit; None for
            a graph without logits.
        tolerance: the largest ``relative`` that passes.
    """

    samples: int
    max_abs: float
    relative: float
    agreement: float | None
    tolerance: float


class GraphEntry(_Record):
    """One exported graph.

    Attributes:
        format: name of its format.
        part: of a model that needs several graphs, e.g. ``encoder``; empty for others.
        file: relative to the export's folder.
        bytes: size of the file, external data included.
        opset: of the ONNX standard's operators.
        low_bit: whether its format holds quantized layers; others are references.
        low_bit_nodes: nodes that multiply by a linear layer's codes in the graph onnxruntime runs.
        session_options: config entries that a session needs to compute as evaluated.
        parity: how far it is from torch.
        layers: what the format says of single layers.
        task_input: names of the tasks in the order that the graph's input ``task`` numbers them;
            empty where it has no such input.
    """

    format: str
    part: str
    file: str
    bytes: int
    opset: int
    low_bit: bool
    low_bit_nodes: int
    session_options: Mapping[str, str] = Field(alias="session_config")
    parity: Parity
    layers: Mapping[str, Any]
    task_input: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _written_before_low_bit(cls, content: Any) -> Any:
        """Earlier versions did not write ``low_bit``; their only other formats are these two."""
        if isinstance(content, dict) and "low_bit" not in content:
            return content | {"low_bit": content.get("format") not in ("fp32", "fp16")}
        return content


class ExportDetails(_Record):
    """What an export reports.

    Attributes:
        merge: of the merged model.
        target: name, reasons and limits of the deployment target, where one was given.
        classes: names by task, in label order; None where none are known.
        graphs: all files, in the order they were written.
        parity_inputs: what graphs were compared with torch on.
        tasks_without_parity: by task, why it gave no samples for that.
        codes: sha256 of every layer's codes, one byte per code, row by row.
        problem_types: by task, of heads that do not choose one of several classes.
    """

    merge: MergeDetails
    target: Mapping[str, Any] | None
    classes: Mapping[str, tuple[str, ...] | None]
    graphs: tuple[GraphEntry, ...]
    parity_inputs: Literal["calibration", "example"]
    tasks_without_parity: Mapping[str, str]
    codes: Mapping[str, str]
    problem_types: Mapping[str, ProblemType] = Field(default_factory=dict)


Details = TypeVar("Details", bound=_Record)


class Manifest(BaseModel, Generic[Details]):
    """What made a stage's folder.

    Attributes:
        stage: that wrote it.
        fingerprint: sha256 over stage, options and inputs; equal fingerprints mean equal outputs.
        recipe: the whole recipe, paths absolute, flags applied.
        inputs: sha256 by role, e.g. ``base``, ``expert:mnist``, ``merge``.
        outputs: sha256 by file name, of every file except the manifest and the model card.
        details: what the stage reports about its result.
        versions: of this package, Python and the libraries that shape the result.
        format_version: of this folder layout.
    """

    model_config = ConfigDict(frozen=True)

    stage: Stage
    fingerprint: str
    recipe: Recipe
    inputs: Mapping[str, str]
    outputs: Mapping[str, str] = Field(default_factory=dict)
    details: Details
    versions: Mapping[str, str] = Field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return plain data as the file holds it; details that were not reported are left out."""
        content = self.model_dump(mode="json", exclude={"details"})
        return content | {"details": self.reported}

    @property
    def reported(self) -> dict[str, Any]:
        """The details as plain data, without those that were not reported."""
        return self.details.model_dump(mode="json", exclude_unset=True, by_alias=True)

    @property
    def models(self) -> dict[str, str]:
        """Hashes of base and experts, which every stage hands on to the next."""
        return {
            role: digest
            for role, digest in self.inputs.items()
            if role == "base" or role.startswith("expert:")
        }


class MergeManifest(Manifest[MergeDetails]):
    """Manifest of a merged model."""

    stage: Literal["merge"] = "merge"
    details: MergeDetails = MergeDetails()


class QuantizeManifest(Manifest[QuantizeDetails]):
    """Manifest of a quantized model."""

    stage: Literal["quantize"] = "quantize"
    details: QuantizeDetails = QuantizeDetails()


class ExportManifest(Manifest[ExportDetails]):
    """Manifest of an export."""

    stage: Literal["export"] = "export"

    @property
    def graphs(self) -> tuple[GraphEntry, ...]:
        """All files, in the order they were written."""
        return self.details.graphs


AnyManifest = MergeManifest | QuantizeManifest | ExportManifest
_KINDS: dict[str, type[AnyManifest]] = {
    "merge": MergeManifest,
    "quantize": QuantizeManifest,
    "export": ExportManifest,
}


def fingerprint(stage: str, options: Any, inputs: Mapping[str, str]) -> str:
    """Return a sha256 over what decides a stage's result; ``options`` must be plain data."""
    content = [FORMAT_VERSION, __version__, stage, options, dict(sorted(inputs.items()))]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@overload
def read_manifest(folder: Path, stage: Literal["merge"]) -> MergeManifest: ...
@overload
def read_manifest(folder: Path, stage: Literal["quantize"]) -> QuantizeManifest: ...
@overload
def read_manifest(folder: Path, stage: Literal["export"]) -> ExportManifest: ...
@overload
def read_manifest(folder: Path, stage: Stage) -> AnyManifest: ...
def read_manifest(folder: Path, stage: Stage) -> AnyManifest:
    """Read the manifest of a stage's folder.

    Raises:
        RecipeError: no manifest, another stage's, or one this version cannot read.
    """
    file = folder / MANIFEST
    content = _read(folder, stage)
    content["recipe"] = parse_complete(content.get("recipe"), str(file))
    try:
        return _KINDS[stage].model_validate(content)
    except ValidationError as error:
        raise RecipeError(
            f"{file}: damaged, or written by another version of epmq-deploy"
        ) from error


def _read(folder: Path, stage: str) -> dict[str, Any]:
    """Read a manifest as plain data, and make sure that it is this stage's."""
    check_encoding(folder)
    file = folder / MANIFEST
    if not file.is_file():
        raise RecipeError(f"{folder}: no {MANIFEST}; expected the output of `epmq {stage}`")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        written_by, layout = content["stage"], content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{file}: not a manifest of epmq-deploy") from error
    if layout != FORMAT_VERSION:
        raise RecipeError(
            f"{file}: written in format version {layout}, this epmq-deploy reads "
            f"{FORMAT_VERSION}; run `epmq {stage}` again"
        )
    if written_by != stage:
        raise RecipeError(
            f"{folder} is the output of `epmq {written_by}`, but that of `epmq {stage}` is needed"
        )
    return dict(content)
