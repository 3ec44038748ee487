"""Prompts: from rows of data to what a model reads and the answer it should generate."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import LABEL_COLUMN
from epmq_deploy.recipe.prompt import Prompt, template_columns


@dataclass(frozen=True)
class PromptFormat:
    """How rows become texts and answers.

    Attributes:
        template: with ``{column}`` where a column's text goes.
        label_column: holds integers where there are ``answers``, numbers where there are
            ``decimals``, else the answers themselves; None where the data have no labels.
        answers: in label order.
        decimals: of answers that are numbers.
        max_tokens: longest pseudo-label that an expert generates.
    """

    template: str
    label_column: str | None
    answers: tuple[str, ...] | None
    decimals: int | None
    max_tokens: int

    @classmethod
    def of(
        cls,
        prompt: Prompt | None,
        input_column: str,
        label_column: str | None,
        columns: Collection[str],
        where: str,
        *,
        labelled: bool = True,
    ) -> "PromptFormat":
        """Return the format of a data source.

        Args:
            prompt: the task's.
            input_column: read where the prompt has no template.
            label_column: the data source's.
            columns: that the data have.
            where: what to call the data in messages.
            labelled: whether there must be labels. Otherwise ``label_column`` may be None, or a
                column of that default name may be missing.

        Raises:
            RecipeError: a column is missing.
        """
        if not labelled and label_column == LABEL_COLUMN and label_column not in columns:
            label_column = None
        prompt = prompt or Prompt()
        template = prompt.template or f"{{{input_column}}}"
        if labelled and label_column is None:
            raise RecipeError(f"{where}: answers are needed, but label_column is not set")
        needed = [*template_columns(template), *([] if label_column is None else [label_column])]
        missing = [name for name in needed if name not in columns]
        if missing:
            raise RecipeError(
                f"{where} has no column {', '.join(map(repr, missing))}; it has "
                f"{', '.join(columns)}"
            )
        return cls(template, label_column, prompt.answers, prompt.decimals, prompt.max_tokens)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that must hold texts."""
        read = template_columns(self.template)
        listed = self.answers is not None or self.decimals is not None
        if listed or self.label_column is None:
            return read
        return (*read, self.label_column)

    def check_labels(self, labels: Sequence[Any], where: str) -> None:
        """Make sure that every label has an answer, where it is not one itself.

        Args:
            labels: of all rows.
            where: what to call the data in messages.

        Raises:
            RecipeError: names the first row whose label has none.
        """
        for row, label in enumerate(labels):
            if self.decimals is not None and not _is_number(label):
                raise RecipeError(
                    f"{where}: row {row}: column {self.label_column!r} holds {label!r}, but with "
                    "prompt.decimals labels must be numbers"
                )
            if self.answers is None:
                continue
            whole = isinstance(label, int) and not isinstance(label, bool)
            if not whole or not 0 <= label < len(self.answers):
                raise RecipeError(
                    f"{where}: row {row}: column {self.label_column!r} holds {label!r}, but "
                    f"prompt.answers has answers for 0 to {len(self.answers) - 1}"
                )

    def text(self, row: Mapping[str, Any]) -> str:
        """Return what the model reads."""
        texts = {name: row[name] for name in template_columns(self.template)}
        return self.template.format_map(texts)

    def answer(self, row: Mapping[str, Any]) -> str:
        """Return the answer that the row's label stands for."""
        assert self.label_column is not None, "only asked where there are labels"
        label = row[self.label_column]
        if self.decimals is not None:
            return f"{label:.{self.decimals}f}"
        answer: str = label if self.answers is None else self.answers[label]
        return answer


def _is_number(label: Any) -> bool:
    return isinstance(label, int | float) and not isinstance(label, bool) and math.isfinite(label)
