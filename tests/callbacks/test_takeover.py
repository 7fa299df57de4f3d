"""A LightningModule that knows nothing of the package, in a run that only differs by the callback."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger

from tests.callbacks.foreign import (
    BATCHES,
    SCHEDULES,
    Classifier,
    anatomy,
    batches,
    loader,
    make_trainer,
    mean_loss,
    rows,
    seeded,
    weights,
)
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.modules import ZOModule
from zo_lightning.optim import ZerothOrder


def run(folder, module=None, *, steps=None, epochs=None, callbacks=(), data=None, zo=None, **arguments):
    """Fit with the callback, or without it where ``zo`` is False."""
    module = module if module is not None else seeded(Classifier)
    torch.manual_seed(7)
    mine = [] if zo is False else [zo or AdaNAGED()]
    length = {"max_steps": steps, "limit_val_batches": 0} if epochs is None else {"max_epochs": epochs}
    fit = make_trainer(folder, callbacks=[*mine, *callbacks], **length, **arguments)
    fit.fit(module, data or loader(), loader(2))
    return module, fit


@pytest.fixture
def no_backward(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.Tensor, "backward", forbidden)
    for name in ("backward", "grad"):
        monkeypatch.setattr(torch.autograd, name, forbidden)


# ---- it trains ---------------------------------------------------------------------------------------------------------
def test_the_loss_falls_without_a_gradient(tmp_path, no_backward):
    module = seeded(Classifier)
    touched = [p.register_hook(lambda gradient: pytest.fail("a gradient came")) for p in module.parameters()]
    before = mean_loss(module.eval())
    run(tmp_path, module.train(), steps=600)
    after = mean_loss(module.eval())
    assert after < 0.6 * before
    assert all(p.grad is None for p in module.parameters())
    for handle in touched:
        handle.remove()


def test_ordinary_training_comes_back_after_it(tmp_path):
    module, _ = run(tmp_path, steps=3)
    before = mean_loss(module.eval())
    run(tmp_path, module.train(), epochs=20, zo=False)
    assert mean_loss(module.eval()) < 0.3 * before


# ---- whatever else a run has behaves as without the callback -----------------------------------------------------------
class Events(Callback):
    """The hooks that a callback sees, in order."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if name.startswith("on_") and not name.startswith(("on_save", "on_load")):
            return lambda trainer, *_, **__: self.seen.append((name, trainer.global_step, trainer.current_epoch))
        return super().__getattribute__(name)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_logs_and_checkpoints_are_those_of_an_ordinary_run(schedule, tmp_path):
    found = []
    for zo in (False, None):
        folder, events = tmp_path / str(zo), Events()
        keep = ModelCheckpoint(folder / "kept", "{epoch}-{step}", every_n_train_steps=4, save_top_k=-1)
        module, fit = run(
            folder,
            seeded(Classifier, schedule),
            epochs=3,
            zo=zo,
            callbacks=[LearningRateMonitor() if schedule != "none" else Callback(), keep, events],
            logger=CSVLogger(folder, name="log"),
            enable_checkpointing=True,
            log_every_n_steps=2,
        )
        table = [{key: value for key, value in row.items() if not key.startswith("zo/")} for row in rows(folder)]
        rates = [(row["step"], row["lr-SGD"]) for row in table if "lr-SGD" in row]
        names = sorted(path.name for path in (folder / "kept").iterdir())
        stored = torch.load(keep.best_model_path, weights_only=True)
        state = [len(stored["lr_schedulers"]), len(stored["optimizer_states"]), stored["global_step"], stored["epoch"]]
        shape = [(row.get("epoch"), row["step"], sorted(row)) for row in table]
        schedulers = [config.scheduler.last_epoch for config in fit.lr_scheduler_configs]
        found.append([shape, rates, names, state, schedulers, events.seen, module.epochs_ended, fit.global_step])
    for ordinary, taken in zip(*found, strict=True):
        assert taken == ordinary
    assert len(found[0][2]) == 4  # of 18 steps
    assert bool(found[0][1]) == (schedule != "none")


def test_the_rate_follows_the_schedule(tmp_path):
    """γ of the first steps: that of no schedule times the scheduler's factor."""
    rates = {}
    for schedule in ("none", "step"):
        zo = AdaNAGED(schedule="constant", interval=100)
        run(tmp_path, seeded(Classifier, schedule, 0.0), steps=1, zo=zo)
        rates[schedule] = zo.optimizer.last.lr
    assert rates["step"] == rates["none"]
    zo, seen = AdaNAGED(schedule="constant", interval=100), []

    class Rate(Callback):
        def on_train_batch_end(self, *args):
            seen.append(zo.optimizer.last.lr / zo.rule.step_size)

    run(tmp_path, seeded(Classifier, "step"), steps=6, zo=zo, callbacks=[Rate()])
    assert seen == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])


# ---- the module afterwards ---------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_the_module_is_left_as_an_ordinary_run_leaves_it(tmp_path):
    module, ordinary = seeded(Classifier), seeded(Classifier)
    for each in (module, ordinary):
        each.body[3].eval()  # modes of single layers are the user's
        each.body[0].requires_grad_(False)
    run(tmp_path, ordinary, epochs=1, zo=False)
    for _ in range(2):  # a second fit too
        run(tmp_path, module, epochs=1)
        assert anatomy(module) == anatomy(ordinary)
    twin = copy.deepcopy(module)
    x = torch.randn(4, 6)
    module.eval()
    assert torch.equal(twin.eval()(x), module(x))
    module.trainer = None
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(x), module(x))
    twin.body[0].weight.data.zero_()
    assert not torch.equal(twin(x), module(x))


class Interrupted(Classifier):
    """Fails within the third batch, at the evaluation with the given number."""

    error: type[BaseException] = ValueError
    at = 1
    tally: list[int]

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            type(self).tally.append(0)
            if len(self.tally) == self.at:
                raise self.error("stop")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2])
def test_the_module_is_left_alone_after_an_exception(error, at, tmp_path):
    class Mine(Interrupted):
        """A class of its own, whose tally no callback puts back."""

    Mine.error, Mine.at, Mine.tally = error, at, []
    reference, _ = run(tmp_path, seeded(Classifier, dropout=0.0), steps=2, zo=AdaNAGED(total_steps=9))
    module = seeded(Mine, dropout=0.0)
    blank = anatomy(module)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        run(tmp_path, module, steps=9)
    assert len(Mine.tally) == at
    assert anatomy(module)["body.0"] == blank["body.0"]
    assert not {"training_step", "backward", "optimizer_step", "lr_scheduler_step", "forward", "log"} & set(vars(module))
    # the weights are those of the last whole step: a fold may come at another time, which rounds differently
    torch.testing.assert_close(weights(module), weights(reference), rtol=1e-6, atol=1e-7)
    pickle.dumps(copy.deepcopy(module.body))


def test_an_instances_own_methods_come_back(tmp_path):
    module = seeded(Classifier)
    calls = []

    def step(batch, batch_idx):
        calls.append(batch_idx)
        return Classifier.training_step(module, batch, batch_idx)

    module.training_step = step
    run(tmp_path, module, steps=2)
    assert vars(module)["training_step"] is step
    assert "backward" not in vars(module)
    assert set(calls) == {0, 1}


def test_a_copy_made_during_the_run_trains_itself(tmp_path):
    """A copy's training_step is its own: not a detour to the original's weights."""
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            copies.append((copy.deepcopy(pl_module.body), mean_loss(pl_module.eval())))
            pl_module.train()

    run(tmp_path, seeded(Classifier, dropout=0.0), steps=4, callbacks=[Copy()])
    for body, loss in copies:
        assert mean_loss(body.eval()) == pytest.approx(loss, rel=1e-6)
    assert len({loss for _, loss in copies}) == 4


# ---- the same as the package's own module ------------------------------------------------------------------------------
class Own(ZOModule):
    def __init__(self, body, **arguments):
        super().__init__(optimizer=partial(ZerothOrder, probes="sequential"), **arguments)
        self.body = body

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.body(x), y)

    def validation_step(self, batch, batch_idx):
        """Lightning warns of a validation loader without it."""


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_those_of_a_zo_module_bit_for_bit(dropout, accumulate, tmp_path):
    foreign, fit = run(tmp_path, seeded(Classifier, dropout=dropout), steps=7, accumulate_grad_batches=accumulate)
    own = Own(seeded(Classifier, dropout=dropout).body, accumulate_grad_batches=accumulate)
    theirs = AdaNAGED()
    run(tmp_path, own, steps=7, zo=theirs)
    assert torch.equal(weights(foreign.body), weights(own.body))
    ours = fit.callbacks[0].optimizer
    assert ours.forwards == theirs.optimizer.forwards
    assert ours.step_rule.state_dict() == theirs.rule.state_dict()
    assert not torch.equal(weights(foreign.body), weights(seeded(Classifier).body))


@pytest.mark.parametrize("directions", ["gaussian", "rademacher"])
def test_the_optimizer_is_the_users_choice(directions, tmp_path):
    make = partial(ZerothOrder, directions=directions, momentum=0.9, num_directions=2, seed=5)
    zo = AdaNAGED(optimizer=make, geometry={"vector": "euclidean"})
    foreign, _ = run(tmp_path, seeded(Classifier, dropout=0.0), steps=4, zo=zo)
    own = Own(seeded(Classifier, dropout=0.0).body)
    own._make_optimizer = partial(make, probes="sequential")
    run(tmp_path, own, steps=4, zo=AdaNAGED(geometry={"vector": "euclidean"}))
    assert torch.equal(weights(foreign.body), weights(own.body))
    assert {group["geometry"] for group in zo.optimizer.param_groups} == {"sign", "euclidean"}


# ---- validation, tests, checkpoints ------------------------------------------------------------------------------------
def test_validation_sees_the_weights_of_the_moment(tmp_path):
    """With the update pending: no callback of this file looks on."""

    class Spied(Classifier):
        checked = 0

        def on_validation_epoch_end(self):
            logged = float(self.trainer.callback_metrics["val_loss"])
            folded = Classifier(dropout=0.0)
            folded.load_state_dict(self.state_dict())
            assert logged == pytest.approx(mean_loss(folded.eval(), batches(2)), rel=1e-5)
            Spied.checked += 1

    module, fit = run(tmp_path, seeded(Spied, dropout=0.0), epochs=3, num_sanity_val_steps=0)
    assert Spied.checked == 3
    assert module.training
    (result,) = fit.validate(module, loader(2), verbose=False)
    assert result["val_loss"] == pytest.approx(mean_loss(module.eval(), batches(2)), rel=1e-6)
    (result,) = fit.test(module, loader(3), verbose=False)
    assert result["test_loss"] == pytest.approx(mean_loss(module.eval(), batches(3)), rel=1e-6)


def test_its_checkpoint_is_a_plain_one(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    module, _ = run(tmp_path, seeded(Classifier, "step", 0.0), steps=10, callbacks=[keep], enable_checkpointing=True)
    loaded = Classifier.load_from_checkpoint(tmp_path / "step=10.ckpt")
    assert loaded.hparams == module.hparams
    assert torch.equal(weights(loaded), weights(module))
    stored = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    assert list(stored["state_dict"]) == list(Classifier().state_dict())
    half, _ = run(tmp_path, seeded(Classifier, "step", 0.0), steps=5, zo=AdaNAGED(total_steps=10))
    for name, value in half.state_dict().items():
        torch.testing.assert_close(stored["state_dict"][name], value, rtol=1e-6, atol=1e-7)


def test_weight_averaging_before_it_averages_the_true_weights(tmp_path):
    trace = []

    class Trace(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trace.append(weights(pl_module).double())

    average = EMAWeightAveraging(decay=0.75, use_buffers=False)
    module = seeded(Classifier, dropout=0.0, norm=False)
    first = weights(module).double()
    torch.manual_seed(7)
    fit = make_trainer(tmp_path, max_steps=BATCHES, callbacks=[average, AdaNAGED(), Trace()], limit_val_batches=0)
    fit.fit(module, loader(), loader(2))
    assert len(trace) == BATCHES
    assert not torch.equal(trace[0], first)
    mean = trace[0]  # the first update copies
    for values in trace[1:]:
        mean = 0.75 * mean + 0.25 * values
    torch.testing.assert_close(weights(module).double(), mean, rtol=1e-5, atol=1e-6)
