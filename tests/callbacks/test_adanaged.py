"""The AdaNAGED callback: hand-over of the geometry, logs, refusals, schedules, and resuming."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.quadratic import Quadratic, StopAt, loader, trainer, weights
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.optim import ZerothOrder

KEYS = {"zo/lr", "zo/smoothing", "zo/curvature", "zo/gap", "zo/gain", "zo/forwards", "zo/skipped"}


class Record(Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def run(tmp_path, module=None, steps=8, ckpt_path=None, callbacks=(), **arguments):
    record = Record()
    callbacks = [AdaNAGED(**arguments), *callbacks, record]
    fit = trainer(tmp_path, max_steps=steps, callbacks=callbacks, enable_checkpointing=len(callbacks) > 2)
    module = module if module is not None else Quadratic()
    fit.fit(module, loader(), ckpt_path=ckpt_path)
    return module, fit, record.rows


def test_logs_every_value(tmp_path):
    module, fit, rows = run(tmp_path)
    assert set(rows[-1]) >= KEYS
    optimizer = fit.optimizers[0]
    assert rows[-1]["zo/lr"] == pytest.approx(optimizer.last.lr)
    assert rows[-1]["zo/smoothing"] == pytest.approx(optimizer.last.smoothing)
    assert rows[-1]["zo/forwards"] == optimizer.forwards == module.evaluations


def test_logs_only_what_the_loggers_write(tmp_path):
    record = Record()
    fit = trainer(tmp_path, max_steps=7, callbacks=[AdaNAGED(), record])
    fit.log_every_n_steps = 3
    fit.fit(Quadratic(), loader())
    assert ["zo/forwards" in row for row in record.rows][:3] == [False, False, True]
    assert record.rows[5]["zo/forwards"] > record.rows[4]["zo/forwards"] == record.rows[2]["zo/forwards"]


def test_horizon_is_the_trainers(tmp_path):
    _, fit, _ = run(tmp_path, steps=5)
    assert fit.optimizers[0].step_rule.total_steps == 5
    callback = AdaNAGED()
    fit = trainer(tmp_path, max_epochs=2, callbacks=[callback])
    fit.fit(Quadratic(), loader(3))
    assert callback.rule.total_steps == 6
    _, fit, _ = run(tmp_path, steps=5, total_steps=9)
    assert fit.optimizers[0].step_rule.total_steps == 9


def test_unknown_horizon_still_runs(tmp_path):
    callback = AdaNAGED()
    fit = trainer(tmp_path, max_epochs=-1, callbacks=[callback, StopAt(3)])
    fit.fit(Quadratic(), loader())
    assert callback.rule.total_steps is None
    assert fit.global_step == 3


def test_default_geometry_knows_the_module(tmp_path):
    _, fit, _ = run(tmp_path, steps=1)
    groups = {name: group["geometry"] for group in fit.optimizers[0].param_groups for name in group["param_names"]}
    assert groups == {"net.weight": "spectral", "net.bias": "sign"}


def test_geometry_is_handed_over(tmp_path):
    rules = {"matrix": {"name": "row", "radius": 2.0}, "*.bias": None}
    _, fit, _ = run(tmp_path, steps=1, geometry=rules)
    groups = fit.optimizers[0].param_groups
    assert [(g["param_names"], g["geometry"], g["radius"]) for g in groups] == [(["net.weight"], "row", 2.0)]


def test_the_optimizers_own_geometry_stays_without_one(tmp_path):
    module = Quadratic(optimizer=lambda params: ZerothOrder(params, geometry={"matrix": "euclidean"}))
    _, fit, _ = run(tmp_path, module, steps=1)
    assert [g["geometry"] for g in fit.optimizers[0].param_groups] == ["euclidean", "sign"]


# ---- resuming -----------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resuming_is_exact(tmp_path):
    """Stop at 4 of 8 and go on: weights, logs, callback and optimizer state equal the uninterrupted run's, bit for bit."""
    whole, fit, rows = run(tmp_path)
    keep = ModelCheckpoint(tmp_path, "half", every_n_train_steps=4)
    _, _, first = run(tmp_path, steps=4, total_steps=8, callbacks=[keep])
    resumed, again, second = run(tmp_path, ckpt_path=tmp_path / "half.ckpt")
    assert again.global_step == 8
    assert first + second == rows
    assert torch.equal(weights(whole), weights(resumed))
    assert again.callbacks[0].state_dict() == fit.callbacks[0].state_dict()
    theirs, ours = (t.optimizers[0].state_dict() for t in (fit, again))
    assert theirs["param_groups"] == ours["param_groups"]
    assert theirs["step_rule"] == ours["step_rule"]


def test_state_is_plain(tmp_path):
    _, half, _ = run(tmp_path, steps=2)
    half.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert stored["callbacks"]["AdaNAGED"]["rule"] == stored["optimizer_states"][0]["step_rule"]


def test_a_second_fit_starts_afresh(tmp_path):
    callback = AdaNAGED()
    forwards = []
    for _ in range(2):
        fit = trainer(tmp_path, max_steps=2, callbacks=[callback])
        fit.fit(Quadratic(), loader())
        forwards.append(fit.optimizers[0].forwards)
    assert forwards[0] == forwards[1]  # calibrated both times


# ---- schedules ----------------------------------------------------------------------------------------------------------
def test_linear_decay_reaches_the_last_step(tmp_path):
    _, _, rows = run(tmp_path, steps=50)
    assert rows[-1]["zo/lr"] < 0.1 * max(row["zo/lr"] for row in rows)


def test_scheduler_multiplies_and_replaces_the_decay(tmp_path):
    """A scheduler that is constant at a half: the first γ is half of that without decay."""
    factor = 0.5

    def half(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor)

    _, fit, scheduled = run(tmp_path, Quadratic(lr_scheduler=half), steps=1)
    assert fit.optimizers[0].step_rule.schedule == "constant"
    _, _, constant = run(tmp_path, steps=1, schedule="constant")
    assert scheduled[0]["zo/lr"] == pytest.approx(factor * constant[0]["zo/lr"])
    assert scheduled[0]["zo/smoothing"] == constant[0]["zo/smoothing"]


# ---- non-finite losses --------------------------------------------------------------------------------------------------
class Poisoned(Quadratic):
    """The third batch is NaN."""

    def loss(self, batch):
        return super().loss(batch) * (torch.nan if self.trainer.global_step == 2 else 1.0)


def test_skipped_steps_are_counted_and_the_run_goes_on(tmp_path):
    with pytest.warns(UserWarning, match="the update is skipped"):
        _, fit, rows = run(tmp_path, Poisoned(), steps=4)
    assert [row["zo/skipped"] for row in rows] == [0, 0, 1, 1]
    assert fit.global_step == 4
    assert math.isfinite(float(weights(fit.lightning_module).sum()))


# ---- refusals -----------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*max_epochs.* was not set")
def test_unset_length_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"--trainer\.max_steps.*AdaNAGED\(total_steps=\.\.\.\)"):
        trainer(tmp_path, callbacks=[AdaNAGED()]).fit(Quadratic(), loader())


def test_two_of_them_are_refused(tmp_path):
    class Mine(AdaNAGED):
        """Another class: Lightning itself refuses two of the same."""

    with pytest.raises(MisconfigurationException, match="two AdaNAGED callbacks"):
        trainer(tmp_path, max_steps=1, callbacks=[AdaNAGED(), Mine()]).fit(Quadratic(), loader())


def test_updates_that_are_not_normalised_are_refused(tmp_path):
    module = Quadratic(optimizer=lambda params: ZerothOrder(params, update="sgd"))
    with pytest.raises(MisconfigurationException, match="needs steps of unit norm, which update='sgd' does not take"):
        run(tmp_path, module)


def test_two_rules_are_refused(tmp_path):
    module = Quadratic(optimizer=lambda params: ZerothOrder(params, step_rule=AdaNAGED().rule))
    with pytest.raises(MisconfigurationException, match="a step_rule of its own"):
        run(tmp_path, module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"geometry": {"matrix": "spectal"}}, r"geometry\['matrix'\].*column, euclidean, row, sign, spectral, got 'spectal'"),
        ({"geometry": {"matrix": {"nam": "row"}}}, "unknown key 'nam'"),
        ({"probe_rise": 0}, "probe_rise must be positive"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"schedule": "cosine"}, "schedule must be 'linear' or 'constant'"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
    ],
)
def test_arguments_are_checked_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaNAGED(**arguments)


def test_pattern_that_matches_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"'lm_head\*' matches no trainable parameter"):
        run(tmp_path, geometry={"lm_head*": "row"})
