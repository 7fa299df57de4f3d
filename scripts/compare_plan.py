"""What scripts/compare.py runs: methods, grids and the two stages.

Everything here is a function of the rows that are there already: :func:`plan` says which runs are missing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from compare_rows import FIRST_ORDER, UNTUNED, ZERO_SHOT, Row, Run, choose, edge, mean_dev_losses, of

PEERS = 3  # that stage two takes from stage one
EXTENSIONS = 2  # rates beyond a grid's edge, at most
CALIBRATION = 60  # forwards that a parameter-free rule may spend before its first step


# Half-decade steps around what the length of an update per coordinate suggests for a model of some five million parameters:
# a sign moves each coordinate by the rate itself, an adaptive step too, an orthogonalised one by the rate over √n; a Gaussian
# direction by the rate times the slope along it.
GRIDS: dict[str, tuple[float, ...]] = {
    UNTUNED: (),
    "zo_sgd": (1e-5, 3e-5, 1e-4),
    "zo_signsgd": (3e-5, 1e-4, 3e-4),
    "zo_adamm": (1e-4, 3e-4, 1e-3),
    "zo_conservative": (3e-5, 1e-4, 3e-4),
    "jaguar_signsgd": (3e-6, 1e-5, 3e-5),
    "jaguar_muon": (1e-4, 3e-4, 1e-3),
    "ldsd_sgd": (3e-5, 1e-4, 3e-4),
    "ldsd_adamm": (1e-4, 3e-4, 1e-3),
    "ldsd_jaguar": (1e-5, 3e-5, 1e-4),
    "zo_finetuner": (1e-5, 3e-5, 1e-4),
    "lozo": (1e-5, 3e-5, 1e-4),
    "subzero": (1e-5, 3e-5, 1e-4),
    "zo_muon": (3e-3, 1e-2, 3e-2),
    "fzoo": (3e-7, 1e-6, 3e-6),
    "hizoo": (1e-5, 3e-5, 1e-4),
    FIRST_ORDER: (3e-5, 1e-4, 3e-4),
}


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    ``budgets`` and ``stages`` are those of stage one and two, ``extend`` the stages with extensions, and ``neighbours`` counts
    the rates on each side of stage one's best that stage two tries too.
    """

    methods: Sequence[str]
    tasks: Sequence[str]
    seeds: Sequence[int] = (0, 1, 2)
    budgets: tuple[int, int] = (2000, 8000)
    grids: dict[str, tuple[float, ...]] | None = None
    stages: Collection[str] = ("one", "two")
    extend: Collection[str] = ("one",)
    neighbours: int = 1

    def grid(self, method: str) -> tuple[float, ...]:
        """The rates of a method, empty for one with nothing to tune."""
        return (GRIDS if self.grids is None else self.grids).get(method, ())


@dataclass(frozen=True)
class Plan:
    """``now``: runs that can begin. ``later``: stand-ins for those whose method or rate depends on results of others."""

    now: list[Run]
    later: list[Run]


# ---- the plan ----------------------------------------------------------------------------------------------------------
def plan(settings: Settings, rows: Sequence[Row]) -> Plan:
    """The runs that are missing, in the order in which to begin them."""
    now, later = [], []
    first, (one, two) = settings.tasks[0], settings.budgets
    tasks = settings.tasks if "two" in settings.stages else [first]
    now += [Run("zero-shot", task, ZERO_SHOT, None, 0, 0) for task in tasks]
    if "one" in settings.stages:
        for method in settings.methods:
            cell = ("one", first, method, one)
            now += grid_runs(cell, settings.grid(method), settings.seeds[0], rows, "one" in settings.extend)
    if "two" in settings.stages:
        ranked = "one" not in settings.stages or not _missing(now, rows)
        found = best_peers(settings, rows) if ranked else {}
        candidates = [method for method in settings.methods if settings.grid(method) and method != FIRST_ORDER]
        unknown = 0 if ranked else min(PEERS, len(candidates))
        for task in settings.tasks:
            if UNTUNED in settings.methods:
                now += [Run("two", task, UNTUNED, None, seed, two) for seed in settings.seeds]
            for method, best in found.items():
                cell = ("two", task, method, two)
                grid = around(best, settings.neighbours)
                runs = grid_runs(cell, grid, settings.seeds[0], rows, "two" in settings.extend)
                known = not _missing(runs, rows)
                rate = choose(of(rows, task, method, two)) if known else None
                rest = [Run("two", task, method, rate, seed, two) for seed in settings.seeds[1:]]
                now += runs
                if not known:
                    later += rest
                elif math.isfinite(mean_dev_losses(of(rows, task, method, two))[rate]):
                    now += rest
            for index in range(unknown):
                seeds = [settings.seeds[0]] * (1 + 2 * settings.neighbours) + list(settings.seeds[1:])
                later += [Run("two", task, f"best peer {index + 1}", None, seed, two) for seed in seeds]
    return Plan(_missing(now, rows), later)


def grid_runs(
    cell: tuple[str, str, str, int], grid: Sequence[float], seed: int, rows: Sequence[Row], extend: bool
) -> list[Run]:
    """The runs that choose the rate of one method on one task: its grid, and what lies beyond where the best is at an edge.

    Args:
        cell: Stage, task, method and budget.
        grid: The rates; empty for a method with nothing to tune.
        seed: Of all of them.
        rows: What is there already.
        extend: Whether rates are added beyond the edge.
    """
    stage, task, method, budget = cell
    runs = [Run(stage, task, method, rate, seed, budget) for rate in (grid or (None,))]
    if not grid or not extend or _missing(runs, rows):
        return runs
    seen = [row for row in of(rows, task, method, budget) if row.seed == seed and row.rate is not None]
    beyond = [row.rate for row in seen if row.rate is not None and not min(grid) <= row.rate <= max(grid)]
    side, best = edge(seen), choose(seen)
    if best is not None and len(beyond) < EXTENSIONS:
        side = side or (1 if len(grid) == 1 and not beyond else 0)  # a single rate is an edge on either side
        if side:
            runs.append(Run(stage, task, method, half_decade(best, side), seed, budget))
    return runs


def best_peers(settings: Settings, rows: Sequence[Row]) -> dict[str, float]:
    """The best tuned methods of stage one by dev loss, and the rates chosen there, without the first-order one."""
    scores = {}
    for method in settings.methods:
        seen = of(rows, settings.tasks[0], method, settings.budgets[0])
        best = choose(seen) if seen and method != FIRST_ORDER else None
        loss = mean_dev_losses(seen)[best] if best is not None else math.inf
        if best is not None and math.isfinite(loss):
            scores[method] = (loss, best)
    return {method: scores[method][1] for method in sorted(scores, key=lambda method: scores[method][0])[:PEERS]}


def _missing(runs: Iterable[Run], rows: Sequence[Row]) -> list[Run]:
    done = {row.key for row in rows}
    unique = {run.key: run for run in runs if run.key not in done}
    return list(unique.values())


def around(rate: float, count: int) -> tuple[float, ...]:
    """A rate with ``count`` half-decades on each side of it."""
    below, above = [rate], [rate]
    for _ in range(count):
        below.append(half_decade(below[-1], -1))
        above.append(half_decade(above[-1], +1))
    return (*reversed(below[1:]), *above)


def half_decade(rate: float, side: int) -> float:
    """The next rate up (``side=1``) or down (-1) of 1, 3, 10, 30, ...; a factor of √10 from any other."""
    exponent = math.floor(math.log10(rate) + 1e-9)
    series = {1: {1: 3.0, -1: 0.3}, 3: {1: 10.0, -1: 1.0}}
    mantissa = rate / 10.0**exponent
    if math.isclose(mantissa, round(mantissa), rel_tol=1e-6) and round(mantissa) in series:
        return float(f"{series[round(mantissa)][side] * 10.0**exponent:.1e}")
    return float(f"{rate * 10.0 ** (side / 2):.1e}")


def steps_within(budget: int, forwards_per_step: float, calibration: int = 0) -> int:
    """Steps that a number of forwards is enough for.

    Args:
        budget: Forwards.
        forwards_per_step: Of a step, on average.
        calibration: Forwards before the first step.
    """
    return max(1, int((budget - calibration) / forwards_per_step + 1e-9))
