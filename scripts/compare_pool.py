"""The processes in which scripts/compare.py runs, and how long they will take."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from compare_rows import ZERO_SHOT, Row, Run

WORKER = Path(__file__).with_name("compare_run.py")
TAIL = 12  # lines of the log of a run that failed


class Pool:
    """Runs, several at a time, each in a process of its own: a crash ends one run, and no state leaks into the next.

    Args:
        jobs: Processes at a time; they share the cores.
        order: What all runs have in common; see ``compare_run.py``.
        folder: For their files, which are removed as each run ends.

    Attributes:
        running: The runs in progress.
    """

    def __init__(self, jobs: int, order: dict[str, Any], folder: Path) -> None:
        self.running: dict[Run, tuple[subprocess.Popen[bytes], Path]] = {}
        self._jobs, self._folder, self._started = jobs, folder, 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._order = {**order, "threads": max(1, cores // jobs)}

    @property
    def free(self) -> int:
        """Runs that can begin."""
        return self._jobs - len(self.running)

    def start(self, run: Run) -> None:
        """Begin a run."""
        self._started += 1
        folder = self._folder / str(self._started)
        folder.mkdir()
        (folder / "order.json").write_text(json.dumps({**self._order, "run": asdict(run), "began": time.time()}))
        threads = {name: str(self._order["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(WORKER), str(folder / "order.json"), str(folder / "result.json")],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C is for this process, which ends the others
            )
        self.running[run] = (process, folder)

    def finished(self) -> list[tuple[Run, dict[str, Any]]]:
        """Wait until a run ends; what each that has ended wrote, or an ``error`` and the end of its ``log``."""
        while self.running and all(process.poll() is None for process, _ in self.running.values()):
            time.sleep(0.1)
        results = []
        for run, (process, folder) in list(self.running.items()):
            if process.poll() is None:
                continue
            result = folder / "result.json"
            found = {"error": f"the process ended with code {process.returncode} and no result"}
            if result.exists():
                found = json.loads(result.read_text())
            if "error" in found:
                lines = (folder / "log").read_text(errors="replace").splitlines()
                found["log"] = "\n".join(f"    {line}" for line in lines[-TAIL:])
            shutil.rmtree(folder)
            del self.running[run]
            results.append((run, found))
        return results

    def close(self) -> None:
        """End what is running."""
        for process, _ in self.running.values():
            process.kill()
            process.wait()
        self.running.clear()


class Timing:
    """How long runs take, by those of the same task: by their rows, or by a short one where there are none.

    Args:
        rows: Of earlier runs, which say more as soon as there are some.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = [row for row in rows if row.forwards and not row.diverged]
        self._measured: dict[str, tuple[float, float]] = {}

    def lacks(self, runs: Iterable[Run]) -> list[str]:
        """The tasks of runs of which nothing is known."""
        known = {row.task for row in self._rows} | set(self._measured)
        return list(dict.fromkeys(run.task for run in runs if run.budget and run.task not in known))

    def measure(self, task: str, pool: Pool, run: Run) -> str | None:
        """Time a short run; what is not its steps is the same for a long one.

        Returns:
            What went wrong, if something did.
        """
        begin = time.perf_counter()
        pool.start(run)
        ((_, result),) = pool.finished()
        if "error" in result or not result["row"]["forwards"]:
            return f"{run}: {result.get('error', 'diverged')}\n{result.get('log', '')}"
        steps = result["training_seconds"]
        self._measured[task] = (steps / result["row"]["forwards"], time.perf_counter() - begin - steps)
        return None

    def seconds(self, run: Run) -> float:
        """The time that one run takes, NaN if nothing is known."""
        if run.method == ZERO_SHOT:
            return self._measured.get(run.task, (0.0, 0.0))[1]
        same_task = [row for row in self._rows if row.task == run.task]
        rows = [row for row in same_task if row.method == run.method] or same_task
        if rows:
            return run.budget * mean(row.seconds / row.forwards for row in rows)
        if run.task in self._measured:
            per_forward, other = self._measured[run.task]
            return run.budget * per_forward + other
        return math.nan
