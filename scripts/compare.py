"""Compare methods × tasks × seeds × rates at an equal number of forward passes, on a local model.

    python scripts/compare.py --model MODEL --data DATA --tasks sst2 rte --out docs/results/opt-mini

MODEL is a folder of a causal language model; DATA has a folder for each task, with its train and validation files. Each run is
that of ``zo-lightning fit --config configs/opt-125m/sst2.yaml --config configs/methods/NAME.yaml`` at a rate of the grid, with
as many steps as the budget of forwards is enough for.

Stage one runs all methods on the first task with the first seed. Stage two takes the untuned method and the best three peers
by dev loss to all tasks and seeds with a larger budget: the best rate of stage one and its two neighbours with the first seed,
then the one of them that is best on dev with the other seeds (``--neighbours 0``: only the best rate, three runs and not five).

The same command goes on where it was stopped: a run whose row is in ``runs.csv`` is not run again. ``curves.csv``, ``table.md``
and plots come with it. Options after ``--`` are handed to each run, as in ``-- --data.batch_size 8``.
"""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import sys
import tempfile
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from compare_plan import GRIDS, Plan, Settings, best_peers, plan
from compare_pool import Pool, Timing
from compare_report import draw, table
from compare_rows import Row, Run, append_row, read_rows, save_curve
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
METHODS = CONFIGS / "methods"
STAGES = ("one", "two")
PROBE = 50  # forwards of the run that is only timed


def main(argv: list[str] | None = None) -> int:
    """Plan, estimate, run, report.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit code: 0; 1 where a run ended in an error that is no divergence; 130 after Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else argv
    args, settings = parse(words)
    console = Console(highlight=False, soft_wrap=True)
    rows = read_rows(args.out / "runs.csv")
    order = {name: str(getattr(args, name)) for name in ("config", "model", "data", "accelerator", "precision")}
    order |= {"methods": str(METHODS), "name": args.model.resolve().name}
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no run outlives this process
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        pool = Pool(args.jobs, {**order, "options": args.options}, Path(folder))
        try:
            estimate(settings, rows, pool, console, args)
            if args.dry_run:
                return 0
            args.out.mkdir(parents=True, exist_ok=True)
            failures = execute(settings, rows, pool, console, args.out, command(words))
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on")
            return 130
        finally:
            pool.close()
            signal.signal(signal.SIGTERM, handler)
    if rows:
        (args.out / "table.md").write_text(table(rows, command(words)))
        try:
            draw(rows, args.out / "curves.csv", args.out)
        except ModuleNotFoundError as error:
            console.print(str(error))
        console.print(f"{len(rows)} rows in {args.out / 'runs.csv'}, summed up in {args.out / 'table.md'}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def estimate(settings: Settings, rows: list[Row], pool: Pool, console: Console, args: argparse.Namespace) -> None:
    """Say how long it will take, by the time of earlier rows or of a few steps; with ``--dry-run`` also what will run."""
    known, timing = plan(settings, rows), Timing(rows)
    runs = [*known.now, *known.later]
    cheapest = "zo_sgd" if "zo_sgd" in settings.methods else settings.methods[0]
    for task in timing.lacks(runs):
        console.print(f"timing a few steps of {cheapest} on {task}")
        rate = next(iter(settings.grid(cheapest)), None)
        problem = timing.measure(task, pool, Run("timing", task, cheapest, rate, settings.seeds[0], PROBE))
        if problem is not None:
            console.print(f"no estimate for {task}: {problem}", markup=False)
    console.print(forecast(known, timing, args.jobs, datetime.now()))
    if args.dry_run:
        for title, listed in (("now", known.now), ("then, as the results decide", known.later)):
            console.print("\n".join([f"{title}:", *(f"  stage {run.stage}: {run}" for run in listed)]), markup=False)


def forecast(known: Plan, timing: Timing, jobs: int, now: datetime) -> str:
    """One line: how many runs and forwards, and when they end."""
    runs = [*known.now, *known.later]
    if not runs:
        return "nothing is left to run"
    seconds = sum(timing.seconds(run) for run in runs) / jobs
    total = sum(run.budget for run in runs)
    counted = f"{len(runs)} runs with {total:,} forwards, {jobs} at a time"
    if math.isnan(seconds):
        return f"{counted}; how long they take is not known"
    took = f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    end = f"{now + timedelta(seconds=seconds):%Y-%m-%d %H:%M}"
    return f"{counted}: about {took}, until {end}; rates beyond a grid's edge come on top"


def execute(settings: Settings, rows: list[Row], pool: Pool, console: Console, out: Path, made_by: str) -> list[str]:
    """Run what is missing, and add to ``rows`` and to the files in ``out`` as each run ends.

    A method that ends in an error is left out of what follows; the next command tries its runs again.

    Returns:
        What went wrong.
    """
    if not plan(settings, rows).now:
        return []
    failures: list[str] = []
    failed: set[str] = set()
    before = len(rows)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("runs")
        while True:
            kept = replace(settings, methods=[method for method in settings.methods if method not in failed])
            known = plan(kept, rows)
            waiting = [run for run in known.now if run not in pool.running and run.method not in failed]
            for run in waiting[: pool.free]:
                pool.start(run)
            done = len(rows) - before
            progress.update(bar, total=done + len(known.now) + len(known.later), completed=done)
            if not pool.running:
                return failures
            for run, result in pool.finished():
                if "error" in result:
                    failed.add(run.method)
                    failures.append(f"{run}: {result['error']}\n{result['log']}")
                    progress.console.print(f"{run}: {result['error']}", markup=False)
                    continue
                row = Row(**result["row"])
                save_curve(out / "curves.csv", row, result["curve"])
                append_row(out / "runs.csv", row)
                rows.append(row)
                (out / "table.md").write_text(table(rows, made_by))
                progress.console.print(str(row), markup=False)


def command(words: list[str]) -> str:
    """The command to give again, with MODEL and DATA in place of folders that are elsewhere on another machine."""
    shown = list(words)
    for index, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if name in ("--model", "--data"):
            place = name[2:].upper()
            if equals:
                shown[index] = f"{name}={place}"
            elif index + 1 < len(words):
                shown[index + 1] = place
    return f"python scripts/compare.py {shlex.join(shown)}"


# ---- arguments ---------------------------------------------------------------------------------------------------------
def parse(words: list[str]) -> tuple[argparse.Namespace, Settings]:
    """Read the arguments, and refuse early what could not run."""
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a causal language model")
    add("--data", type=Path, required=True, help="folder with a folder for each task")
    add("--tasks", nargs="+", required=True, help="names of tasks; stage one has the first")
    add("--out", type=Path, required=True, help="folder of the results")
    add("--methods", nargs="+", default=list(GRIDS), help="files of configs/methods, without .yaml; by default all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of directions and data order; rates are chosen with the first")
    add("--budget", nargs="+", type=int, default=[2000, 8000], help="forwards of a run, in stage one and in stage two")
    add("--rates", nargs="+", action="extend", default=[], metavar="METHOD=1e-5,3e-5", help="other grids")
    add("--stage", choices=[*STAGES, "both"], default="both", help="which stages")
    add("--extend", choices=["none", *STAGES, "both"], default="one", help="stages with up to two rates beyond a grid's edge")
    add("--neighbours", type=int, default=1, help="rates on each side of stage one's best that stage two tries")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    add("--accelerator", choices=["cpu", "gpu"], default="cpu", help="of the Trainer")
    add("--precision", default="32-true", help="of the Trainer")
    add("--config", type=Path, default=CONFIGS / "opt-125m" / "sst2.yaml", help="configuration that all runs begin with")
    add("--dry-run", action="store_true", help="only print the plan and the time that it takes")
    split = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:split])
    args.options = words[split + 1 :]
    grids = dict(GRIDS)
    for given in args.rates:
        method, _, rates = given.partition("=")
        try:
            grids[method] = tuple(sorted({float(f"{float(rate):.6g}") for rate in rates.split(",")}))  # as the file has them
        except ValueError:
            parser.error(f"--rates {given}: expected METHOD=RATE,RATE as in zo_sgd=1e-5,3e-5")
    if len(args.budget) > 2 or min(args.budget) < 1 or args.jobs < 1:
        parser.error("--budget takes one positive number or two, --jobs a positive one")
    if args.neighbours < 0:
        parser.error("--neighbours takes 0 or a positive number")
    for folder in (args.model, *(args.data / task for task in args.tasks)):
        if not folder.is_dir():
            parser.error(f"there is no folder {folder}")
    for method in args.methods:
        if not (METHODS / f"{method}.yaml").exists():
            parser.error(f"there is no {method}.yaml in {METHODS}; choose others with --methods")
    for row in read_rows(args.out / "runs.csv"):
        if (row.model, row.precision) != (args.model.resolve().name, args.precision):
            parser.error(f"{args.out} has rows of {row.model} in {row.precision}; give another --out")
    named = {"none": (), "both": STAGES, "one": ("one",), "two": ("two",)}
    budgets = (args.budget[0], args.budget[-1])
    stages, extend = named[args.stage], named[args.extend]
    settings = Settings(args.methods, args.tasks, args.seeds, budgets, grids, stages, extend, args.neighbours)
    if args.stage == "two" and not best_peers(settings, read_rows(args.out / "runs.csv")):
        parser.error(f"stage two takes its peers from stage one, of which {args.out / 'runs.csv'} has no rows")
    return args, settings


if __name__ == "__main__":
    raise SystemExit(main())
