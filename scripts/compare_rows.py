"""The rows of scripts/compare.py: what a run is, the file of their results, and the choice of a rate on dev."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any

UNTUNED, FIRST_ORDER, ZERO_SHOT = "adanaged", "first_order", "zero_shot"
BACKWARD = 3.0  # forwards that a forward with its backward counts for, by convention
CURVE_COLUMNS = ("task", "method", "rate", "seed", "budget", "forwards", "split", "loss")

Key = tuple[str, str, float | None, int, int]


@dataclass(frozen=True)
class Run:
    """One fine-tuning; ``rate`` is None where there is nothing to tune, or where it is not chosen yet."""

    stage: str
    task: str
    method: str
    rate: float | None
    seed: int
    budget: int

    @property
    def key(self) -> Key:
        """What makes two runs the same one: all but the stage."""
        return (self.task, self.method, self.rate, self.seed, self.budget)

    def __str__(self) -> str:
        rate = "" if self.rate is None else f" at {self.rate:g}"
        return f"{self.task} {self.method}{rate}, seed {self.seed}, {self.budget:,} forwards"


@dataclass(frozen=True)
class Row(Run):
    """A run with its results; losses of one that diverged are infinite, and its accuracies NaN."""

    steps: int
    forwards: int
    device: str
    seconds: float
    dev_loss: float
    dev_acc: float
    test_loss: float
    test_acc: float
    last_test_loss: float
    last_test_acc: float
    diverged: bool
    model: str
    precision: str

    def __str__(self) -> str:
        result = "diverged" if self.diverged else f"dev {self.dev_loss:.4f}, test {self.test_loss:.4f} / {self.test_acc:.3f}"
        return f"{super().__str__()}: {result} ({self.seconds:.0f} s)"


# ---- choosing ----------------------------------------------------------------------------------------------------------
def of(rows: Iterable[Row], task: str, method: str, budget: int) -> list[Row]:
    """The rows of one method on one task."""
    return [row for row in rows if (row.task, row.method, row.budget) == (task, method, budget)]


def mean_dev_losses(rows: Sequence[Row]) -> dict[float | None, float]:
    """Dev loss by rate, over the seeds that all rates have run with: more seeds of one rate are no reason to prefer it."""
    seeds = {rate: {row.seed for row in rows if row.rate == rate} for rate in {row.rate for row in rows}}
    common = set.intersection(*seeds.values()) or set.union(*seeds.values())
    return {
        rate: mean(row.dev_loss for row in rows if row.rate == rate and row.seed in common) for rate in sorted(seeds, key=_low)
    }


def choose(rows: Sequence[Row]) -> float | None:
    """The rate with the lowest dev loss, of equal ones the lower; None where there is nothing to tune."""
    losses = mean_dev_losses(rows)
    return min(losses, key=lambda rate: (losses[rate], _low(rate)))


def edge(rows: Sequence[Row]) -> int:
    """-1 or 1 where the chosen rate is the lowest or the highest of several that have run, else 0."""
    rates = sorted({row.rate for row in rows if row.rate is not None})
    if len(rates) < 2:
        return 0
    return {rates[0]: -1, rates[-1]: 1}.get(choose(rows) or 0.0, 0)


def _low(rate: float | None) -> float:
    return 0.0 if rate is None else rate


# ---- the file ----------------------------------------------------------------------------------------------------------
def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_parse(cells) for cells in csv.DictReader(file)]


def append_row(path: Path, row: Row) -> None:
    """Add a row in one stroke: a crash leaves the old file or the new one."""
    write_csv(path, [asdict(each) for each in [*read_rows(path), row]], [field.name for field in fields(Row)])


def save_curve(path: Path, row: Row, points: list[dict[str, Any]]) -> None:
    """Add the points of a run; those that an earlier attempt has left are replaced."""
    old: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    own = {"task": row.task, "method": row.method, "rate": row.rate, "seed": row.seed, "budget": row.budget}
    written = {name: "" if value is None else f"{value:.7g}" if name == "rate" else str(value) for name, value in own.items()}
    kept = [cells for cells in old if any(cells[name] != value for name, value in written.items())]
    write_csv(path, [*kept, *({**own, **point} for point in points)], CURVE_COLUMNS)


def write_csv(path: Path, records: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write a table through a temporary file beside it; None and NaN are empty cells."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(record[column]) for column in columns] for record in records)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text.getvalue())
    os.replace(unfinished, path)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _parse(cells: dict[str, str]) -> Row:
    read: dict[str, Any] = {
        "float | None": lambda text: float(text) if text else None,
        "float": lambda text: float(text) if text else math.nan,
        "int": int,
        "str": str,
        "bool": lambda text: text == "True",
    }
    return Row(**{field.name: read[str(field.type)](cells[field.name]) for field in fields(Row)})
