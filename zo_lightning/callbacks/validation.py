"""When to validate in a run that is measured in steps."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["SpacedValidation"]


class SpacedValidation(Callback):
    """Validates a number of times per run, evenly spaced, and always after the last step.

    Lightning counts ``val_check_interval`` from the first batch, so that the last weights of a run whose length is no multiple
    of it would never be validated, nor kept as the best checkpoint. The intervals are those of the Trainer where it was
    given ``val_check_interval`` or ``check_val_every_n_epoch``, or no ``max_steps``; the last validation comes in any case.

    Args:
        times: Validations per run.

    Raises:
        ValueError: If ``times`` is less than 1.
    """

    def __init__(self, times: int = 5) -> None:
        if times < 1:
            raise ValueError(f"times must be at least 1, got {times}")
        self.times = times

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the interval, before the Trainer sets up its loops."""
        untouched = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
        if stage == "fit" and untouched and trainer.max_steps > 0:
            trainer.check_val_every_n_epoch = None  # count batches across epochs
            trainer.val_check_interval = math.ceil(trainer.max_steps / self.times)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last step, ask for the stop that is due anyway: the Trainer validates before a requested one."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True
