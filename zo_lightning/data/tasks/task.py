"""What every task has: a prompt, and where its rows come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from zo_lightning.data.tasks.template import template_columns

__all__ = ["CandidateTask", "Task"]


class Task(ABC):
    """A prompt to be continued, and what the right continuation is.

    Args:
        template: The prompt in the syntax of :meth:`str.format`; every ``{name}`` is a column of the data. White space
            before the finished prompt is removed.
        name: What messages call the task.
        columns: The columns that :meth:`prepare` reads, if they are not those of the template.
        hub: The dataset on the Hugging Face hub, for example ``nyu-mll/glue``; without one, a folder must be given.
        hub_config: The configuration of that dataset, for example ``sst2``.
        train_split: The split (or the stem of the file) to train and develop on.
        eval_split: The split (or the stem of the file) to evaluate on.
        small_dev: The number of development rows where the training split is too small for the number asked for;
            by default a fifth of it.
        neutral_template: The prompt without what it is about, against which calibrated scores are taken (as in
            surface-form competition); by default what of the template follows its last column.

    Raises:
        DataError: If the template cannot be read.
    """

    #: ``classification``, ``multiple_choice`` or ``generation``.
    kind: ClassVar[str]

    def __init__(
        self,
        template: str,
        name: str = "custom",
        columns: list[str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        train_split: str = "train",
        eval_split: str = "validation",
        small_dev: int | None = None,
        neutral_template: str | None = None,
    ) -> None:
        self.name = name
        self.template = template
        self.columns = list(columns) if columns is not None else template_columns(template, name)
        self.hub = hub
        self.hub_config = hub_config
        self.train_split = train_split
        self.eval_split = eval_split
        self.small_dev = small_dev
        self.neutral_template = template.rpartition("}")[2] if neutral_template is None else neutral_template
        neutral_columns = template_columns(self.neutral_template, name, "neutral_template", required=False)
        if columns is None:
            self.columns += [column for column in neutral_columns if column not in self.columns]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, template={self.template!r})"

    @property
    @abstractmethod
    def target_columns(self) -> list[str]:
        """The columns that say what is right."""

    @abstractmethod
    def candidates(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The texts that may continue the prompt of a row, leading space included.

        Args:
            row: One row of the data.

        Returns:
            K texts; for a generation task the one to train on.
        """

    @abstractmethod
    def gold(self, row: Mapping[str, Any]) -> list[int]:
        """Which of a row's candidates are right; the first of them is trained on.

        Args:
            row: One row of the data.

        Returns:
            One number or more, each from 0 to K − 1.

        Raises:
            DataError: If the row does not say.
        """

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Change a row before it fills the template; the row itself by default.

        Args:
            row: The task's columns of one row; the dictionary is the method's own to change.

        Returns:
            What the template's names stand for.
        """
        return row

    def prompt(self, row: Mapping[str, Any]) -> str:
        """Fill the template with a row.

        Args:
            row: One row of the data, holding at least :attr:`columns`.

        Returns:
            The prompt, without white space in front (as in MeZO; a leading line break would be a token of its own).
        """
        return self._filled(self.template, row)

    def neutral_prompt(self, row: Mapping[str, Any]) -> str:
        """The prompt that calibrated scores of a row are taken against.

        Args:
            row: One row of the data.

        Returns:
            The prompt, empty where nothing is left of it.
        """
        return self._filled(self.neutral_template, row)

    def _filled(self, template: str, row: Mapping[str, Any]) -> str:
        return template.format_map(self.prepare({column: row[column] for column in self.columns})).lstrip()


class CandidateTask(Task, ABC):
    """A task whose answer is one of the candidates of its row."""
