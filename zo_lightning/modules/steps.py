"""How many steps a run has, where several batches may make one."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer

__all__ = ["batches_per_step", "planned_steps"]


def batches_per_step(trainer: Trainer) -> int:
    """Batches that make one step: the Trainer's ``accumulate_grad_batches``, under manual optimization the module's own."""
    module = trainer.lightning_module
    if module.automatic_optimization:
        return int(trainer.accumulate_grad_batches)
    return int(getattr(module, "accumulate_grad_batches", 1))


def planned_steps(trainer: Trainer) -> int | float:
    """The number of optimizer steps of the run, infinite if it is not known.

    ``trainer.estimated_stepping_batches`` is just that, but for what it cannot know: a module's own accumulation.
    """
    steps = trainer.estimated_stepping_batches  # also sets up the data loader
    if steps < 0:  # the Trainer's max_steps=-1, for a loader without a length
        steps = math.inf
    each = batches_per_step(trainer)
    if trainer.lightning_module.automatic_optimization or each == 1 or trainer.max_epochs in (None, -1):
        return steps
    assert trainer.max_epochs is not None
    epochs = trainer.max_epochs * math.ceil(trainer.num_training_batches / each) if math.isfinite(steps) else steps
    return epochs if trainer.max_steps == -1 else min(epochs, trainer.max_steps)
