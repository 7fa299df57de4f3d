"""One run of scripts/compare.py in a process of its own: reads what to run from a JSON file and writes the result to another.

    python scripts/compare_run.py RUN.json RESULT.json

The run is that of ``zo-lightning fit`` with the task's and the method's configuration, then ``test`` with the last weights and
with the best checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from compare_plan import CALIBRATION, steps_within
from compare_rows import BACKWARD, ZERO_SHOT, Row, Run
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from zo_lightning.callbacks import AdaNAGED
from zo_lightning.cli import ZOCLI, cli
from zo_lightning.console import quiet
from zo_lightning.optim import CalibrationError, NonFiniteLossError

WINDOWS = 25  # of a run's training losses, each shown as its mean


class Recorder(Callback):
    """Keeps the losses against the forwards that were used, and the time that the steps took."""

    def __init__(self) -> None:
        self.train: list[tuple[float, torch.Tensor]] = []  # tensors: a device is not asked at every step
        self.dev: list[tuple[float, float, float]] = []
        self.seconds = 0.0
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read it, and keep the loss."""
        self.seconds += time.perf_counter() - self._start
        self.train.append((forwards_of(trainer), outputs["loss"].detach()))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what a validation says, that before the first step too."""
        if trainer.state.fn == TrainerFn.FITTING:
            metrics = trainer.callback_metrics
            self.dev.append((forwards_of(trainer), float(metrics["val/loss"]), float(metrics["val/acc"])))

    def curve(self) -> list[dict[str, Any]]:
        """Points of the training loss, smoothed, and of the dev loss; those that are not finite are left out."""
        width = math.ceil(len(self.train) / WINDOWS) or 1
        parts = [self.train[start : start + width] for start in range(0, len(self.train), width)]
        points = [(mean(at for at, _ in part), mean(float(loss) for _, loss in part), "train") for part in parts]
        points += [(at, loss, "dev") for at, loss, _ in self.dev]
        return [{"forwards": round(at), "split": split, "loss": loss} for at, loss, split in points if math.isfinite(loss)]


def forwards_of(trainer: Trainer) -> float:
    """Forwards so far: what the optimizer has counted; a first-order one counts none, and a convention does."""
    counted = getattr(trainer.optimizers[0], "forwards", None)
    return BACKWARD * trainer.global_step if counted is None else float(counted)


def measure(order: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Do what is ordered.

    Args:
        order: The run, and what all runs have in common; see ``compare.py``.
        folder: For checkpoints and logs.

    Returns:
        The row, the points of its curve, and the seconds of its steps.
    """
    torch.set_num_threads(order["threads"])
    run = Run(**order["run"])
    recorder = Recorder()
    found = dict.fromkeys(("dev_loss", "test_loss", "last_test_loss"), math.inf)
    found |= dict.fromkeys(("dev_acc", "test_acc", "last_test_acc"), math.nan)
    steps, forwards = 0, 0.0
    made: ZOCLI | None = None
    try:
        if run.method == ZERO_SHOT:
            made = instantiate(order, run, folder)
            seen = evaluate(made, None)
            (dev,) = made.trainer.validate(made.model, made.datamodule, verbose=False)
            found = {**found, "dev_loss": dev["val/loss"], "dev_acc": dev["val/acc"], **seen, **_last(seen)}
        else:
            made = instantiate(order, run, folder, affordable(order, run, folder))
            made.trainer.callbacks.append(recorder)  # type: ignore[attr-defined]
            made.trainer.fit(made.model, made.datamodule)
            forwards = forwards_of(made.trainer)
            best = getattr(made.trainer.checkpoint_callback, "best_model_path", "")
            last = _last(evaluate(made, None))
            seen = evaluate(made, best) if best else {}  # there is none where no dev loss was finite
            _, dev_loss, dev_acc = min(recorder.dev[1:], key=lambda point: point[1])
            found = {**found, "dev_loss": dev_loss, "dev_acc": dev_acc, **last, **seen}
    except (NonFiniteLossError, CalibrationError) as error:
        print(f"{run}: {type(error).__name__}: {error}", file=sys.stderr)
        forwards = forwards_of(made.trainer) if made is not None and made.trainer.optimizers else 0.0
    steps = len(recorder.train)
    diverged = not all(math.isfinite(value) for name, value in found.items() if name.endswith("loss"))
    if diverged:  # also where an earlier checkpoint is a good one: the rate is no rate to choose
        found = {name: math.inf if name.endswith("loss") else math.nan for name in found}
    on_gpu = order["accelerator"] == "gpu"
    row = {
        **order["run"],
        **found,
        "steps": steps,
        "forwards": round(forwards),
        "device": torch.cuda.get_device_name() if on_gpu else order["accelerator"],
        "seconds": round(time.time() - order["began"], 1),  # the start of the process included
        "diverged": diverged,
        "model": order["name"],
        "precision": order["precision"],
    }
    Row(**row)  # the columns are complete
    return {"row": row, "curve": recorder.curve(), "training_seconds": recorder.seconds}


def instantiate(order: dict[str, Any], run: Run, folder: Path, steps: int | None = None) -> ZOCLI:
    """Module, data and trainer, from the same configurations as on the command line.

    Args:
        order: See :func:`measure`.
        run: The run.
        folder: For checkpoints and logs.
        steps: The steps of the run; None for an optimizer that never steps.
    """
    arguments = ["--config", order["config"]]
    batch_size = yaml.safe_load(Path(order["config"]).read_text())["data"]["init_args"]["batch_size"]
    if run.method != ZERO_SHOT:
        arguments += ["--config", str(Path(order["methods"]) / f"{run.method}.yaml")]
    given = {
        "model.model_name_or_path": order["model"],
        "data.task": run.task,
        "data.data_dir": str(Path(order["data"]) / run.task),
        "data.batch_size": batch_size,  # whatever a method's own is: forwards of another size would not be equal
        "trainer.max_steps": steps or 0,
        "seed_everything": run.seed,
        "trainer.default_root_dir": str(folder),
        "trainer.accelerator": order["accelerator"],
        "trainer.precision": order["precision"],
        "trainer.enable_progress_bar": "false",
    }
    if steps is None:
        given |= {"trainer.logger": "false", "trainer.enable_checkpointing": "false", "trainer.num_sanity_val_steps": 0}
    if run.rate is not None:
        given["model.optimizer.init_args.lr"] = run.rate
    for name, value in given.items():
        arguments += [f"--{name}", str(value)]
    return cli([*arguments, *order["options"]], run=False)


def affordable(order: dict[str, Any], run: Run, folder: Path) -> int:
    """The steps that the run's budget of forwards is enough for; its optimizer says what a step costs."""
    made = instantiate(order, run, folder)
    made.trainer.fit(made.model, made.datamodule)  # of no step: it makes the optimizer
    optimizer: Any = made.trainer.optimizers[0]
    if not hasattr(optimizer, "forwards"):
        return steps_within(run.budget, BACKWARD)
    each, calibration = optimizer.forwards_per_step, 0
    for callback in made.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AdaNAGED):
            each, calibration = each + optimizer.forwards_for_curvature / callback.interval, CALIBRATION
    return steps_within(run.budget, each, calibration)


def evaluate(made: ZOCLI, checkpoint: str | None) -> dict[str, float]:
    """Loss and accuracy on the test rows."""
    (result,) = made.trainer.test(made.model, made.datamodule, ckpt_path=checkpoint, verbose=False)
    return {"test_loss": result["test/loss"], "test_acc": result["test/acc"]}


def _last(seen: dict[str, float]) -> dict[str, float]:
    return {f"last_{name}": value for name, value in seen.items()}


def main() -> int:
    """Run, and write the result or what went wrong."""
    source, target = (Path(argument) for argument in sys.argv[1:])
    sys.argv = sys.argv[:1]  # LightningCLI warns of arguments that look like its own
    try:
        with quiet():
            result = measure(json.loads(source.read_text()), target.parent / "run")
    except (Exception, SystemExit) as error:
        if isinstance(error, Exception):  # the other is how the command line's parser ends, after its own message
            traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result))
    os.replace(unfinished, target)
    return 1 if "error" in result else 0


if __name__ == "__main__":
    raise SystemExit(main())
