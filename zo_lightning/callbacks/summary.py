"""The table at the end of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from rich import get_console
from rich.table import Table

__all__ = ["MetricsTable"]


class MetricsTable(Callback):
    """Says the metrics of each validation in a line, and at the end prints those before, at the best checkpoint and at the end.

    The column *before* needs a whole validation as the sanity check, ``Trainer(num_sanity_val_steps=-1)``. Metrics whose
    names start with ``val`` count. ``Trainer.validate`` and ``Trainer.test`` print tables of their own.

    Attributes:
        before: The metrics before the first step.
        history: (step, metrics) of each validation.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.history: list[tuple[int, dict[str, float]]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        if stage == "fit":
            self.before, self.history = {}, []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of a validation."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if not trainer.sanity_checking:
            self.history.append((trainer.global_step, metrics))
        elif trainer.num_sanity_val_steps == float("inf") and not self.before:  # a resumed run has it from the checkpoint
            self.before = metrics
        else:
            return
        line = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        rank_zero_info(f"{'before' if trainer.sanity_checking else f'step {trainer.global_step}'}: {line}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        if trainer.is_global_zero and self.history:
            get_console().print(self._table(trainer))

    def _table(self, trainer: Trainer) -> Table:
        columns = {"before": self.before} if self.before else {}
        step, metrics = self._best(trainer)
        last_step, last = self.history[-1]
        if step != last_step:
            columns[f"best (step {step})"] = metrics
            columns[f"last (step {last_step})"] = last
        else:
            columns[f"after {last_step} steps"] = last
        table = Table("metric", title="Validation")
        for title in columns:
            table.add_column(title, justify="right")
        for name in metrics:
            table.add_row(name, *(f"{values[name]:.4f}" if name in values else "" for values in columns.values()))
        return table

    def _best(self, trainer: Trainer) -> tuple[int, dict[str, float]]:
        """The validation that the checkpoint callback would keep; the last one where it has no criterion."""
        checkpoint = trainer.checkpoint_callback
        monitor = str(getattr(checkpoint, "monitor", None))
        known = [entry for entry in self.history if monitor in entry[1]]
        if not known:
            return self.history[-1]
        sign = 1 if getattr(checkpoint, "mode", "min") == "min" else -1
        return min(known, key=lambda entry: sign * entry[1][monitor])

    def state_dict(self) -> dict[str, Any]:
        """The metrics so far, as plain numbers."""
        return {"before": self.before, "history": [list(entry) for entry in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.before = state_dict["before"]
        self.history = [(step, metrics) for step, metrics in state_dict["history"]]
