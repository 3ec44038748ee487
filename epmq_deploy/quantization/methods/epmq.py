"""E-PMQ: aim each layer at its experts' outputs, anchored.

Preset ``paper`` is arXiv 2605.16882; preset ``features`` takes its target from feature calibration
(FeatCal, arXiv 2605.13030); preset ``outputs``, the default, aims at experts' own outputs alone,
held by a weaker anchor that lies further beyond the merged weights; preset ``weights`` needs no
calibration data (``WeightStatistics``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from epmq_deploy.lazy import torch
from epmq_deploy.options.quantization import CalibratedOptions
from epmq_deploy.quantization.anchored import anchored_problem
from epmq_deploy.quantization.arithmetic import Arithmetic
from epmq_deploy.quantization.base import (
    AnchorSearch,
    CalibratedMethod,
    CalibrationSettings,
    Candidate,
    LayerProblem,
    LayerWeights,
    SampleChoice,
)

if TYPE_CHECKING:
    from epmq_deploy.calibration.statistics import GroupSums, TaskStatistics
    from epmq_deploy.quantization.solver.hessian import GroupHessian


@dataclass(frozen=True)
class Preset:
    """Values of options that are not given.

    Attributes:
        anchor: lambda.
        alpha: share of the experts' own features in the target.
        rho: anchor between base (0), merged (1) and beyond.
        norms: re-fit norms.
        unpooled: weight, in the last block, of tokens that no head reads.
        data_free: take statistics from task vectors instead of calibration data.
    """

    anchor: float
    alpha: float
    rho: float
    norms: bool
    unpooled: float = 1.0
    data_free: bool = False


PRESETS = {
    "paper": Preset(anchor=0.05, alpha=0.0, rho=1.0, norms=False),
    "features": Preset(anchor=0.05, alpha=0.25, rho=2.2, norms=True),
    "outputs": Preset(anchor=0.02, alpha=1.0, rho=3.0, norms=True, unpooled=0.01),
    "weights": Preset(anchor=0.005, alpha=0.0, rho=1.0, norms=False, data_free=True),
}


# What effort ``balanced`` chooses among; the first is the default. How strong the anchor should be,
# and whether experts' outputs or their weights are the better aim, depends on the model. If a
# stronger anchor helps, so may staying close to the merged weights; if not, a weaker one may.
_CHOICES: tuple[tuple[dict[str, float | str], bool | None], ...] = (
    ({"preset": "outputs", "anchor": 0.02}, None),
    ({"preset": "outputs", "anchor": 0.08}, None),
    ({"preset": "features", "anchor": 0.05}, True),
    ({"preset": "outputs", "anchor": 0.00125}, False),
)
# How strongly heads are held when they are re-fitted and nothing was chosen.
_HEAD_PULL = 0.1
# Epochs of training all weights with effort ``best``.
_BEST_EPOCHS = 12
# Options on how calibration data are chosen, run through the model, cached and used.
_OF_DATA = (
    "samples",
    "seed",
    "batch_size",
    "bias",
    "unpooled_weight",
    "products",
    "cache_limit",
    "cache_dtype",
)


class EpmqOptions(CalibratedOptions):
    """E-PMQ."""

    method: Literal["epmq"] = "epmq"
    effort: Literal["fast", "balanced", "best"] | None = Field(
        None,
        description="one pass with the preset's values (fast); choose preset, anchor, alpha, rho "
        "and how heads are re-fitted on held-back calibration samples first (balanced); and distil "
        "all weights from the experts afterwards (best); default: balanced, or fast where a preset "
        "is given",
    )
    preset: Literal["paper", "features", "outputs", "weights"] | None = Field(
        None,
        description="aim at the experts' weights on the student's inputs (paper), mix in the "
        "experts' own outputs (features), aim at those alone (outputs), or take statistics from "
        "task vectors where there is no calibration data (weights); sets anchor, alpha, rho, norms "
        "and unpooled_weight unless given; default: outputs, or what the effort chooses",
    )
    anchor: float | Literal["auto"] | None = Field(
        None,
        description="lambda, the pull towards the anchor weights, also the damping; auto chooses "
        "it on held-back calibration samples",
    )
    alpha: float | None = Field(
        None, ge=0, le=1, description="share of the experts' own features in the target"
    )
    rho: float | None = Field(
        None, description="anchor weights: rho * merged + (1 - rho) * base; 1 is the merged model"
    )
    norms: bool | None = Field(
        None, description="re-fit LayerNorm gains and biases towards the experts' outputs"
    )
    guidance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="power of tokens' squared gradients (of the divergence from the expert, in the "
        "merged model) in their weights: 0 weighs all tokens alike, 0.5 suits most models; a "
        "classifier needs every task's head",
    )
    distill: int = Field(
        0,
        ge=0,
        description="epochs of tuning scales, biases and norms end to end, codes fixed, towards "
        "the experts' predictions on the calibration samples; a classifier needs every task's head",
    )
    heads: Literal["refit", "keep"] | None = Field(
        None,
        description="fit each task's classifier anew to the quantized model, towards its expert's "
        "predictions (refit), or leave heads as they are (keep); default: what the effort chooses, "
        "keep with effort fast",
    )
    distill_weights: int | None = Field(
        None,
        ge=0,
        description="epochs of training all weights end to end, before they are quantized, towards "
        "the experts' predictions on augmented calibration samples, one in eight of which is held "
        "back to judge the result; a classifier needs every task's head; default: 12 with effort "
        "best, else 0",
    )
    residual_rank: int = Field(
        0,
        ge=0,
        description="rank of a correction of each layer for every task, stored in 4 bits next to "
        "the codes; graphs get an input that says which task a sample belongs to; 0 for none",
    )
    normalization: Literal["frobenius", "none"] = Field(
        "frobenius", description="weigh each task by 1 / ||C_t||_F, or all tasks alike"
    )

    @field_validator("anchor", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        """Report a value that is neither in one message."""
        if value is None or value == "auto":
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = 0.0
        if not number > 0:
            raise ValueError("must be a positive number or auto")
        return number

    @property
    def effort_in_use(self) -> Literal["fast", "balanced", "best"]:
        """The effort given; otherwise fast where a preset or ``anchor: auto`` is, else balanced."""
        if self.effort is not None:
            return self.effort
        return "balanced" if self.preset is None and self.anchor != "auto" else "fast"

    @property
    def weight_epochs(self) -> int:
        """``distill_weights`` where it is given, else what the effort says."""
        if self.distill_weights is None:
            return _BEST_EPOCHS if self.effort_in_use == "best" else 0
        return self.distill_weights

    @property
    def values(self) -> Preset:
        """Options as given, else the preset's."""
        preset = PRESETS[self.preset or "outputs"]
        return Preset(
            anchor=self.anchor if isinstance(self.anchor, float) else preset.anchor,
            alpha=preset.alpha if self.alpha is None else self.alpha,
            rho=preset.rho if self.rho is None else self.rho,
            norms=preset.norms if self.norms is None else self.norms,
            unpooled=preset.unpooled if self.unpooled_weight is None else self.unpooled_weight,
            data_free=preset.data_free,
        )

    @model_validator(mode="after")
    def _data_free_means_no_activations(self) -> EpmqOptions:
        asked = self.alpha or self.norms or self.distill or self.guidance or self.distill_weights
        asked = asked or self.heads == "refit" or self.effort_in_use != "fast"
        if self.preset == "weights" and asked:
            raise ValueError(
                "preset weights has no calibration data: leave out alpha, norms, distill, "
                "distill_weights, guidance, heads: refit and efforts other than fast"
            )
        return self

    @model_validator(mode="after")
    def _effort_chooses_the_anchor(self) -> EpmqOptions:
        if self.anchor == "auto" and self.effort_in_use != "fast":
            raise ValueError(f"effort {self.effort} chooses the anchor: leave out anchor: auto")
        return self

    def idle(self) -> dict[str, str]:
        """Return options without effect; with preset ``weights``, those on calibration data."""
        reasons = super().idle()
        if self.values.data_free:
            given = [name for name in _OF_DATA if name in self.model_fields_set]
            reason = f"with quantize.preset: {self.preset}, which uses no calibration data"
            reasons |= dict.fromkeys(given, reason)
            if self.anchor == "auto":
                reasons["anchor"] = f"as auto {reason}"
        return reasons

    @property
    def deciding(self) -> dict[str, Any]:
        """The options that decide the codes; without corrections, as before there were any."""
        return {
            name: value
            for name, value in super().deciding.items()
            if name != "residual_rank" or value
        }

    @model_validator(mode="after")
    def _residuals_are_fitted_last(self) -> EpmqOptions:
        later = self.distill or self.heads == "refit" or self.weight_epochs
        if self.residual_rank and later:
            raise ValueError(
                "residual_rank corrects layers of the merged model as calibration leaves it: leave "
                "out distill, distill_weights, effort: best and heads: refit"
            )
        return self

    @model_validator(mode="after")
    def _distillation_is_not_held(self) -> EpmqOptions:
        trained = "effort: best" if self.distill_weights is None else "distill_weights"
        asked = {"distill": self.distill, trained: self.weight_epochs}
        for option, epochs in asked.items():
            if epochs and (self.bias == "keep" or self.norms is False):
                raise ValueError(
                    f"{option} tunes biases and norms: leave out bias: keep, norms: false"
                )
        return self


class Epmq(CalibratedMethod[EpmqOptions]):
    """``Y_t = ((1 - alpha) X_t + alpha Z_t) W_t^T``, anchor ``rho W_m + (1 - rho) W_b``.

    ``X_t`` are the student's inputs of the layer, ``Z_t`` the expert's own.
    """

    options = EpmqOptions
    summary = "aim at the experts' outputs, anchored at the merged weights"
    source = "E-PMQ, arXiv 2605.16882"
    uses_experts = True
    # The anchor keeps Hessians well-conditioned: the fast arithmetic does not show in accuracy.
    arithmetic = Arithmetic("auto", "float32")

    def samples(self, options: EpmqOptions) -> SampleChoice | None:
        """Return the choice that the options make; None with preset ``weights``."""
        return None if self.is_data_free(options) else super().samples(options)

    def is_data_free(self, options: EpmqOptions) -> bool:
        """Return whether the preset is ``weights``."""
        return options.values.data_free

    def needs_heads(self, options: EpmqOptions) -> list[str]:
        """Return what compares predictions with the experts'."""
        asked = {
            "anchor: auto": options.anchor == "auto",
            f"effort: {options.effort}": options.effort not in (None, "fast"),
            "heads: refit": options.heads == "refit",
            "distill_weights": bool(options.distill_weights),
            "distill": options.distill > 0,
            "guidance": options.guidance > 0,
        }
        return [option for option, given in asked.items() if given]

    def compares_predictions(self, options: EpmqOptions) -> bool:
        """Return whether the effort chooses anything, or something else needs heads."""
        return options.effort_in_use != "fast" or super().compares_predictions(options)

    def candidates(self, options: EpmqOptions) -> tuple[Candidate[EpmqOptions], ...]:
        """Return what the effort chooses among; options that are given stay as they are."""
        if options.effort_in_use == "fast":
            return ()
        candidates: dict[Preset, Candidate[EpmqOptions]] = {}
        given = {name: getattr(options, name) for name in options.model_fields_set}
        for choice, if_second_helps in _CHOICES:
            if options.preset is not None and choice["preset"] != options.preset:
                choice = {"preset": options.preset}
            update = {name: value for name, value in choice.items() if given.get(name) is None}
            candidate = options.model_copy(update=update)
            settings = {name: getattr(candidate, name) for name in choice}
            candidates.setdefault(candidate.values, Candidate(settings, candidate, if_second_helps))
        return tuple(candidates.values())

    def may_refit_heads(self, options: EpmqOptions) -> bool:
        """Return whether the options leave it open."""
        return options.heads != "keep"

    def head_pull(self, options: EpmqOptions) -> float | None:
        """Return the usual pull for ``heads: refit``."""
        return _HEAD_PULL if options.heads == "refit" else None

    def anchor_search(self, options: EpmqOptions) -> AnchorSearch[EpmqOptions] | None:
        """Return a search from the preset's strength for ``anchor: auto``."""
        if options.anchor != "auto":
            return None
        return AnchorSearch(
            options.values.anchor, lambda strength: options.model_copy(update={"anchor": strength})
        )

    def weight_distillation_epochs(self, options: EpmqOptions) -> int:
        """Return what ``distill_weights`` says, or what effort ``best`` does."""
        return options.weight_epochs

    def distillation_epochs(self, options: EpmqOptions) -> int:
        """Return what ``distill`` says."""
        return options.distill

    def residual_rank(self, options: EpmqOptions) -> int:
        """Return what ``residual_rank`` says."""
        return options.residual_rank

    def calibration(self, options: EpmqOptions) -> CalibrationSettings:
        """Return what options and preset say; norms aim at the same mix as linear layers."""
        values = options.values
        return replace(
            super().calibration(options),
            unpooled=values.unpooled,
            mix=values.alpha,
            norm_mix=values.alpha if values.norms else None,
            norm_damping=values.anchor,
            guidance=options.guidance,
        )

    def task_weight(self, statistics: TaskStatistics, options: EpmqOptions) -> float:
        """Return ``1 / ||C_t||_F``, so that activations' sizes do not decide between tasks."""
        if options.normalization == "none":
            return 1.0
        size = float(statistics.gram.norm())
        # A task whose inputs are all zero says nothing about the layer.
        return 1.0 / size if size > 0 else 0.0

    def damping(self, sums: GroupSums, options: EpmqOptions) -> float:
        """Return lambda: the anchor is the damping."""
        return options.values.anchor

    def bias_damping(self, options: EpmqOptions) -> float:
        """Return lambda: biases are pulled as strongly as weights."""
        return options.values.anchor

    def problem(
        self, layer: LayerWeights, sums: GroupSums, hessian: GroupHessian, options: EpmqOptions
    ) -> LayerProblem:
        """Return the problem anchored at, or beyond, the merged weights."""
        rho = options.values.rho
        dtype = hessian.plain.matrix.dtype
        anchor, bias = layer.merged.to(dtype), layer.bias
        if rho != 1:
            if layer.base is None:
                raise ValueError(f"layer {layer.name}: rho needs the base's weights")
            anchor = torch.lerp(layer.base.to(dtype), anchor, rho)
            if bias is not None and layer.base_bias is not None:
                bias = torch.lerp(layer.base_bias.to(torch.float64), bias.to(torch.float64), rho)
        return anchored_problem(
            layer,
            sums,
            hessian,
            anchor,
            bias,
            strength=self.damping(sums, options),
            bias_strength=self.bias_damping(options),
            joint=self.fits_jointly(layer, options),
        )


METHOD = Epmq()
