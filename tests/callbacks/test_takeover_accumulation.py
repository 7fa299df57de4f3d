"""Several batches that make one step, in the Trainer: for modules that are taken over, and for the package's own."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from tests.callbacks.foreign import BATCHES, ROWS, Classifier, loader, make_trainer, seeded, tensors, weights
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.modules import ZOModule, planned_steps
from zo_lightning.optim import ZerothOrder


class Own(ZOModule):
    def __init__(self, body, **arguments):
        super().__init__(optimizer=partial(ZerothOrder, probes="sequential"), **arguments)
        self.body = body

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.body(x), y, reduction="none")

    def validation_step(self, batch, batch_idx):
        """Lightning warns of a validation loader without it."""


def make(kind, every, **arguments):
    body = seeded(Classifier, dropout=0.0, norm=False, **arguments)
    if kind == "taken over":
        return body, {"accumulate_grad_batches": every}
    return Own(body.body, accumulate_grad_batches=every), {}


class Trace(Callback):
    def __init__(self):
        self.steps, self.counts, self.moved, self.last = [], [], [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        zo = next(callback for callback in trainer.callbacks if isinstance(callback, AdaNAGED))
        self.steps.append(trainer.global_step)
        self.counts.append(zo.optimizer.forwards)
        zo.optimizer.fold()
        now = weights(pl_module.body)
        self.moved.append(self.last is None or not torch.equal(now, self.last))
        self.last = now


def fit(folder, kind, every, data, **arguments):
    module, named = make(kind, every)
    zo, trace = AdaNAGED(), Trace()
    trainer = make_trainer(folder, callbacks=[zo, trace], limit_val_batches=0, **named, **arguments)
    torch.manual_seed(7)
    trainer.fit(module, data, loader())
    return module, zo, trace, trainer


KINDS = pytest.mark.parametrize("kind", ["taken over", "own"])


@KINDS
def test_k_batches_give_the_step_of_one_that_is_k_times_as_large(kind, tmp_path):
    """The first window holds one batch three times, since a calibration is that of the first batch."""
    x, y = (tensor.split(ROWS) for tensor in tensors(12))
    order = [0, 0, 0, *range(3, 12)]
    small = [[x[k], y[k]] for k in order]
    large = [[torch.cat([b[i] for b in small[k : k + 3]]) for i in range(2)] for k in range(0, 12, 3)]
    split, a, trace, first = fit(tmp_path, kind, 3, DataLoader(small, batch_size=None), max_steps=4)
    joint, b, _, second = fit(tmp_path, kind, 1, DataLoader(large, batch_size=None), max_steps=4)
    assert first.global_step == second.global_step == 4
    torch.testing.assert_close(weights(split.body), weights(joint.body), rtol=1e-5, atol=1e-6)
    left, right = a.rule.state_dict(), b.rule.state_dict()
    assert left.pop("reference") is right.pop("reference") is None
    assert left == pytest.approx(right, rel=1e-4)
    assert a.optimizer.last.loss == pytest.approx(b.optimizer.last.loss, rel=1e-5)
    assert trace.steps == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    start = weights(seeded(Classifier, dropout=0.0, norm=False).body)
    assert (weights(joint.body) - start).abs().max() > 1e-3


@KINDS
@pytest.mark.parametrize(("every", "per_epoch"), [(1, 6), (2, 3), (4, 2), (5, 2), (6, 1), (7, 1)])
def test_the_last_batches_of_an_epoch_make_a_step(kind, every, per_epoch, tmp_path):
    _, zo, trace, trainer = fit(tmp_path, kind, every, loader(), max_epochs=2)
    assert trainer.global_step == zo.optimizer.step_index == 2 * per_epoch == planned_steps(trainer)
    assert zo.rule.total_steps == 2 * per_epoch
    ends = [(k + 1) % every == 0 or k == BATCHES - 1 for k in range(BATCHES)] * 2
    assert [after > before for before, after in zip([0, *trace.steps], trace.steps, strict=False)] == ends
    assert trace.moved[1:] == ends[1:]
    spent = [after - before for before, after in zip(trace.counts, trace.counts[1:], strict=False)]
    extra = [index for index, count in enumerate(spent, 1) if count == 3]  # the curvature's centre, every tenth step
    assert set(spent) <= {2, 3}
    assert {trace.steps[index - 1] for index in extra} <= {0, 10}


@KINDS
@pytest.mark.parametrize("limits", [{"max_epochs": 3, "max_steps": 5}, {"max_steps": 5}])
def test_the_planned_steps_are_those_taken(kind, limits, tmp_path):
    _, zo, _, trainer = fit(tmp_path, kind, 4, loader(), **limits)
    assert trainer.global_step == planned_steps(trainer) == zo.rule.total_steps == 5


def test_schedulers_are_stepped_once_per_step(tmp_path):
    rates = {}
    for every in (1, 3):
        module = seeded(Classifier, "step", 0.0)
        zo, seen = AdaNAGED(), []

        class Rate(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, zo=zo, seen=seen):
                if zo.optimizer.progress[1] == 0:
                    seen.append(zo.optimizer.last.lr / zo.rule.step_size)

        trainer = make_trainer(
            tmp_path, max_steps=6, callbacks=[zo, Rate()], limit_val_batches=0, accumulate_grad_batches=every
        )
        trainer.fit(module, loader(), loader())
        rates[every] = seen
        assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 6
    assert rates[3] == pytest.approx(rates[1])
    assert rates[1] == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])


def test_a_logged_loss_is_that_of_each_batch(tmp_path):
    """Not divided by their number, as the loss for backward is."""
    losses = []

    class Recorded(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append((batch_idx, float(loss)))
            return loss

    logged = []

    class Seen(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged.append(float(trainer.callback_metrics["train_loss_step"]))

    trainer = make_trainer(
        tmp_path, max_steps=2, callbacks=[AdaNAGED(), Seen()], limit_val_batches=0, accumulate_grad_batches=2
    )
    trainer.fit(seeded(Recorded, dropout=0.0), loader(), loader())
    for index in (1, 2, 3):
        assert logged[index] == pytest.approx(next(loss for batch, loss in losses if batch == index))


def test_a_window_of_less_than_one_batch_is_refused():
    with pytest.raises(ValueError, match="accumulate_grad_batches must be at least 1, got 0"):
        ZOModule(accumulate_grad_batches=0)
