"""The Ledger callback: replays of fits, resuming byte for byte, interrupted fits, and what is refused."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from tests.quadratic import Quadratic, StopAt, Validated, loader, trainer, weights
from zo_lightning.callbacks import AdaNAGED, Ledger
from zo_lightning.ledger import read, replay, weights_hash
from zo_lightning.optim import ZerothOrder

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def optimizer(**arguments):
    return lambda params: ZerothOrder(params, **{"lr": 0.05, "interval": 3, "seed": 1, **arguments})


def run(tmp_path, module=None, steps=8, callbacks=(), ckpt_path=None, every_n_steps=3, **arguments):
    """Fit; the module before it, the module, and the ledger that was written."""
    module = Quadratic(optimizer=optimizer()) if module is None else module
    base = copy.deepcopy(module)
    ledger = Ledger(str(tmp_path / "x.safetensors"), every_n_steps)
    kept = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
    fit = trainer(tmp_path, max_steps=steps, callbacks=[ledger, *callbacks], **kept, **arguments)
    fit.fit(module, loader(), val_dataloaders=loader() if isinstance(module, Validated) else None, ckpt_path=ckpt_path)
    return base, module, read(tmp_path / "x.safetensors")


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def decayed(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


class Folds(Callback):
    """Writes the update after each step, as whoever reads the weights does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.optimizers[0].fold()


class Differentiated(Validated):
    """A validation with gradients, before which the update is written."""

    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            self.net(batch[0]).sum()
        return super().validation_step(batch, batch_idx)


class Poisoned(Quadratic):
    """The third batch is NaN."""

    def loss(self, batch):
        return super().loss(batch) * (torch.nan if self.trainer.global_step == 2 else 1.0)


FITS = {
    "default": {},
    "sgd with momentum": {
        "module": lambda: Quadratic(optimizer=optimizer(directions="gaussian", update="sgd", momentum=0.9, weight_decay=0.01))
    },
    "scheduled": {"module": lambda: Quadratic(optimizer=optimizer(num_directions=2), lr_scheduler=decayed)},
    "folded": {"callbacks": lambda: [Folds()]},
    "validated with gradients": {
        "module": lambda: Differentiated(optimizer=optimizer()),
        "val_check_interval": 2,
        "inference_mode": False,
    },
    "a step skipped": {"module": lambda: Poisoned(optimizer=optimizer())},
    "half": {"precision": "bf16-true"},
    "mixed": {"precision": "bf16-mixed"},
    "several batches per step": {
        "module": lambda: Quadratic(optimizer=optimizer(), accumulate_grad_batches=2),
        "max_epochs": 9,
    },
    "parameter-free": {"module": Quadratic, "callbacks": lambda: [AdaNAGED()]},
}


@pytest.mark.filterwarnings("ignore:.*the update is skipped")
@pytest.mark.parametrize("name", FITS, ids=[name.replace(" ", "-") for name in FITS])
def test_a_replay_is_the_fit_bit_for_bit(name, tmp_path):
    arguments = {key: value() if callable(value) else value for key, value in FITS[name].items()}
    base, module, record = run(tmp_path, **arguments)
    assert len(record) == 8
    base.loss = None
    base = base.to(next(module.parameters()).dtype)
    replay(base, record)
    assert same(base, module)
    assert record.final == weights_hash(module, buffers=False)
    if name != "default":
        return
    assert not same(base, Quadratic())
    assert (tmp_path / "x.safetensors").stat().st_size < 2000


class Half(Callback):
    """Gives up in the middle."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5, "num_directions": 2}, {"directions": "gaussian", "update": "sgd"}])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_resumed_run_writes_the_same_file(settings, precision, tmp_path):
    """Byte for byte, from a checkpoint within an interval; and the steps of the first part are the same."""
    make = lambda: Quadratic(optimizer=optimizer(**settings))  # noqa: E731
    _, whole, _ = run(tmp_path, make(), precision=precision)
    expected = (tmp_path / "x.safetensors").read_bytes()
    keep = ModelCheckpoint(tmp_path / "kept", "half", every_n_train_steps=4)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, make(), callbacks=[keep, Half(5)], precision=precision)
    cut = read(tmp_path / "x.safetensors")
    assert (len(cut), cut.final) == (5, None)
    stored = torch.load(tmp_path / "kept" / "half.ckpt", weights_only=True)
    assert set(stored["callbacks"]["Ledger"]["tensors"]) == {"rates", "flags", "slopes" if settings else "signs"}
    base, resumed, record = run(tmp_path, make(), precision=precision, ckpt_path=tmp_path / "kept" / "half.ckpt")
    assert (tmp_path / "x.safetensors").read_bytes() == expected
    base = base.to(next(resumed.parameters()).dtype)
    replay(base, record)
    assert same(base, whole)
    part = make().to(next(resumed.parameters()).dtype)
    replay(part, cut, steps=4)
    assert all(torch.equal(value, stored["state_dict"][name]) for name, value in part.state_dict().items())


def test_a_longer_run_goes_on(tmp_path):
    keep = ModelCheckpoint(tmp_path / "kept", "half", every_n_train_steps=4)
    run(tmp_path, steps=4, callbacks=[keep])
    _, whole, record = run(tmp_path, ckpt_path=tmp_path / "kept" / "half.ckpt")
    base = Quadratic()
    replay(base, record)
    assert same(base, whole)


def test_it_is_written_every_now_and_then(tmp_path):
    class Watch(Callback):
        lengths: list = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            path = tmp_path / "x.safetensors"
            self.lengths.append(len(read(path)) if path.exists() else None)

    run(tmp_path, callbacks=[Watch()])
    assert Watch.lengths == [None, None, 3, 3, 3, 6, 6, 6]


def test_a_second_fit_has_a_ledger_of_its_own(tmp_path):
    ledger = Ledger()
    module = Quadratic(optimizer=optimizer())
    for steps in (3, 5):
        base = copy.deepcopy(module)
        trainer(tmp_path, max_steps=steps, callbacks=[ledger]).fit(module, loader())
        record = read(tmp_path / "ledger.safetensors")
        assert len(record) == steps
        replay(base, record)
        assert same(base, module)


def test_its_place_is_the_loggers_folder(tmp_path):
    fit = trainer(tmp_path, max_steps=1, callbacks=[Ledger()], logger=CSVLogger(tmp_path))
    fit.fit(Quadratic(), loader())
    assert (tmp_path / "lightning_logs" / "version_0" / "ledger.safetensors").is_file()


def test_a_fit_that_a_callback_stops(tmp_path):
    base, module, record = run(tmp_path, callbacks=[StopAt(5)])
    assert len(record) == 5
    replay(base, record)
    assert same(base, module)


class OfAnother(Callback):
    """Takes the steps for a module that has an optimizer of torch."""

    def __init__(self):
        self.optimizer = None

    def on_train_start(self, trainer, pl_module):
        self.optimizer = ZerothOrder(pl_module.named_parameters(), seed=0).attach(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.optimizer.step(lambda: pl_module.net(batch[0]).square().mean(dim=1))
        self.optimizer.step(lambda: pl_module.net(batch[0]).square().mean(dim=1))

    def on_fit_end(self, trainer, pl_module):
        self.optimizer.detach()


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, affine=False))

    def training_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


def test_the_optimizer_of_another_callback_and_changed_buffers(tmp_path):
    """Two steps in each batch; and the running statistics are nothing that a replay has."""
    module = Plain()
    base = copy.deepcopy(module)
    path = str(tmp_path / "x")
    with pytest.warns(UserWarning, match="changed persistent buffers"):
        trainer(tmp_path, max_epochs=1, callbacks=[OfAnother(), Ledger(path)]).fit(module, loader())
    record = read(path)
    assert len(record) == 8
    replay(base, record)
    assert same(base, module)


class Backpropagated(LightningModule):
    """A module that knows nothing of this package."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 3)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.01)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_module_that_is_taken_over(parts, tmp_path):
    module = Backpropagated()
    base = copy.deepcopy(module)
    path = str(tmp_path / "x")
    callbacks = [Ledger(path), AdaNAGED()]
    trainer(tmp_path, max_steps=6, callbacks=callbacks, accumulate_grad_batches=parts).fit(module, loader())
    record = read(path)
    assert len(record) == 6
    replay(base, record)
    assert same(base, module)


# ---- refusals -----------------------------------------------------------------------------------------------------------
def test_a_module_without_such_an_optimizer(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"Ledger needs one zo_lightning\.optim\.ZerothOrder, .* found none"):
        trainer(tmp_path, max_epochs=1, callbacks=[Ledger(str(tmp_path / "x"))]).fit(Plain(), loader())
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_without_a_ledger(tmp_path):
    half = trainer(tmp_path, max_steps=4)
    half.fit(Quadratic(optimizer=optimizer()), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(MisconfigurationException, match=r"Ledger: the run has taken 4 steps that are in no ledger"):
        run(tmp_path, ckpt_path=tmp_path / "half.ckpt")


def test_a_checkpoint_made_after_the_fit(tmp_path):
    """The optimizer has been detached, and rounds from there on with the random numbers of a new run."""
    half = trainer(tmp_path, max_steps=4, callbacks=[Ledger()])
    half.fit(Quadratic(optimizer=optimizer()), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(MisconfigurationException, match="Ledger: the checkpoint was made after its fit had ended"):
        run(tmp_path, ckpt_path=tmp_path / "half.ckpt")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 9, "Ledger: seed changed from 1 to 9 at step 4"),
        ("radius", 3.0, "Ledger: parameter group 0 is not that of the"),
    ],
)
def test_a_checkpoint_of_other_settings(key, value, message, tmp_path):
    run(tmp_path, steps=4, callbacks=[ModelCheckpoint(tmp_path / "kept", "half", every_n_train_steps=4)])
    stored = torch.load(tmp_path / "kept" / "half.ckpt", weights_only=True)
    for group in stored["optimizer_states"][0]["param_groups"]:
        group[key] = value
    torch.save(stored, tmp_path / "other.ckpt")
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, ckpt_path=tmp_path / "other.ckpt")


def test_a_seed_that_changes_in_the_middle(tmp_path):
    class Reseed(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.optimizers[0].param_groups[0]["seed"] += trainer.global_step == 2

    with pytest.raises(ValueError, match="seed changed from 1 to 2 at step 2; a ledger holds one for the whole run"):
        run(tmp_path, callbacks=[Reseed()])
    assert len(read(tmp_path / "x.safetensors")) == 2


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        Ledger(every_n_steps=0)


def test_the_weights_are_those_of_a_run_without_it(tmp_path):
    _, module, _ = run(tmp_path)
    alone = Quadratic(optimizer=optimizer())
    trainer(tmp_path, max_steps=8).fit(alone, loader())
    assert torch.equal(weights(module), weights(alone))
