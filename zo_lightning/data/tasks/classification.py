"""A classification task as a prompt: a template, the answers to choose from, and where the rows come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zo_lightning.data.errors import DataError
from zo_lightning.data.tasks.task import CandidateTask
from zo_lightning.data.tasks.template import label_key

__all__ = ["ClassificationTask"]


class ClassificationTask(CandidateTask):
    r"""Classification by prompting: the model picks the verbalizer that best continues the filled-in template.

    A task is data, so most are written in YAML alone::

        task:
          template: "{review}\nSentiment:"
          verbalizers: {negative: " bad", positive: " good"}

    A subclass is needed only where a row has to be changed first, see :meth:`prepare`.

    Args:
        template: See :class:`Task`.
        verbalizers: What continues the prompt for each class, leading space included. As a list, its order is that of
            the integer labels 0, 1, ...; as a mapping, its keys are the labels found in the data.
        label_column: The column that holds the label.
        name: See :class:`Task`.
        class_names: One name for each class; by default the labels of a mapping, or the verbalizers of a list.
        columns: See :class:`Task`.
        hub: See :class:`Task`.
        hub_config: See :class:`Task`.
        train_split: See :class:`Task`.
        eval_split: See :class:`Task`.
        small_dev: See :class:`Task`.
        neutral_template: See :class:`Task`.

    Raises:
        DataError: If the template, the verbalizers or the class names make no sense.
    """

    kind = "classification"

    def __init__(
        self,
        template: str,
        verbalizers: list[str] | dict[str, str],
        label_column: str = "label",
        name: str = "custom",
        class_names: list[str] | None = None,
        columns: list[str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        train_split: str = "train",
        eval_split: str = "validation",
        small_dev: int | None = None,
        neutral_template: str | None = None,
    ) -> None:
        super().__init__(template, name, columns, hub, hub_config, train_split, eval_split, small_dev, neutral_template)
        self.label_column = label_column
        if isinstance(verbalizers, Mapping):
            self.verbalizers = list(verbalizers.values())
            self._labels: list[Any] = list(verbalizers.keys())
        else:
            self.verbalizers = list(verbalizers)
            self._labels = list(range(len(self.verbalizers)))
        self._check_verbalizers()
        self._index = {label_key(label): index for index, label in enumerate(self._labels)}
        if len(self._index) != len(self._labels):
            raise DataError(f"task {name!r}: two of the labels {self._labels} are the same once written as text")
        if class_names is None:
            from_labels = isinstance(verbalizers, Mapping)
            class_names = [str(label) for label in self._labels] if from_labels else [v.strip() for v in verbalizers]
        if len(class_names) != len(self.verbalizers):
            raise DataError(f"task {name!r}: {len(class_names)} class_names for {len(self.verbalizers)} verbalizers")
        self.class_names = list(class_names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, template={self.template!r}, verbalizers={self.verbalizers})"

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return len(self.verbalizers)

    @property
    def target_columns(self) -> list[str]:
        """The label's column."""
        return [self.label_column]

    def candidates(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The texts that may continue the prompt of a row, in the order of the classes: the verbalizers.

        Args:
            row: One row of the data. Tasks whose answers differ from row to row override this method.

        Returns:
            K texts.
        """
        return self.verbalizers

    def gold(self, row: Mapping[str, Any]) -> list[int]:
        """The class of a row; see :meth:`label_index`."""
        return [self.label_index(row[self.label_column])]

    def label_index(self, label: object) -> int:
        """Find the class that a label of the data stands for.

        ``True`` and ``1`` are one label for integer classes, and text is compared without white space around it, so
        that a CSV file and a parquet file of the same rows agree.

        Args:
            label: The value found in :attr:`label_column`.

        Returns:
            The class, from 0 to K − 1.

        Raises:
            DataError: If no class has this label.
        """
        index = self._index.get(label_key(label))
        if index is None and isinstance(label, bool):
            index = self._index.get(label_key(int(label)))
        if index is None:
            # YAML 1.1 reads an unquoted yes/no/on/off as a boolean: the commonest reason for text labels not to match.
            booleans = any(isinstance(known, bool) for known in self._labels) and isinstance(label, str)
            hint = "; quote labels such as 'yes' and 'no' in YAML" if booleans else ""
            raise DataError(f"unknown label {label!r} in column {self.label_column!r}, expected {self._labels}{hint}")
        return index

    def _check_verbalizers(self) -> None:
        if len(self.verbalizers) < 2:
            raise DataError(f"task {self.name!r}: at least two verbalizers are needed, got {self.verbalizers}")
        for label, text in zip(self._labels, self.verbalizers, strict=True):
            if not isinstance(text, str):
                raise DataError(
                    f"task {self.name!r}: the verbalizer of {label!r} is {text!r} and not text; "
                    "quote words such as 'yes' and 'no' in YAML"
                )
            if not text.strip():
                raise DataError(f"task {self.name!r}: the verbalizer of {label!r} is empty: {text!r}")
