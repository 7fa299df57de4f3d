"""The progress bar's numbers."""

import pytest
from rich.progress import Task

from tests.quadratic import Quadratic, loader, trainer
from zo_lightning.callbacks import AdaNAGED, ZOProgressBar


class Spy(ZOProgressBar):
    """Notes the bar after each batch."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[float, float | None]] = []
        self.shown: dict = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        bar: Task = self.train_progress_bar
        self.seen.append((bar.completed, bar.total))
        self.shown = self.get_metrics(trainer, pl_module)
        self.text = " ".join(self._metric_component._generate_metrics_texts())
        self.description = self.progress.columns[0].render(bar).plain


@pytest.fixture
def bar(tmp_path):
    spy = Spy()
    fit = trainer(tmp_path, max_steps=10, callbacks=[AdaNAGED(), spy], enable_progress_bar=True)
    fit.fit(Quadratic(), loader())
    return spy


def test_one_bar_over_all_steps(bar):
    """Ten steps of four batches per epoch."""
    assert bar.seen == [(step, 10) for step in range(1, 11)]
    assert bar.description == "Training"


def test_shows_loss_step_size_and_smoothing(bar):
    assert set(bar.shown) == {"loss", "γ", "τ"}
    assert bar.text == " ".join(f"{name}: {bar.shown[name]:.3g}" for name in bar.shown)
