"""When to validate in a run that is measured in steps."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from zo_lightning.modules import batches_per_step, planned_steps

__all__ = ["SpacedValidation"]


class SpacedValidation(Callback):
    """Validates a number of times per run, evenly spaced over its steps, and always after the last step.

    Lightning counts ``val_check_interval`` from the first batch, so that the last weights of a run whose length is no multiple
    of it would never be validated, nor kept as the best checkpoint. A Trainer that was given ``val_check_interval`` or
    ``check_val_every_n_epoch`` keeps its intervals, as does a run of unknown length; the last validation comes in any case.

    Args:
        times: Validations per run.

    Raises:
        ValueError: If ``times`` is less than 1.
    """

    def __init__(self, times: int = 5) -> None:
        if times < 1:
            raise ValueError(f"times must be at least 1, got {times}")
        self.times = times

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the interval, once the number of steps is known."""
        steps = planned_steps(trainer)
        untouched = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
        if untouched and math.isfinite(steps):
            trainer.check_val_every_n_epoch = None  # count batches across epochs
            trainer.val_check_batch = math.ceil(steps / self.times) * batches_per_step(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last step, ask for the stop that is due anyway: the Trainer validates before a requested one."""
        if trainer.global_step >= planned_steps(trainer):
            trainer.should_stop = True
