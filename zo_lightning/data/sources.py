"""Reading a task's rows, from the Hugging Face hub or from a folder, and checking that they can be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
from numpy.typing import NDArray

from zo_lightning.data.errors import DataError
from zo_lightning.data.splits import Rows
from zo_lightning.data.tasks import ClassificationTask, Task

Read = TypeVar("Read")

# Extension -> the builder of `datasets` that reads it, and the builder's options.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    # Texts such as "NA" and "None" are words, not gaps.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
}


class SourceSplit(NamedTuple):
    """The rows of one split, and where they come from.

    Attributes:
        rows: The rows, with at least the columns of the task's prompt and target.
        labels: The class of every row, int64 of shape (n,); None for a task without classes.
        origin: What messages call the source: the file, or the dataset with its split.
    """

    rows: datasets.Dataset
    labels: NDArray[np.int64] | None
    origin: str

    def row(self, number: int) -> str:
        """What messages call a row."""
        return f"row {number} (from 0) of {self.origin}"


def load_split(task: Task, split: str, data_dir: str | Path | None = None) -> SourceSplit:
    """Read one split of a task and check its columns and labels.

    Args:
        task: The task.
        split: The name of the split, or the stem of its file: ``train``, ``validation``.
        data_dir: A folder with ``<split>.jsonl`` (or .json, .parquet, .csv, .tsv), or a local copy of a hub dataset.
            Without it, the task's dataset comes from the hub.

    Returns:
        The rows.

    Raises:
        DataError: If the source does not exist, cannot be reached or read, is empty, lacks a column, or holds a label
            that the task does not know.
    """
    rows, origin = _load_folder(task, split, Path(data_dir)) if data_dir is not None else _load_hub(task, split)
    _check_columns(task, rows, origin)
    labels = _read_labels(task, rows, origin) if isinstance(task, ClassificationTask) else None
    return SourceSplit(rows, labels, origin)


def read_rows(
    task: Task, source: SourceSplit, rows: Sequence[int] | Rows, read: Callable[[dict[str, Any]], Read]
) -> list[Read]:
    """Make something of rows of a source, with errors that name the row.

    Args:
        task: The task.
        source: The source split.
        rows: The row numbers to take, shape (n,).
        read: What to make of a row.

    Returns:
        What was made of the n rows, in their order.

    Raises:
        DataError: If a row has no value in one of the task's columns, or cannot be read.
    """
    made = []
    for number, row in zip(rows, source.rows.select(rows), strict=True):
        empty = [column for column in task.columns if row[column] is None]
        if empty:
            raise DataError(f"{source.row(number)}: no value in {empty}, fill it or remove the row")
        try:
            made.append(read(row))
        except DataError as error:
            raise DataError(f"{source.row(number)}: {error}") from None
        except (AttributeError, TypeError) as error:  # a column of a CSV file whose texts are all numbers is one of numbers
            kinds = {column: type(row[column]).__name__ for column in dict.fromkeys([*task.columns, *task.target_columns])}
            raise DataError(
                f"{source.row(number)}: task {task.name!r} cannot read it ({error}); its columns are {kinds}"
            ) from error
    return made


def _load_hub(task: Task, split: str) -> tuple[datasets.Dataset, str]:
    if task.hub is None:
        raise DataError(f"task {task.name!r} has no dataset on the hub, give a folder with --data.data_dir")
    dataset = f"{task.hub} ({task.hub_config})" if task.hub_config else task.hub
    try:
        rows = datasets.load_dataset(task.hub, task.hub_config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load the split {split!r} of {dataset} from the Hugging Face hub ({_reason(error)}); without a "
            f"connection, give a folder that holds {split}.jsonl with --data.data_dir"
        ) from error
    return rows, f"the split {split!r} of {dataset}"


def _load_folder(task: Task, split: str, folder: Path) -> tuple[datasets.Dataset, str]:
    if not folder.is_dir():
        raise DataError(f"the folder {folder} does not exist, check --data.data_dir")
    files = sorted(path for path in folder.glob(f"{split}.*") if path.suffix in _READERS)
    if len(files) > 1:
        raise DataError(f"{folder} holds {[path.name for path in files]}, keep one file for {split!r}")
    if not files:
        return _load_hub_copy(task, split, folder)
    builder, options = _READERS[files[0].suffix]
    if not files[0].read_bytes()[:1024].strip():
        # The readers fail on an empty file, each in its own way.
        raise DataError(f"{files[0]} is empty, it needs at least one row")
    try:
        rows = datasets.load_dataset(builder, data_files={split: escape(str(files[0]))}, split=split, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot read {files[0]}: {_reason(error.__cause__ or error)}") from error
    return rows, str(files[0])


def _load_hub_copy(task: Task, split: str, folder: Path) -> tuple[datasets.Dataset, str]:
    """Read a folder laid out as on the hub: a README.md, or ``train-00000-of-00001.parquet`` there or in ``data``."""
    if not any([*folder.glob("README.md"), *folder.glob(f"{split}-*"), *folder.glob(f"data/{split}*")]):
        hint = f", but {folder / task.name} exists: give that" if (folder / task.name).is_dir() else ""
        there = sorted(path.name for path in folder.iterdir())[:10]
        raise DataError(f"{folder} has no {split}.jsonl (.json, .parquet, .csv, .tsv), it holds {there}{hint}")
    try:
        configs = datasets.get_dataset_config_names(str(folder))
        config = task.hub_config if task.hub_config in configs else None
        rows = datasets.load_dataset(str(folder), config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot read the split {split!r} from {folder}: {_reason(error)}") from error
    return rows, f"the split {split!r} of {folder}"


def _check_columns(task: Task, rows: datasets.Dataset, origin: str) -> None:
    missing = [column for column in dict.fromkeys([*task.columns, *task.target_columns]) if column not in rows.column_names]
    if missing:
        raise DataError(
            f"{origin} lacks the columns {missing} that task {task.name!r} needs: the template uses {task.columns}, "
            f"the answer is in {task.target_columns}; there are {rows.column_names}"
        )
    if len(rows) == 0:
        raise DataError(f"{origin} has no rows, it needs at least one")


def _read_labels(task: ClassificationTask, rows: datasets.Dataset, origin: str) -> NDArray[np.int64]:
    labels: list[int] = []
    try:
        labels.extend(task.label_index(label) for label in rows[task.label_column])
    except DataError as error:
        row = len(labels)
        # The test splits of GLUE and SuperGLUE are published without labels.
        unpublished = rows[row][task.label_column] == -1
        hint = "; -1 marks rows whose labels were never published, use another split" if unpublished else ""
        raise DataError(f"row {row} (from 0) of {origin}: {error}{hint}") from None
    return np.asarray(labels, dtype=np.int64)


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    line = str(error).strip().split("\n")[0] or type(error).__name__
    return "it has no rows, and needs at least one" if "corresponds to no data" in line else line
