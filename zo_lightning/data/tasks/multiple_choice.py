"""A multiple-choice task as a prompt: a template, and the columns that hold the choices of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zo_lightning.data.errors import DataError
from zo_lightning.data.tasks.task import CandidateTask
from zo_lightning.data.tasks.template import label_key

__all__ = ["MultipleChoiceTask"]


class MultipleChoiceTask(CandidateTask):
    r"""Multiple choice by prompting: the model picks the choice, a free text, that best continues the filled-in template.

    A task is data, so most are written in YAML alone::

        task:
          template: "Question: {question}\nAnswer:"
          choices: [option_a, option_b, option_c]
          labels: [A, B, C]
          label_column: answer

    Args:
        template: See :class:`Task`.
        choices: The columns that hold the choices, one each; or the one column that holds a list of them, whose length
            may differ from row to row.
        label_column: The column that says which choice is right.
        labels: What that column holds for the first choice, the second, ...; by default 0, 1, ...
        candidate: What continues the prompt for a choice, leading space included; ``{choice}`` is the choice.
        name: See :class:`Task`.
        columns: See :class:`Task`.
        hub: See :class:`Task`.
        hub_config: See :class:`Task`.
        train_split: See :class:`Task`.
        eval_split: See :class:`Task`.
        small_dev: See :class:`Task`.
        neutral_template: See :class:`Task`.

    Raises:
        DataError: If the template, the choices or the labels make no sense.
    """

    kind = "multiple_choice"

    def __init__(
        self,
        template: str,
        choices: list[str] | str,
        label_column: str = "label",
        labels: list[Any] | None = None,
        candidate: str = " {choice}",
        name: str = "custom",
        columns: list[str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        train_split: str = "train",
        eval_split: str = "validation",
        small_dev: int | None = None,
        neutral_template: str | None = None,
    ) -> None:
        super().__init__(template, name, columns, hub, hub_config, train_split, eval_split, small_dev, neutral_template)
        self.choices = choices
        self.label_column = label_column
        self.labels = labels
        self.candidate = candidate

    @property
    def target_columns(self) -> list[str]:
        """The columns of the choices and of the label."""
        return [*([self.choices] if isinstance(self.choices, str) else self.choices), self.label_column]

    def candidates(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The choices of a row, each as it continues the prompt."""
        choices = row[self.choices] if isinstance(self.choices, str) else [row[column] for column in self.choices]
        return [self.candidate.format(choice=choice) for choice in choices]

    def gold(self, row: Mapping[str, Any]) -> list[int]:
        """The right choice of a row."""
        known = list(range(len(self.candidates(row)))) if self.labels is None else self.labels
        keys = [label_key(label) for label in known]
        key = label_key(row[self.label_column])
        if key not in keys:
            raise DataError(f"unknown label {row[self.label_column]!r} in column {self.label_column!r}, expected {known}")
        return [keys.index(key)]
