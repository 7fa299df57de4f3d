"""The table and the plots of scripts/compare.py, made of its rows and curves."""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from compare_rows import BACKWARD, FIRST_ORDER, UNTUNED, ZERO_SHOT, Row, choose, edge, of

COLUMNS = ("method", "rate", "grid", "seeds", "forwards", "test loss", "test acc", "dev loss", "test loss at the other rates")
ARROWS = {-1: " ↓", 0: "", 1: " ↑"}
EXPLANATION = f"""\
Each rate is chosen on the dev rows and reported on the test rows, at the checkpoint of the best dev loss; ↓ and ↑ mark a choice
at the lower or upper edge of what was run. ± is the standard deviation over seeds, where there are several. Forwards are those
of the optimizer, its calibrations included, the validations left out; a forward with its backward counts for {BACKWARD:g}.
"""


@dataclass(frozen=True)
class Entry:
    """One method on one task at one budget: the rows at the chosen rate, and one row for each rate of the first seed."""

    method: str
    rows: list[Row]
    grid: list[Row]
    edge: int

    @property
    def loss(self) -> float:
        """The mean test loss."""
        return mean(row.test_loss for row in self.rows)


def entries(rows: Sequence[Row], task: str, budget: int) -> list[Entry]:
    """The methods that ran on a task with a budget, the best first."""
    found = []
    for method in dict.fromkeys(row.method for row in rows if (row.task, row.budget) == (task, budget)):
        seen = of(rows, task, method, budget)
        rate, first = choose(seen), min(row.seed for row in seen)
        grid = sorted((row for row in seen if row.seed == first and row.rate is not None), key=lambda row: row.rate or 0.0)
        chosen = sorted((row for row in seen if row.rate == rate), key=lambda row: row.seed)
        found.append(Entry(method, chosen, grid, edge(seen)))
    return sorted(found, key=lambda entry: entry.loss)


def sections(rows: Iterable[Row]) -> list[tuple[int, str]]:
    """The budgets and tasks that there are rows of, in that order."""
    return sorted({(row.budget, row.task) for row in rows if row.method != ZERO_SHOT})


# ---- the table ---------------------------------------------------------------------------------------------------------
def table(rows: Sequence[Row], command: str) -> str:
    """Markdown: one section for each task and budget.

    Args:
        rows: All rows.
        command: What made them.
    """
    names = ", ".join(sorted({f"{row.model} ({row.precision})" for row in rows}))
    text = f"# Methods at equal numbers of forward passes\n\nModel: {names}. Made by\n\n    {command}\n\n{EXPLANATION}"
    for budget, task in sections(rows):
        compared = entries(rows, task, budget)
        reference = [entry for entry in compared if entry.method == FIRST_ORDER] + entries(rows, task, 0)
        text += f"\n## {task}, {budget:,} forwards\n\n"
        text += markdown([line(entry) for entry in compared if entry.method != FIRST_ORDER])
        if reference:
            text += "\nFor reference:\n\n" + markdown([line(entry) for entry in reference])
    return text


def line(entry: Entry) -> list[str]:
    """The cells of one method."""
    rate = entry.rows[0].rate
    others = [f"{short(row.rate)}: {number(row.test_loss)}" for row in entry.grid if row.rate != rate]
    return [
        entry.method,
        "-" if rate is None else f"{short(rate)}{ARROWS[entry.edge]}",
        ", ".join(short(row.rate) for row in entry.grid) or "-",
        "-" if entry.method == ZERO_SHOT else " ".join(str(row.seed) for row in entry.rows),
        f"{mean(row.forwards for row in entry.rows):,.0f}",
        spread([row.test_loss for row in entry.rows]),
        spread([row.test_acc for row in entry.rows], digits=3),
        spread([row.dev_loss for row in entry.rows]),
        ", ".join(others) or "-",
    ]


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table with the columns of :data:`COLUMNS`."""
    rule = ["---"] * len(COLUMNS)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (COLUMNS, rule, *lines))


def short(rate: float | None) -> str:
    """A rate, as in 3e-5; nothing for a method without one."""
    if rate is None:
        return ""
    mantissa, exponent = f"{rate:.5e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def number(value: float, digits: int = 4) -> str:
    """A figure; a loss that is infinite, or an accuracy that is not there, is that of a run that diverged."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "diverged"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """The mean, and the standard deviation of several."""
    if len(values) < 2 or not all(math.isfinite(value) for value in values):
        return number(mean(values), digits)
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


# ---- the plots ---------------------------------------------------------------------------------------------------------
def draw(rows: Sequence[Row], curves: Path, folder: Path) -> list[Path]:
    """Three plots for each task and budget: ``loss-``, ``accuracy-`` and ``sensitivity-TASK-BUDGET.png``.

    Args:
        rows: All rows.
        curves: The file with the points of the curves.
        folder: Where the plots go.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the plots need matplotlib: pip install matplotlib, and give the same command again"
        ) from error
    plt = importlib.import_module("matplotlib.pyplot")
    points: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    with curves.open(newline="") as file:
        for cells in csv.DictReader(file):
            key = tuple(cells[name] for name in ("task", "method", "rate", "seed", "budget", "split"))
            points.setdefault(key, []).append((float(cells["forwards"]), float(cells["loss"])))
    made = []
    for budget, task in sections(rows):
        found = [entry for entry in entries(rows, task, budget) if math.isfinite(entry.loss)]
        zero = next(iter(of(rows, task, ZERO_SHOT, 0)), None)
        for name, plot in (("loss", _loss), ("accuracy", _accuracy), ("sensitivity", _sensitivity)):
            figure = plot(plt, found, zero, points)
            figure.suptitle(f"{task}, {budget:,} forwards")
            path = folder / f"{name}-{task}-{budget}.png"
            figure.savefig(path, dpi=120, bbox_inches="tight")
            plt.close(figure)
            made.append(path)
    return made


def _style(plt: Any, found: Sequence[Entry], method: str) -> dict[str, Any]:
    """The untuned method in thick black, the reference in grey, the others in colours that do not depend on their order."""
    if method == UNTUNED:
        return {"color": "black", "linewidth": 2.5, "zorder": 3, "label": method}
    if method == FIRST_ORDER:  # a reference, not one of those that are compared
        return {"color": "grey", "linewidth": 1.2, "linestyle": "-.", "label": method}
    names = sorted(entry.method for entry in found if entry.method not in (UNTUNED, FIRST_ORDER))
    palette = plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    return {"color": palette[names.index(method) % len(palette)], "linewidth": 1.2, "label": method}


def _loss(plt: Any, found: Sequence[Entry], zero: Row | None, points: dict[tuple[str, ...], list[tuple[float, float]]]) -> Any:
    """Loss against forwards at the chosen rate: mean and range over seeds; at the left in training, at the right on dev."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for axis, split in zip(axes, ("train", "dev"), strict=True):
        seen = []
        for entry in found:
            lines = []
            for row in entry.rows:
                rate = "" if row.rate is None else f"{row.rate:.7g}"
                lines.append(points.get((row.task, row.method, rate, str(row.seed), str(row.budget), split), []))
            steps = list(zip(*lines, strict=False))  # the n-th points of all seeds
            at = [mean(x for x, _ in step) for step in steps]
            losses = [[y for _, y in step] for step in steps]
            style = _style(plt, found, entry.method)
            axis.plot(at, [mean(values) for values in losses], marker="." if split == "dev" else None, **style)
            if len(lines) > 1:
                low, high = [min(values) for values in losses], [max(values) for values in losses]
                axis.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
            seen += [mean(values) for values in losses]
        if seen:  # one method that goes astray must not flatten all others
            start = zero.dev_loss if zero is not None else max(seen)
            axis.set_ylim(min(seen) - 0.02, min(max(seen), 1.5 * start) + 0.02)
        axis.set(xlabel="forwards", ylabel=f"{'training loss, smoothed' if split == 'train' else 'dev loss'}")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def _accuracy(plt: Any, found: Sequence[Entry], zero: Row | None, points: Any) -> Any:
    """Test accuracy at the chosen rate: mean and range over seeds, beside the zero-shot one."""
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.32 * len(found)), layout="constrained")
    for place, entry in enumerate(reversed(found)):
        values = [row.test_acc for row in entry.rows]
        error = [[mean(values) - min(values)], [max(values) - mean(values)]]
        axis.barh(place, mean(values), xerr=error, color=_style(plt, found, entry.method)["color"], alpha=0.8)
    axis.set_yticks(range(len(found)), [entry.method for entry in reversed(found)])
    low = [row.test_acc for entry in found for row in entry.rows]
    if zero is not None:
        axis.axvline(zero.test_acc, color="grey", linestyle="--", label="zero-shot")
        axis.legend(loc="lower right", fontsize="small")
        low.append(zero.test_acc)
    axis.set(xlabel="test accuracy", xlim=(max(0.0, min(low, default=0.0) - 0.05), None))
    return figure


def _sensitivity(plt: Any, found: Sequence[Entry], zero: Row | None, points: Any) -> Any:
    """Test loss against the rate, all at the first seed, and the flat lines of what has no rate; a cross diverged."""
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    finite = [row.test_loss for entry in found for row in [*entry.grid, *entry.rows] if not row.diverged]
    limit = 1.5 * (zero.test_loss if zero is not None else min(finite, default=1.0))
    top = min(max(finite, default=limit), limit)
    for entry in found:
        style = _style(plt, found, entry.method)
        if not entry.grid:
            axis.axhline(entry.loss, **style)
            continue
        rates = [row.rate for row in entry.grid]
        axis.plot(rates, [min(row.test_loss, top) for row in entry.grid], marker="o", markersize=3.5, **style)
        beyond = [row.rate for row in entry.grid if row.test_loss > top]
        axis.plot(beyond, [top] * len(beyond), linestyle="", marker="x", color=style["color"])
        chosen = min(entry.rows, key=lambda row: row.seed)
        axis.plot([chosen.rate], [min(chosen.test_loss, top)], marker="o", markersize=9, fillstyle="none", color=style["color"])
    if zero is not None:
        axis.axhline(zero.test_loss, color="grey", linestyle="--", linewidth=1, label="zero-shot")
    axis.set(xscale="log", xlabel="rate (circled: chosen on dev; ×: worse than shown, or diverged)", ylabel="test loss")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure
