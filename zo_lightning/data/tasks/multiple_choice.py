"""A multiple-choice task as a prompt: a template, and the columns that hold the choices of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zo_lightning.data.errors import DataError
from zo_lightning.data.tasks.task import CandidateTask
from zo_lightning.data.tasks.template import label_key, template_columns

__all__ = ["MultipleChoiceTask"]


class MultipleChoiceTask(CandidateTask):
    r"""Multiple choice by prompting: the model picks the choice, a free text, that best continues the filled-in template.

    A task is data, so most are written in YAML alone::

        task:
          template: "Question: {question}\nAnswer:"
          choices: [option_a, option_b, option_c]
          labels: [A, B, C]
          label_column: answer

    Where the choices of a row are a list, their number may differ from row to row; a dotted path reaches into a mapping, as
    in ARC, whose column ``choices`` is ``{text: [...], label: [...]}``::

        task:
          template: "Question: {question}\nAnswer:"
          choices: choices.text
          labels: choices.label
          label_column: answerKey

    Args:
        template: See :class:`Task`.
        choices: The columns that hold the choices, one each; or the one column that holds a list of them. White space around
            a choice is removed.
        label_column: The column that says which choice is right: by its label or, where that cannot be mistaken, by its text.
        labels: What that column holds for the first choice, the second, ...: a list, or the column that holds one; by default
            0, 1, ...
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
        labels: list[Any] | str | None = None,
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
        self.choices = choices if isinstance(choices, str) else list(choices)
        self.label_column = label_column
        self.labels = labels if labels is None or isinstance(labels, str) else list(labels)
        self.candidate = candidate
        self._check()

    @property
    def target_columns(self) -> list[str]:
        """The columns of the choices, of their labels where the data holds them, and of the right one's label."""
        paths = [self.choices] if isinstance(self.choices, str) else list(self.choices)
        if isinstance(self.labels, str):
            paths.append(self.labels)
        return list(dict.fromkeys(path.partition(".")[0] for path in [*paths, self.label_column]))

    def texts(self, row: Mapping[str, Any]) -> list[str]:
        """The choices of a row, as they stand there.

        Args:
            row: One row of the data.

        Returns:
            K texts, two or more, without white space around them.

        Raises:
            DataError: If the row has fewer than two choices, or an empty one.
        """
        if isinstance(self.choices, str):
            found = _list_at(row, self.choices, "choices are given as `choices: [column_a, column_b]` where each has its own")
        else:
            found = [_at(row, column) for column in self.choices]
        if len(found) < 2:
            raise DataError(f"{len(found)} choices in column {self.choices!r}, at least two are needed")
        for number, choice in enumerate(found):
            if choice is None or not str(choice).strip():
                where = self.choices if isinstance(self.choices, str) else self.choices[number]
                raise DataError(f"choice {number} (from 0) in column {where!r} is empty: {choice!r}; fill it or remove the row")
        return [str(choice).strip() for choice in found]

    def candidates(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The choices of a row, each as it continues the prompt.

        Args:
            row: One row of the data. Tasks that write their choices in another way override this method.

        Returns:
            K texts.

        Raises:
            DataError: See :meth:`texts`.
        """
        return [self.candidate.format(choice=text) for text in self.texts(row)]

    def gold(self, row: Mapping[str, Any]) -> list[int]:
        """The right choice of a row.

        As in a classification task, ``True`` and ``1`` are one label, and text is compared without white space around it.

        Args:
            row: One row of the data.

        Returns:
            One number, from 0 to K − 1.

        Raises:
            DataError: If the label is that of none of the row's choices, or could be that of two.
        """
        texts, label = self.texts(row), _at(row, self.label_column)
        known = self._labels(row, len(texts))
        keys = [label_key(one) for one in known]
        key = label_key(label)
        if key not in keys and isinstance(label, bool):
            key = label_key(int(label))
        found = [keys.index(key)] if key in keys else []
        named = [number for number, text in enumerate(texts) if isinstance(label, str) and text == key]
        if found and named and named != found and self.labels is None:
            raise DataError(
                f"the label {label!r} in column {self.label_column!r} is the number of choice {texts[found[0]]!r} and the text "
                "of another; say with `labels` what the column holds for each choice"
            )
        if not found and len(named) != 1:
            raise DataError(f"unknown label {label!r} in column {self.label_column!r}, expected {known}{_hint(label, known)}")
        return found or named

    def _labels(self, row: Mapping[str, Any], count: int) -> list[Any]:
        """The label of each of the choices of a row."""
        if self.labels is None:
            return list(range(count))
        if isinstance(self.labels, str):
            known = _list_at(row, self.labels, "the labels of all choices are needed, in their order")
            fits = len(known) == count
        else:
            known = self.labels[:count]  # A to E, of which a row may have but four
            fits = len(known) >= count
        if not fits:
            raise DataError(f"{len(known)} labels {known} for {count} choices")
        return known

    def _check(self) -> None:
        if isinstance(self.choices, list):
            for column in self.choices:
                if not isinstance(column, str):
                    raise DataError(
                        f"task {self.name!r}: {column!r} in `choices` is no column; quote words such as 'yes' and 'no' in YAML"
                    )
            if len(set(self.choices)) < len(self.choices):
                twice = next(column for column in self.choices if self.choices.count(column) > 1)
                raise DataError(f"task {self.name!r}: the column {twice!r} is there twice in `choices` {self.choices}")
            if len(self.choices) < 2:
                raise DataError(
                    f"task {self.name!r}: `choices` {self.choices} names {len(self.choices)} columns, at least two are needed; "
                    "a column that holds a list is given as `choices: column`"
                )
        elif not self.choices:
            raise DataError(f"task {self.name!r}: `choices` names no column")
        if isinstance(self.labels, list):
            if len({label_key(label) for label in self.labels}) < len(self.labels):
                raise DataError(f"task {self.name!r}: two of the labels {self.labels} are the same once written as text")
            if isinstance(self.choices, list) and len(self.labels) != len(self.choices):
                raise DataError(f"task {self.name!r}: {len(self.labels)} labels for {len(self.choices)} choices")
        if template_columns(self.candidate, self.name, "candidate", required=False) != ["choice"]:
            raise DataError(f"task {self.name!r}: the candidate {self.candidate!r} needs {{choice}}, and no other name")


def _at(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or what a dotted path finds in it; of a list of mappings, that of each."""
    column, *keys = path.split(".")
    value = row[column]
    try:
        for key in keys:
            value = [item[key] for item in value] if isinstance(value, list) else value[key]
    except (KeyError, TypeError):
        raise DataError(f"column {column!r} holds {value!r}, in which there is no {path!r}") from None
    return value


def _list_at(row: Mapping[str, Any], path: str, hint: str) -> list[Any]:
    value = _at(row, path)
    if not isinstance(value, list):
        raise DataError(f"column {path!r} holds {value!r} and no list; {hint}")
    return value


def _hint(label: object, known: list[Any]) -> str:
    if label is None or label == -1 or label == "":
        return "; a row whose label was never published has none, use another split"
    # YAML 1.1 reads an unquoted yes/no/on/off as a boolean
    if isinstance(label, str) and any(isinstance(one, bool) for one in known):
        return "; quote labels such as 'yes' and 'no' in YAML"
    return ""
