"""Options of quantization: what every method has, and what those with calibration data have."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from epmq_deploy.options import (
    SEVERAL,
    Options,
    given_for,
    in_bytes,
    layers_from_text,
    texts_read_by,
)


def _kernel_group_size(value: int) -> int:
    """Refuse group sizes that no low-bit kernel runs."""
    if value != -1 and (value < 16 or value % 16):
        raise ValueError("must be a multiple of 16 (what low-bit kernels run) or -1")
    return value


Bits = Literal[2, 3, 4, 8]
GroupSize = Annotated[int, AfterValidator(_kernel_group_size)]


@dataclass(frozen=True)
class SolverSettings:
    """How codes of a layer are solved for.

    Attributes:
        refine: most sweeps over codes and scales after the solver.
        allow_fallback: round to nearest where the Hessian cannot be factored.
    """

    refine: int
    allow_fallback: bool


class LayerOptions(Options):
    """Options that may differ between layers; those not given are the same as for all layers."""

    bits: Bits | None = Field(None, description="bits per weight")
    group_size: GroupSize | None = Field(None, description="input columns that share a scale")
    symmetric: bool | None = Field(None, description="fix zero points at the middle code")

    @property
    def given(self) -> dict[str, Any]:
        """The options given."""
        return {name: value for name, value in self if value is not None}


class QuantizeOptions(Options):
    """Options every quantization method has."""

    method: str = Field(description="quantization method")
    bits: Bits = Field(4, description="bits per weight")
    group_size: GroupSize = Field(
        128, description="input columns that share a scale: a multiple of 16, or -1 per channel"
    )
    symmetric: bool = Field(
        False, description="fix zero points at the middle code instead of fitting them"
    )
    clip_search: bool = Field(
        True, description="shrink each group's range as long as that lowers its weighted error"
    )
    outer: bool = Field(
        True,
        description="also quantize embeddings and projections outside the blocks, to 8 bits",
    )
    skip: Annotated[tuple[str, ...], SEVERAL] = Field(
        (), description="layers to leave unquantized, as name patterns (*.mlp.fc2)"
    )
    layers: Annotated[dict[str, LayerOptions], texts_read_by(layers_from_text)] = Field(
        {},
        description="options that differ for some layers, by name pattern "
        "(*.mlp.fc2:bits=8,group_size=64)",
    )
    target_bits: float | None = Field(
        None,
        gt=0,
        le=8,
        description="choose bits per layer so that weights in the blocks have this many on average",
    )
    target_size: float | None = Field(
        None, gt=0, description="choose bits per layer so that quantized layers take this many MB"
    )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.target_bits is not None and self.target_size is not None:
            raise ValueError("give target_bits or target_size, not both")
        return self

    @property
    def deciding(self) -> dict[str, Any]:
        """The options that decide the codes, as plain data."""
        return self.model_dump(mode="json")

    @property
    def solver_settings(self) -> SolverSettings | None:
        """How codes are solved for; None to round every weight to nearest."""
        return None

    @property
    def refits_biases(self) -> bool:
        """Whether biases are fitted to the quantized weights."""
        return False

    def idle(self) -> dict[str, str]:
        """Return options that were given but have no effect next to the others, with the reason."""
        budgets = {"target_bits": self.target_bits, "target_size": self.target_size}
        for option, budget in budgets.items():
            if budget is not None and "bits" in self.model_fields_set:
                return {"bits": f"with quantize.{option}, which chooses bits by layer"}
        return {}

    def for_layer(self, name: str) -> Self:
        """Return these options as they apply to one layer; later patterns override earlier ones."""
        given = {pattern: options.given for pattern, options in self.layers.items()}
        update = given_for(given, name)
        return self.model_copy(update=update) if update else self

    def probing(self, bits: int) -> Self:
        """Return these options at another width, with nothing that takes long."""
        return self.model_copy(update={"bits": bits})

    def fixed_bits(self, name: str) -> int | None:
        """Return the bits that ``layers`` gives to one layer, or None."""
        given = {pattern: options.given for pattern, options in self.layers.items()}
        return given_for(given, name).get("bits")

    def skips(self, name: str) -> bool:
        """Whether a layer is left unquantized."""
        return any(fnmatchcase(name, pattern) for pattern in self.skip)


class CalibratedOptions(QuantizeOptions):
    """Options of every method that uses calibration data."""

    samples: int = Field(256, ge=1, description="calibration samples per task")
    seed: int = Field(0, description="seed of the choice of calibration samples")
    batch_size: int = Field(64, ge=1, description="samples per forward pass; no effect on accuracy")
    act_order: bool = Field(
        True, description="quantize columns by decreasing Hessian diagonal (static groups)"
    )
    refine: int = Field(
        1,
        ge=0,
        description="maximum number of sweeps of coordinate descent over codes and scales after "
        "the solver",
    )
    bias: Literal["joint", "after", "keep"] = Field(
        "after",
        description="fit biases jointly with the weights (joint), fit them afterwards to undo the "
        "mean shift that quantization causes (after), or leave them unchanged (keep)",
    )
    unpooled_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="weight, in the last block, of tokens that no head reads; default: 1, or the "
        "preset's",
    )
    products: Literal["auto", "float32", "bfloat16"] | None = Field(
        None,
        description="dtype for running blocks and multiplying activations (hidden states and sums "
        "stay float32); auto is bfloat16 where the processor has instructions for it, which is "
        "two to three times as fast; default: auto for epmq, float32 for other methods",
    )
    solver: Literal["float32", "float64"] | None = Field(
        None,
        description="dtype for factoring Hessians and choosing codes; default: float32 for epmq, "
        "whose anchor keeps Hessians well-conditioned, float64 for other methods",
    )
    cache_limit: float | None = Field(
        4.0, ge=0, description="GiB of activations held in memory; the rest goes to disk"
    )
    cache_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of activations stored between blocks; 16 bits halve the space"
    )
    allow_fallback: bool = Field(
        False,
        description="if a layer's Hessian cannot be factored, round it to nearest instead of "
        "failing",
    )

    @property
    def deciding(self) -> dict[str, Any]:
        """The options that decide the codes; where activations are kept does not."""
        return self.model_dump(mode="json", exclude={"cache_limit"})

    @property
    def cache_bytes(self) -> int | None:
        """``cache_limit`` in bytes, None for no limit."""
        return in_bytes(self.cache_limit)

    @property
    def solver_settings(self) -> SolverSettings | None:
        """How codes are solved for."""
        return SolverSettings(self.refine, self.allow_fallback)

    @property
    def refits_biases(self) -> bool:
        """Whether biases are fitted to the quantized weights."""
        return self.bias != "keep"

    def probing(self, bits: int) -> Self:
        """Return these options at another width, without refinement."""
        return self.model_copy(update={"bits": bits, "refine": 0})
