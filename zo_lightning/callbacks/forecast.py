"""One line before the first step: memory, time per step, and when the run will end; and another if it will be later."""

from __future__ import annotations

import math
import statistics
import sys
import time
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from zo_lightning.modules import ZOModule, batches_per_step, planned_steps
from zo_lightning.optim import ParameterFree, ZerothOrder

__all__ = ["Forecast"]

_TIMED = 5  # steps that are timed, after a first one that may calibrate
_LATE = 60.0  # seconds by which an end must be later for another line


class Forecast(Callback):
    """Says before the first step what the run needs, from a rehearsal of the forwards of the first step.

    For example ``5.4 M parameters in 20.6 MiB, peak memory 512 MiB; 0.12 s per step; 900 steps end at about 14:32 (in 2 min)``.
    The memory is the peak so far: of the device's allocations on CUDA, of the process elsewhere. The end counts the
    validations, where the sanity check ran a whole one (``num_sanity_val_steps=-1``). A later batch may be longer than the
    first, and updates may take longer than forwards, as those that orthogonalise matrices do: where the first steps show that
    the run ends more than a minute and a tenth later, a second line says so. Works with
    :class:`~zo_lightning.modules.ZOModule`; silent with others.
    """

    def __init__(self) -> None:
        self._said = False
        self._validation_start = 0.0
        self._validation_seconds = 0.0
        self._said_seconds = 0.0  # of a step
        self._batches = 0
        self._starts: list[float] | None = None  # of steps, while they are timed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new fit gets a new line."""
        self._said = stage != "fit" or not isinstance(pl_module, ZOModule)
        self._starts = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a validation."""
        self._validation_start = time.perf_counter()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read it, if the validation is a whole one."""
        if math.isinf(trainer.num_sanity_val_steps):
            self._validation_seconds = time.perf_counter() - self._validation_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure and say, once, and look at the clock in the first steps."""
        if self._said:
            self._time(trainer)
            return
        self._said = True
        assert isinstance(pl_module, ZOModule)
        optimizer = trainer.optimizers[0]
        if not isinstance(optimizer, ZerothOrder):
            return  # a step by backpropagation cannot be tried without being taken
        with trainer.precision_plugin.train_step_context():
            seconds, peak = _measure(pl_module, batch, optimizer)
        count = sum(p.numel() for p in pl_module.parameters())
        weights = sum(p.numel() * p.element_size() for p in pl_module.parameters())
        seconds *= (1 + _curvature_share(optimizer)) * batches_per_step(trainer)
        rank_zero_info(
            f"{count / 1e6:.1f} M parameters in {_size(weights)}, peak memory {_size(peak)}; {self._times(trainer, seconds)}"
        )
        self._said_seconds, self._batches, self._starts = seconds, 0, []

    def _time(self, trainer: Trainer) -> None:
        """Time the first steps, and say so if they take longer than their forwards alone."""
        if self._starts is None:
            return
        self._batches += 1
        if self._batches % batches_per_step(trainer):
            return
        self._starts.append(time.perf_counter())
        if len(self._starts) <= _TIMED:
            return
        each = statistics.median(b - a for a, b in pairwise(self._starts))  # one of them may have a validation in it
        self._starts = None
        steps = planned_steps(trainer) - trainer.global_step
        late = (each - self._said_seconds) * steps
        if late > _LATE and late > 0.1 * self._total(trainer, self._said_seconds):
            rank_zero_info(f"with their updates, {self._times(trainer, each)}")

    def _total(self, trainer: Trainer, seconds: float) -> float:
        """Seconds of the steps that are left, and of their validations."""
        steps = planned_steps(trainer) - trainer.global_step
        batches = steps * batches_per_step(trainer)
        validations = math.ceil(batches / trainer.val_check_batch) if trainer.val_check_batch and math.isfinite(batches) else 0
        return steps * seconds + validations * self._validation_seconds

    def _times(self, trainer: Trainer, seconds: float) -> str:
        each = f"{seconds:.2g} s per step"
        steps = planned_steps(trainer) - trainer.global_step
        if math.isinf(steps):
            return f"{each}; the number of steps is not known"
        total = self._total(trainer, seconds)
        now = datetime.now()
        end = now + timedelta(seconds=total)
        clock = f"{end:%H:%M}" if end.date() == now.date() else f"{end:%Y-%m-%d %H:%M}"
        return f"{each}; {steps:.0f} steps end at about {clock} (in {_duration(total)})"


@torch.no_grad()
def _measure(module: ZOModule, batch: Any, optimizer: ZerothOrder) -> tuple[float, float]:
    """Seconds of the forwards of a step, and the peak memory in bytes. Leaves no trace in the module."""
    closure, stacked = module.closures(batch)
    seconds = optimizer.rehearse(closure, stacked=stacked)
    return seconds, _peak_memory(next(iter(optimizer.named_parameters().values())).device)


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux, bytes on macOS


def _curvature_share(optimizer: ZerothOrder) -> float:
    """Forwards for the curvature over those of a step."""
    if not isinstance(optimizer.step_rule, ParameterFree):
        return 0.0
    return optimizer.forwards_for_curvature / (optimizer.step_rule.interval * optimizer.forwards_per_step)


def _size(count: float) -> str:
    if math.isnan(count):
        return "unknown"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
