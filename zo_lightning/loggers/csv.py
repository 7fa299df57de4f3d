"""A ``metrics.csv`` that a resumed run goes on with."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["ResumableCSVLogger"]


class ResumableCSVLogger(CSVLogger):
    """Lightning's :class:`~lightning.pytorch.loggers.CSVLogger`, which at an existing version appends instead of deleting.

    The file of a run that was stopped and resumed is byte for byte that of an uninterrupted one: rows past the checkpoint are
    dropped when the first new row arrives. :class:`~zo_lightning.callbacks.ResumeCheckpoint` says how many rows are kept
    (:meth:`truncate`); without it, rows from the step of the first new row on are dropped, also where the new run is not a
    resumed one. A line that was cut off in the middle of a write is dropped, and the file is rewritten through a temporary one
    beside it. Where nothing is logged the file stays as it is.

    Arguments are those of the base class.
    """

    @property
    def rows(self) -> int:
        """Rows logged so far, those of the file included."""
        writer = self.experiment
        assert isinstance(writer, _Writer)
        return writer.rows

    def truncate(self, rows: int) -> None:
        """Keep the first ``rows`` rows of an existing file.

        Args:
            rows: How many to keep; where the file has fewer, all.

        Raises:
            ValueError: If ``rows`` is negative.
        """
        if rows < 0:
            raise ValueError(f"rows must not be negative, got {rows}")
        writer = self.experiment
        if isinstance(writer, _Writer):  # a stand-in on all processes but the first
            writer.keep = rows

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer, made when it is first asked for."""
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Writer(self.log_dir)
        return self._experiment  # type: ignore[return-value]


class _Writer(ExperimentWriter):
    """Writes rows; opens an existing file instead of deleting it.

    Attributes:
        keep: Rows of the existing file to keep; None to decide by the step of the first new row.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.keep: int | None = None
        self._written = 0  # rows in the file
        self._whole = True  # whether all of the file's last line is there
        self._reopened = self._fs.isfile(self.metrics_file_path)
        if self._reopened:
            self.metrics_keys, old = self._read()
            self._written = len(old)

    @property
    def rows(self) -> int:
        if self._reopened and self.keep is not None:
            return min(self.keep, self._written) + len(self.metrics)
        return self._written + len(self.metrics)

    def save(self) -> None:
        """Write the rows that are new."""
        if not self.metrics:
            return
        if self._reopened:
            self._cut()
        new_keys = self._record_new_keys()
        if new_keys or not self._written:
            old = self._read()[1] if self._written else []
            self._rewrite([*old, *self.metrics])
        else:
            with self._fs.open(self.metrics_file_path, "a", newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
        self._written += len(self.metrics)
        self.metrics = []

    def _cut(self) -> None:
        """Drop what the new rows take the place of."""
        self._reopened = False
        _, old = self._read()
        keep = self.keep
        if keep is None:
            first = self.metrics[0]["step"]
            keep = next((i for i, row in enumerate(old) if float(row["step"] or 0) >= first), len(old))
        elif keep > len(old):
            rank_zero_warn(f"{self.metrics_file_path} has {len(old)} rows, and had {keep} when the checkpoint was written")
        if keep < len(old) or not self._whole:
            self._rewrite(old[:keep])
        self._written = min(keep, len(old))

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """The columns and the rows of the file, without a line that was cut off."""
        with self._fs.open(self.metrics_file_path, "r", newline="") as file:
            text = file.read()
        lines = io.StringIO(text, newline="").readlines()
        self._whole = not lines or lines[-1].endswith("\n")
        reader = csv.DictReader(lines if self._whole else lines[:-1])
        keys = list(reader.fieldnames or [])
        return keys, list(reader) if "step" in keys else []

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the whole file, so that a crash leaves the old one or the new one."""
        local = isinstance(self._fs, LocalFileSystem)
        path = f"{self.metrics_file_path}.tmp" if local else self.metrics_file_path
        with self._fs.open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        if local:
            os.replace(path, self.metrics_file_path)
        self._whole = True

    def _check_log_dir_exists(self) -> None:
        """Called by the base class, which would delete the file here (lightning/fabric/loggers/csv_logs.py)."""
