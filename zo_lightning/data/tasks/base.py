"""A classification task as a prompt: a template, the answers to choose from, and where the rows come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from zo_lightning.data.errors import DataError


class ClassificationTask:
    r"""Classification by prompting: the model picks the verbalizer that best continues the filled-in template.

    A task is data, so most are written in YAML alone::

        task:
          template: "{review}\nSentiment:"
          verbalizers: {negative: " bad", positive: " good"}

    A subclass is needed only where a row has to be changed first, see :meth:`prepare`.

    Args:
        template: The prompt in the syntax of :meth:`str.format`; every ``{name}`` is a column of the data. White space
            before the finished prompt is removed.
        verbalizers: What continues the prompt for each class, leading space included. As a list, its order is that of
            the integer labels 0, 1, ...; as a mapping, its keys are the labels found in the data.
        label_column: The column that holds the label.
        name: What messages call the task.
        class_names: One name for each class; by default the labels of a mapping, or the verbalizers of a list.
        columns: The columns that :meth:`prepare` reads, if they are not those of the template.
        hub: The dataset on the Hugging Face hub, for example ``nyu-mll/glue``; without one, a folder must be given.
        hub_config: The configuration of that dataset, for example ``sst2``.
        train_split: The split (or the stem of the file) to train and develop on.
        eval_split: The split (or the stem of the file) to evaluate on.
        small_dev: The number of development rows where the training split is too small for the number asked for;
            by default a fifth of it.

    Raises:
        DataError: If the template, the verbalizers or the class names make no sense.
    """

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
    ) -> None:
        self.name = name
        self.template = template
        self.label_column = label_column
        self.columns = list(columns) if columns is not None else _template_columns(template, name)
        self.hub = hub
        self.hub_config = hub_config
        self.train_split = train_split
        self.eval_split = eval_split
        self.small_dev = small_dev
        if isinstance(verbalizers, Mapping):
            self.verbalizers = list(verbalizers.values())
            self._labels: list[Any] = list(verbalizers.keys())
        else:
            self.verbalizers = list(verbalizers)
            self._labels = list(range(len(self.verbalizers)))
        self._check_verbalizers()
        self._index = {_label_key(label): index for index, label in enumerate(self._labels)}
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
        return self.template.format_map(self.prepare({column: row[column] for column in self.columns})).lstrip()

    def candidates(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The texts that may continue the prompt of a row, in the order of the classes: the verbalizers.

        Args:
            row: One row of the data. Tasks whose answers differ from row to row override this method.

        Returns:
            K texts.
        """
        return self.verbalizers

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
        index = self._index.get(_label_key(label))
        if index is None and isinstance(label, bool):
            index = self._index.get(_label_key(int(label)))
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


def _label_key(label: object) -> str:
    """Write a label as text, one way for all file formats."""
    if isinstance(label, bool):
        return str(label).lower()
    # A CSV column of integers with a gap is read as floats.
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label).strip()


def _template_columns(template: str, name: str) -> list[str]:
    """List the columns that a template names, each once, in order."""
    columns: dict[str, None] = {}
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise DataError(f"task {name!r}: cannot read the template {template!r}: {error}; write {{{{ for a {{") from error
    for field in fields:
        column = field.split(".")[0].split("[")[0]
        if not column or column.isdigit():
            raise DataError(f"task {name!r}: {{{field}}} in the template {template!r} names no column, write {{column}}")
        columns[column] = None
    if not columns:
        raise DataError(f"task {name!r}: the template {template!r} names no column; write for example {{text}}")
    return list(columns)
