"""The progress bar."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.progress import ProgressColumn, Task
from rich.text import Text

from zo_lightning.modules import planned_steps

__all__ = ["ZOProgressBar"]

_SHORT = {"train/loss": "loss", "zo/lr": "γ", "zo/smoothing": "τ"}


class ZOProgressBar(RichProgressBar):
    """Lightning's Rich progress bar as one bar over all steps of the run, with the loss, γ and τ to three digits.

    Epochs are short and steps are what a zeroth-order run is measured in; Lightning's own bar starts anew each epoch.

    Args:
        refresh_rate: Refreshes per second; 0 disables the bar.
        leave: Whether a finished bar stays.
    """

    def __init__(self, refresh_rate: int = 10, leave: bool = False) -> None:
        super().__init__(refresh_rate, leave, RichProgressBarTheme(metrics_format=".3g"))

    @property
    def total_train_batches(self) -> int | float:
        """The steps of the whole run."""
        return planned_steps(self.trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar in the first epoch only."""
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move to the step of the run rather than the batch of the epoch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Lightning's columns, with a description that does not count epochs."""
        return [_Description(), *super().configure_columns(trainer)[1:]]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """The metrics by short names."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return {_SHORT.get(name, name): value for name, value in items.items()}


class _Description(ProgressColumn):
    """The task's name, with "Training" for Lightning's "Epoch 3/-2"."""

    def render(self, task: Task) -> Text:
        return Text("Training" if task.description.startswith("Epoch") else task.description.strip())
