"""A run that is stopped in any way and resumed ends bit for bit as one that is not: weights, states, and log."""

import math
import os
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch.utils.data import DataLoader

from tests.quadratic import Validated, batches, trainer
from zo_lightning.callbacks import AdaNAGED, MetricsTable, ResumeCheckpoint, SpacedValidation
from zo_lightning.data import ShuffleSampler
from zo_lightning.data.loader import ResumableDataLoader
from zo_lightning.loggers import ResumableCSVLogger

STEPS = 20
EPOCH = 7
LOG = 3  # the last step is no multiple: its row repeats values of an earlier one


class Noisy(Validated):
    """Draws from all global generators, logs over steps and epochs, and has a buffer."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.register_buffer("seen", torch.zeros(()))

    def loss(self, batch):
        x, y = batch
        if self.training:
            self.seen += 1
        return super().loss((torch.nn.functional.dropout(x, 0.2, self.training), y))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("mean", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        self.log("max", loss, on_step=False, on_epoch=True, reduce_fx="max", batch_size=1)
        self.log("drawn", float(torch.rand(()) + np.random.rand() + random.random()), batch_size=1)  # noqa: NPY002
        return loss


class Stop(Callback):
    """Does something once, in or around the step after ``step``."""

    def __init__(self, step: int, action, hook: str) -> None:
        self.done = False

        def act(trainer, *_):
            if trainer.global_step == step and not self.done and not trainer.sanity_checking:
                self.done = True
                action()

        setattr(self, hook, act)


def fail() -> None:
    raise RuntimeError("stopped")


def loader(kind: type = ResumableDataLoader, **arguments) -> DataLoader:
    data = [(x[i], y[i]) for x, y in batches(EPOCH) for i in range(len(x))]
    return kind(data, batch_size=6, sampler=ShuffleSampler(data), **arguments)


def run(
    folder: Path,
    *callbacks,
    data=None,
    module=None,
    resume=False,
    best=False,
    steps=STEPS,
    accumulate_grad_batches=1,
    **arguments,
):
    module = module or Noisy()  # which draws its first weights
    seed_everything(3, verbose=False)
    keep = ResumeCheckpoint(**{"every_minutes": None, **arguments})
    given = [keep, AdaNAGED(), SpacedValidation(6), MetricsTable(), *callbacks]
    if best:
        given.append(ModelCheckpoint(folder / "best", "best", monitor="val/loss", enable_version_counter=False))
    logger = ResumableCSVLogger(folder, name="", version="log")
    fit = trainer(
        folder, max_steps=steps, callbacks=given, logger=logger, log_every_n_steps=LOG, num_sanity_val_steps=-1,
        enable_checkpointing=best, accumulate_grad_batches=accumulate_grad_batches,
    )  # fmt: skip
    path = folder / "log" / "checkpoints" / "last.ckpt"
    fit.fit(module, data or loader(), DataLoader(batches(2), batch_size=None), ckpt_path=path if resume else None)
    return fit


def stored(folder: Path) -> dict:
    return torch.load(folder / "log" / "checkpoints" / "last.ckpt", weights_only=True)


def table(folder: Path) -> bytes:
    return (folder / "log" / "metrics.csv").read_bytes()


def differences(a, b, at: str = "") -> list[str]:
    """Where two nested states differ, bit for bit."""
    if type(a) is not type(b):
        return [f"{at}: {a!r} and {b!r}"]
    if isinstance(a, dict):
        odd = [f"{at}: {key} on one side" for key in set(a) ^ set(b)]
        return odd + [line for key in set(a) & set(b) for line in differences(a[key], b[key], f"{at}/{key}")]
    if isinstance(a, (list, tuple)):
        odd = [] if len(a) == len(b) else [f"{at}: {len(a)} and {len(b)} entries"]
        return odd + [line for i, pair in enumerate(zip(a, b, strict=False)) for line in differences(*pair, f"{at}/{i}")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) and a.dtype == b.dtype else [f"{at}: {a} and {b}"]
    same = a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))
    return [] if same else [f"{at}: {a!r} and {b!r}"]


def check_same(folder: Path, whole: Path) -> None:
    a, b = stored(folder), stored(whole)
    for state in (a, b):
        for key in [key for key in state["callbacks"] if key.startswith("ModelCheckpoint")]:
            del state["callbacks"][key]
    assert differences(a, b) == []
    assert table(folder).decode() == table(whole).decode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder, every_n_steps=1000)
    return folder


# ---- exact resumes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [1, 2, 3, 4, 6, 7, 8, 13, 14, 18, 19])
def test_kept_by_step_and_then_killed(step, whole, tmp_path):
    """Checkpoints within an epoch, at its end (7, 14) and after validations (4, 8, ...); two steps are lost."""
    end = min(step + 2, STEPS - 1)
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, Stop(end, fail, "on_train_batch_start"), every_n_steps=step, on_exception=False)
    assert stored(tmp_path)["global_step"] == end // step * step
    run(tmp_path, resume=True)
    check_same(tmp_path, whole)


class Fails(Noisy):
    """Raises once in one of the forwards of a step."""

    def __init__(self, step: int, call: int, action=fail) -> None:
        super().__init__()
        self.step, self.call, self.calls, self.action = step, call, 0, action

    def loss(self, batch):
        if self.trainer.training and self.trainer.global_step == self.step:
            self.calls += 1
            if self.calls == self.call:
                self.action()
        return super().loss(batch)


@pytest.mark.parametrize("step", [1, 5, 7, 10, 16])
@pytest.mark.parametrize("call", [1, 2])
def test_loss_that_raises(step, call, whole, tmp_path, caplog):
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, module=Fails(step, call))
    assert stored(tmp_path)["global_step"] == step
    assert f"stopped after step {step}; {tmp_path}/log/checkpoints/last.ckpt goes on from step {step}" in caplog.text
    run(tmp_path, resume=True)
    check_same(tmp_path, whole)


@pytest.mark.parametrize("step", [2, 6, 12, 13, 14])
def test_sigterm(step, whole, tmp_path):
    """The step, and the epoch that ends with it, are finished first."""
    with pytest.raises(SIGTERMException):
        run(tmp_path, module=Fails(step, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert stored(tmp_path)["global_step"] == step + 1
    run(tmp_path, resume=True)
    check_same(tmp_path, whole)


@pytest.mark.parametrize("step", [3, 6, 7, 13])
def test_ctrl_c(step, whole, tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, module=Fails(step, 1, lambda: signal.raise_signal(signal.SIGINT)))
    assert stopped.value.code == 1
    assert "finishing the step; press Ctrl-C again to stop at once" in capfd.readouterr().err
    assert stored(tmp_path)["global_step"] == step + 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(tmp_path, resume=True)
    check_same(tmp_path, whole)


def test_second_ctrl_c_stops_at_once(whole, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    with pytest.raises(SystemExit):
        run(tmp_path, module=Fails(5, 2, twice))
    assert stored(tmp_path)["global_step"] == 5
    run(tmp_path, resume=True)
    check_same(tmp_path, whole)


def test_ctrl_c_in_the_last_step(whole, tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, module=Fails(STEPS - 1, 1, lambda: signal.raise_signal(signal.SIGINT)))
    check_same(tmp_path, whole)


def test_other_handlers_of_ctrl_c_stay(tmp_path):
    pressed = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    run(tmp_path, module=Fails(2, 1, lambda: signal.raise_signal(signal.SIGINT)))
    assert pressed == [True]


def test_stopped_again_and_again(whole, tmp_path):
    """Failing in the first step after a resume, and at each later one."""
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, module=Fails(1, 1))
    for step in (1, 2, 3, 6, 7, 8, 14, 19):
        with pytest.raises(RuntimeError, match="stopped"):
            run(tmp_path, module=Fails(step, 2), resume=True)
        assert stored(tmp_path)["global_step"] == step
    run(tmp_path, resume=True)
    check_same(tmp_path, whole)


def test_by_the_clock(whole, tmp_path):
    saved = []

    class Count(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            saved.append(trainer.global_step)

    run(tmp_path, Count(), every_minutes=1e-9)
    assert saved == [*range(1, STEPS), STEPS]
    check_same(tmp_path, whole)


def test_best_checkpoint_is_that_of_the_whole_run(tmp_path):
    run(tmp_path / "whole", best=True)
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "cut", module=Fails(10, 1), best=True)
    with pytest.warns(UserWarning, match="exists and is not empty"):
        run(tmp_path / "cut", resume=True, best=True)
    kept = [torch.load(tmp_path / name / "best" / "best.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert kept[0]["global_step"] == kept[1]["global_step"]
    assert differences(kept[0]["state_dict"], kept[1]["state_dict"]) == []
    assert [path.name for path in (tmp_path / "cut" / "best").iterdir()] == ["best.ckpt"]
    scores = [x["best_model_score"] for run_ in kept for key, x in run_["callbacks"].items() if key.startswith("ModelCheckp")]
    assert scores[0] == scores[1]


# ---- other ways to take steps ----------------------------------------------------------------------------------------------
def parts(**arguments):
    """A step is of two batches; an epoch of seven ends with a step of one."""
    return Noisy(accumulate_grad_batches=2, **arguments)


class Foreign(LightningModule):
    """Knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Dropout(0.2))
        with torch.no_grad():
            self.net[0].weight.fill_(0.1)
            self.net[0].bias.fill_(0.2)

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", (self.net(batch[0]) - batch[1]).square().mean(), batch_size=len(batch[0]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4), "interval": "step"}]


def failing_at(module, batch: int, call: int, action=fail):
    """Let the forward of a batch of the run do something, at one of its evaluations."""
    calls = []

    def forward_pre_hook(*_):
        if module.trainer.training and module.trainer.fit_loop.total_batch_idx == batch:
            calls.append(True)
            if len(calls) == call:
                action()

    module.net.register_forward_pre_hook(forward_pre_hook)
    return module


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module", params=["parts", "foreign", "foreign in parts"])
def other(request, tmp_path_factory):
    """Makes a module, its Trainer's arguments, and the folder of its whole run."""
    make = parts if request.param == "parts" else Foreign
    given = {
        "steps": 24 if request.param == "foreign" else 12,
        "accumulate_grad_batches": 1 + request.param.endswith("in parts"),
    }
    folder = tmp_path_factory.mktemp("other")
    run(folder, module=make(), **given)
    return make, given, folder


@pytest.mark.parametrize("batch", [3, 4, 6, 13, 14])
@pytest.mark.parametrize(("action", "call"), [(fail, 1), (fail, 2), (sigterm, 1)])
def test_steps_of_several_batches_and_foreign_modules(other, batch, action, call, tmp_path):
    """Stopped within a step, the run goes on from the beginning of that step."""
    make, given, whole = other
    with pytest.raises((RuntimeError, SIGTERMException)):
        run(tmp_path, module=failing_at(make(), batch, call, action), every_n_steps=1, **given)
    run(tmp_path, module=make(), resume=True, **given)
    check_same(tmp_path, whole)


# ---- loaders -------------------------------------------------------------------------------------------------------------
class Stateful:
    """A stateful loader of the other kind: it shuffles from a generator of its own, and goes on where it stands."""

    def __init__(self, *_, **__) -> None:
        self.data, self.generator = batches(EPOCH), torch.Generator().manual_seed(1)
        self.order: list[int] = []
        self.place = self.start = 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self):
        if not self.start:
            self.order = torch.randperm(len(self.data), generator=self.generator).tolist()
        self.place, self.start = self.start, 0
        while self.place < len(self.data):
            self.place += 1
            yield self.data[self.order[self.place - 1]]

    def state_dict(self):
        return {"place": self.place, "order": list(self.order), "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.start, self.order = state["place"], state["order"]
        self.generator.set_state(state["generator"])


@pytest.mark.parametrize("step", [3, 7, 8, 14])
def test_other_stateful_loaders(step, tmp_path):
    run(tmp_path / "whole", data=Stateful())
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "cut", Stop(step + 2, fail, "on_train_batch_start"), data=Stateful(), every_n_steps=step,
            on_exception=False)  # fmt: skip
    # the first batch of an epoch is waited for
    assert stored(tmp_path / "cut")["global_step"] == (step + 1 if step % EPOCH == 0 else step)
    run(tmp_path / "cut", data=Stateful(), resume=True)
    check_same(tmp_path / "cut", tmp_path / "whole")


def test_loader_that_cannot_tell_its_epochs_apart(tmp_path):
    """With ``limit_train_batches`` an epoch ends within the loader, and this sampler has no epoch."""

    def fixed():
        data = [(x[i], y[i]) for x, y in batches(EPOCH) for i in range(len(x))]
        return ResumableDataLoader(data, batch_size=6)

    def limited(folder, *callbacks, resume=False, **arguments):
        limit = Callback()
        limit.setup = lambda trainer, *_, **__: setattr(trainer, "limit_train_batches", 5)
        return run(folder, limit, *callbacks, data=fixed(), resume=resume, **arguments)

    limited(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        limited(tmp_path / "cut", Stop(12, fail, "on_train_batch_start"), every_n_steps=10, on_exception=False)
    limited(tmp_path / "cut", resume=True)
    check_same(tmp_path / "cut", tmp_path / "whole")


def test_workers(whole, tmp_path):
    workers = {"num_workers": 1}
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, module=Fails(10, 1), data=loader(**workers))
    run(tmp_path, data=loader(**workers), resume=True)
    check_same(tmp_path, whole)


def test_epochs_in_place_of_steps(tmp_path):
    def fit(folder, module=None, resume=False):
        module = module or Noisy()
        module.validation_step = None  # the end of an epoch is not that of a validation
        seed_everything(3, verbose=False)
        callbacks = [ResumeCheckpoint(), AdaNAGED()]
        logger = ResumableCSVLogger(folder, name="", version="log")
        made = trainer(folder, max_epochs=3, callbacks=callbacks, logger=logger, num_sanity_val_steps=0)
        path = folder / "log" / "checkpoints" / "last.ckpt"
        made.fit(module, loader(), ckpt_path=path if resume else None)

    fit(tmp_path / "whole")
    for step in (6, 8):  # at the end of the first epoch, and within the second
        folder = tmp_path / str(step)
        with pytest.raises(SIGTERMException):
            fit(folder, Fails(step, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        fit(folder, resume=True)
        assert stored(folder)["global_step"] == 21
        check_same(folder, tmp_path / "whole")


def test_loader_says_what_it_was_given_until_it_goes_on():
    first, second = loader(), loader()
    batches_ = iter(first)
    for _ in range(3):
        next(batches_)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() == {"epoch": 0, "batches": 3}
    assert torch.equal(next(iter(second))[0], next(batches_)[0])
    assert second.state_dict() == {"epoch": 0, "batches": 4}


# ---- a finished run ------------------------------------------------------------------------------------------------------
def test_finished_run_ends_at_once(whole, tmp_path):
    run(tmp_path)
    before = (tmp_path / "log" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    run(tmp_path, resume=True, module=Fails(STEPS, 1))
    assert (tmp_path / "log" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    assert table(tmp_path) == table(whole)


@pytest.mark.parametrize("first", [9, 14])
def test_finished_run_goes_on_with_more_steps(first, tmp_path):
    """Within the epoch that was cut short, or with the next."""
    seen = []

    class See(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(float(batch[0].sum()))

    run(tmp_path / "whole", See())
    expected, seen[:] = seen[:], []
    run(tmp_path / "parts", See(), steps=first)
    run(tmp_path / "parts", See(), resume=True)
    assert seen == expected


# ---- what is not saved ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_start", "on_train_epoch_end"])
def test_elsewhere_the_last_checkpoint_stays(hook, tmp_path, caplog):
    step = 14 if hook == "on_train_epoch_end" else 4
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, Stop(step, fail, hook), every_n_steps=3)
    last = 12 if step == 14 else 3
    assert stored(tmp_path)["global_step"] == last
    where = " in the middle of validation" if "validation" in hook else ""
    assert f"stopped{where} after step {step}; {tmp_path}/log/checkpoints/last.ckpt goes on from step {last}" in caplog.text


def test_sigterm_in_validation(whole, tmp_path, caplog):
    """Lightning stops within the validation that is due."""
    with pytest.raises(SIGTERMException):
        run(tmp_path, module=Fails(7, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)), every_n_steps=3)
    assert "stopped in the middle of validation after step 8" in caplog.text
    assert stored(tmp_path)["global_step"] == 6
    run(tmp_path, resume=True)
    check_same(tmp_path, whole)


def test_nothing_to_go_on_from(tmp_path, caplog):
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, module=Fails(0, 2))
    assert not list(tmp_path.rglob("*.ckpt"))
    assert "there is no checkpoint to go on from" in caplog.text


def test_switched_off_on_exceptions(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, module=Fails(5, 1), on_exception=False)
    assert not list(tmp_path.rglob("*.ckpt"))


# ---- the file ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["save", "rename"])
def test_crash_while_saving_leaves_the_old_file(where, whole, tmp_path, monkeypatch, caplog):
    """The process dies while it writes, or before the new file has its name."""
    write, rename = torch.save, os.replace
    count = []

    def broken(source, target, **keywords):
        count.append(where == "save" or str(target).endswith("last.ckpt"))
        if sum(count) > 1:
            raise RuntimeError("the process dies")
        return (write if where == "save" else rename)(source, target, **keywords)

    with monkeypatch.context() as patch:
        if where == "save":
            patch.setattr(torch, "save", broken)
        else:
            patch.setattr(os, "replace", broken)
        with pytest.raises(RuntimeError, match="the process dies"):
            run(tmp_path, every_n_steps=5)
    assert stored(tmp_path)["global_step"] == 5
    run(tmp_path, resume=True)
    check_same(tmp_path, whole)
    assert [path.name for path in (tmp_path / "log" / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_full_disk_does_not_stop_the_run(whole, tmp_path, monkeypatch):
    """It is said, and tried again when the next save is due."""
    write, count = torch.save, []

    def full_once(*arguments, **keywords):
        count.append(1)
        if len(count) == 2:
            raise OSError("No space left on device")
        return write(*arguments, **keywords)

    monkeypatch.setattr(torch, "save", full_once)
    with pytest.warns(UserWarning, match=r"last\.ckpt could not be written, and the run goes on: OSError: No space left"):
        run(tmp_path, every_n_steps=5)
    assert len(count) > 2
    check_same(tmp_path, whole)


def test_an_unusable_folder_is_found_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    keep = ResumeCheckpoint(tmp_path / "file" / "folder")
    with pytest.raises(OSError, match="file"):
        keep.setup(trainer(tmp_path, callbacks=[keep]), None, "fit")


def test_failure_to_save_does_not_hide_the_exception(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, module=Fails(5, 1))
    assert "last.ckpt could not be written: OSError: No space left on device" in caplog.text


def test_folder_and_name(tmp_path):
    fit = run(tmp_path, dirpath=tmp_path / "here", filename="state", steps=2)
    assert (tmp_path / "here" / "state.ckpt").is_file()
    assert fit.callbacks[0].path == str(tmp_path / "here" / "state.ckpt")


def test_other_checkpoints_hold_nothing_of_it(tmp_path):
    fit = run(tmp_path, steps=2)
    fit.save_checkpoint(tmp_path / "other.ckpt")
    assert "ResumeCheckpoint" not in torch.load(tmp_path / "other.ckpt", weights_only=True)["callbacks"]


def test_outside_the_main_thread(whole, tmp_path):
    thread = threading.Thread(target=run, args=[tmp_path])
    thread.start()
    thread.join()
    check_same(tmp_path, whole)


def test_two_writers_of_one_file(tmp_path):
    callback = ModelCheckpoint(tmp_path / "log" / "checkpoints", save_last=True)
    fit = trainer(tmp_path, max_steps=1, callbacks=[ResumeCheckpoint(callback.dirpath), callback], enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=r"both write .*last\.ckpt; leave save_last out"):
        fit.fit(Noisy(), loader(), DataLoader(batches(2), batch_size=None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filename": ""}, "filename must be a file's name without a folder, got ''"),
        ({"filename": "a/b"}, r"got 'a/b'; the folder is dirpath"),
        ({"every_minutes": 0}, "every_minutes must be positive, or None, got 0"),
        ({"every_minutes": math.nan}, "every_minutes must be positive, or None, got nan"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, or None, got 0"),
    ],
)
def test_arguments_are_checked_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResumeCheckpoint(**arguments)
