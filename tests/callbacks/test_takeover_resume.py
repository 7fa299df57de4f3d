"""Runs of a module that is taken over, stopped and resumed: bit for bit those that were not."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.callbacks.foreign import Classifier, batches, make_trainer, seeded
from zo_lightning.callbacks import AdaNAGED

STEPS = 12
PER_EPOCH = 6

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Counted:
    """A loader that knows where it is, as resuming in the middle of an epoch needs."""

    def __init__(self):
        self.data, self.at = batches(PER_EPOCH), 0

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        start, self.at = self.at, 0
        for index in range(start, len(self.data)):
            self.at = index + 1
            yield self.data[index]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"] % len(self.data)


class Rows(Callback):
    """What each batch did and logged; not the means over an epoch, of which Lightning's checkpoints keep nothing."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        zo = trainer.callbacks[0]
        own = [zo.optimizer.step_index, zo.optimizer.forwards, zo.rule.step_size, zo.rule.smoothing, float(outputs["loss"])]
        names = ("zo/", "train_loss_step") if zo.optimizer.progress[1] == 0 else ("train_loss_step",)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(names)}
        self.rows.append((trainer.global_step, own, logged))


class Save(Callback):
    """Saves after a number of batches, whether they make whole steps or not."""

    def __init__(self, path, after):
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.after:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def run(folder, *callbacks, module=None, ckpt_path=None, looked_at=True, **arguments):
    module = module or seeded(Classifier, "cosine", 0.0)
    zo, rows = AdaNAGED(interval=4), Rows()
    torch.manual_seed(7)
    given = [zo, *([rows] if looked_at else []), *callbacks]
    trainer = make_trainer(folder, callbacks=given, limit_val_batches=0, **{"max_steps": STEPS, **arguments})
    trainer.fit(module, Counted(), Counted(), ckpt_path=ckpt_path)
    return module, zo, rows.rows


def final(module, zo) -> dict:
    state = zo.optimizer.state_dict()
    return {"module": module.state_dict(), "groups": state["param_groups"], "rule": state["step_rule"], "zo": zo.state_dict()}


def same(a, b) -> None:
    left, right = final(*a), final(*b)
    torch.testing.assert_close(left.pop("module"), right.pop("module"), rtol=0, atol=0)
    for groups in (left["groups"], right["groups"]):
        for group in groups:
            group.pop("params")
    assert left == right


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("after", [1, 4, 6, 9, 11])
def test_resuming_is_exact(every, after, tmp_path):
    """After whole steps and in the middle of a window, at the end of an epoch and within one."""
    arguments = {"accumulate_grad_batches": every, "max_steps": STEPS // every}
    *whole, rows = run(tmp_path, **arguments)
    *_, first = run(tmp_path, Save(tmp_path / "x.ckpt", after), **arguments)
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    ours = next(value for key, value in stored.items() if key.startswith("zo_lightning"))
    assert ("gathered" in ours["optimizer"]) == bool(after % every)
    assert stored["global_step"] == after // every
    *again, second = run(tmp_path, ckpt_path=tmp_path / "x.ckpt", **arguments)
    assert first[:after] == rows[:after]
    assert second == rows[after:]
    same(again, whole)


def test_resuming_with_an_update_that_is_pending(tmp_path):
    """Nobody looks on, so that the update is kept in factors; the checkpoint holds weights with it and without."""
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    arguments = {"looked_at": False, "enable_checkpointing": True}
    *whole, _ = run(tmp_path, keep, **arguments)
    module, zo, _ = run(tmp_path, ckpt_path=tmp_path / "step=5.ckpt", **{**arguments, "enable_checkpointing": False})
    stored = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    assert "path" in next(value for key, value in stored.items() if key.startswith("zo_lightning"))["optimizer"]
    torch.testing.assert_close(module.state_dict(), whole[0].state_dict(), rtol=0, atol=0)
    assert zo.rule.state_dict() == whole[1].rule.state_dict()


class Failing(Classifier):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.left = 10**9

    def training_step(self, batch, batch_idx):
        self.trainer.tally.append(batch_idx)
        if len(self.trainer.tally) == self.left:
            raise RuntimeError("stop")
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize("which", ["before", "first", "second"])
def test_a_state_saved_on_an_exception_goes_on_exactly(which, tmp_path):
    """Between two steps, and at either evaluation of the eighth step."""
    *whole, rows = run(tmp_path)
    keep = ModelCheckpoint(tmp_path, "broken", save_on_exception=True, every_n_train_steps=100)
    at = {"before": 0, "first": 1, "second": 2}[which]

    class Stop(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 7:
                if at == 0:
                    raise RuntimeError("stop")
                pl_module.left = len(trainer.tally) + at

    module = seeded(Failing, "cosine", 0.0)
    zo, seen = AdaNAGED(interval=4), Rows()
    torch.manual_seed(7)
    trainer = make_trainer(
        tmp_path, callbacks=[zo, seen, Stop(), keep], limit_val_batches=0, max_steps=STEPS, enable_checkpointing=True
    )
    trainer.tally = []
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, Counted(), Counted())
    assert not {"training_step", "backward", "optimizer_step", "forward"} & set(vars(module))
    stored = torch.load(tmp_path / "broken.ckpt", weights_only=True)
    assert stored["global_step"] == 7
    assert stored["state_dict"].keys() == module.state_dict().keys()
    stored["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [{"at": 7 % PER_EPOCH}]  # the batch is to come again
    torch.save(stored, tmp_path / "again.ckpt")
    *again, second = run(tmp_path, ckpt_path=tmp_path / "again.ckpt")
    assert seen.rows == rows[:7]
    difference = second[0][1][1] - rows[7][1][1]
    assert difference == {"before": 0, "first": 0, "second": 1}[which]  # the forward that was in vain is counted
    assert [(step, own[0], *own[2:]) for step, own, _ in second] == [(step, own[0], *own[2:]) for step, own, _ in rows[7:]]
    torch.testing.assert_close(again[0].state_dict(), whole[0].state_dict(), rtol=0, atol=0)
    assert again[1].rule.state_dict() == whole[1].rule.state_dict()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_state_saved_on_an_exception_has_the_pending_update(tmp_path):
    """Nobody looks on: the weights are a few steps behind when the ninth batch fails, and the factors are in the state."""

    class Stopping(Classifier):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == self.trainer.stop_at:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    ends, states = [], []
    for name, stop_at, path in (("whole", -1, None), ("half", 8, None), ("rest", -1, tmp_path / "again.ckpt")):
        module = seeded(Stopping, "cosine", 0.0)
        keep = ModelCheckpoint(tmp_path / name, "broken", save_on_exception=True, every_n_train_steps=100)
        zo = AdaNAGED(interval=4)
        torch.manual_seed(7)
        arguments = {"max_steps": STEPS, "enable_checkpointing": True, "limit_val_batches": 0}
        trainer = make_trainer(tmp_path, callbacks=[zo, keep], **arguments)
        trainer.stop_at = stop_at
        if stop_at < 0:
            trainer.fit(module, Counted(), Counted(), ckpt_path=path)
            ends.append(module.state_dict())
            states.append(zo.rule.state_dict())
        else:
            with pytest.raises(RuntimeError, match="stop"):
                trainer.fit(module, Counted(), Counted())
            stored = torch.load(tmp_path / "half" / "broken.ckpt", weights_only=True)
            assert "path" in next(value for key, value in stored.items() if key.startswith("zo_lightning"))["optimizer"]
            torch.testing.assert_close(stored["state_dict"], module.state_dict(), rtol=1e-6, atol=1e-7)
            stored["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [{"at": 8 % PER_EPOCH}]
            torch.save(stored, tmp_path / "again.ckpt")
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    assert states[0] == states[1]


def test_the_skipped_steps_of_a_run_go_on_being_counted(tmp_path):
    class Poisoned(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (torch.nan if batch_idx == 2 else 1)

    with pytest.warns(UserWarning, match="the update is skipped"):
        run(tmp_path, Save(tmp_path / "x.ckpt", 5), module=seeded(Poisoned, "cosine", 0.0))
    _, zo, rows = run(tmp_path, ckpt_path=tmp_path / "x.ckpt")
    assert rows[0][2]["zo/skipped"] == rows[-1][2]["zo/skipped"] == 1 == zo.state_dict()["skipped"]
