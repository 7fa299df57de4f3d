"""What every zeroth-order step is logged by."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from zo_lightning.callbacks.optimizers import zeroth_order
from zo_lightning.optim import StepReport, ZerothOrder

__all__ = ["StepMetrics"]


class StepMetrics(Callback):
    """Logs what each zeroth-order step measured, every ``log_every_n_steps``, unless AdaNAGED does.

    * ``zo/lr`` and ``zo/smoothing``, the step size and the smoothing radius,
    * ``zo/gain``, the cross-validated decrease of the loss per unit along the step's directions,
    * ``zo/forwards``, the batch losses evaluated so far, and ``zo/skipped``, the steps skipped for a loss that was not finite.
    """

    def __init__(self) -> None:
        self._optimizer: ZerothOrder | None = None
        self._skipped = 0
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizer."""
        from zo_lightning.callbacks.adanaged import AdaNAGED  # which logs by this file's function

        found = zeroth_order(trainer)
        driven = any(isinstance(callback, AdaNAGED) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        self._optimizer = found[0] if len(found) == 1 and not driven else None
        self._seen = 0 if self._optimizer is None else self._optimizer.step_index

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step, if the batch ended one."""
        optimizer = self._optimizer
        if optimizer is None or optimizer.step_index == self._seen or optimizer.last is None:
            return
        self._seen = optimizer.step_index
        self._skipped += not optimizer.last.finite
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            log_step(pl_module, optimizer.last, optimizer.forwards, self._skipped)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget it."""
        self._optimizer = None

    def state_dict(self) -> dict[str, Any]:
        """The number of skipped steps."""
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._skipped = int(state_dict["skipped"])


def log_step(module: LightningModule, report: StepReport, forwards: int, skipped: int, **more: float) -> None:
    """Log one step.

    Args:
        module: Logs.
        report: Of the step.
        forwards: Batch losses so far.
        skipped: Steps skipped so far.
        more: What else there is, by the name after ``zo/``.
    """
    module.log_dict({"zo/lr": report.lr, "zo/smoothing": report.smoothing}, prog_bar=True)
    values = {"gain": report.gain, "forwards": float(forwards), "skipped": float(skipped), **more}
    module.log_dict({f"zo/{name}": value for name, value in values.items()})
