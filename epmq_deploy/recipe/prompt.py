"""Tasks in words: the recipe's section for text generation."""

from string import Formatter

from pydantic import Field, field_validator, model_validator

from epmq_deploy.options import Options


class Prompt(Options):
    """How a task is put into words, for text generation."""

    template: str | None = Field(
        None,
        description="the input text, with {column} where a column of the data goes; default: the "
        "input column alone",
    )
    answers: tuple[str, ...] | None = Field(
        None, min_length=2, description="answers in label order; default: the labels themselves"
    )
    decimals: int | None = Field(
        None,
        ge=0,
        description="the answers are numbers with this many digits after the point; they are "
        "scored by Spearman's rank correlation instead of exact match",
    )
    max_tokens: int = Field(
        32,
        ge=1,
        description="longest pseudo-label that the expert generates, in tokens",
    )

    @field_validator("template")
    @classmethod
    def _names_columns(cls, template: str | None) -> str | None:
        if template is not None and not template_columns(template):
            raise ValueError("needs at least one {column}")
        return template

    @field_validator("answers")
    @classmethod
    def _differ(cls, answers: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if answers is not None and len(set(answers)) < len(answers):
            raise ValueError("answers must differ")
        return answers

    @model_validator(mode="after")
    def _listed_or_numbers(self) -> "Prompt":
        if self.answers is not None and self.decimals is not None:
            raise ValueError("answers are listed (answers) or numbers (decimals), not both")
        return self


def template_columns(template: str) -> tuple[str, ...]:
    """Return the columns a prompt's template names.

    Raises:
        ValueError: it has unbalanced braces, or more than a name between two.
    """
    parts = list(Formatter().parse(template))
    odd = any(
        name is not None and (spec or conversion or not name.isidentifier())
        for _, name, spec, conversion in parts
    )
    if odd:
        raise ValueError("only {column} may stand in braces; write {{ and }} for braces")
    return tuple(name for _, name, _, _ in parts if name is not None)
