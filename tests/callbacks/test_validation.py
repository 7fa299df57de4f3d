"""When validation happens, whatever the number of steps."""

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.quadratic import StopAt, Validated, loader, trainer
from zo_lightning.callbacks import AdaNAGED, SpacedValidation


class Steps(Callback):
    def __init__(self):
        self.at = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.at.append(trainer.global_step)


def validations(tmp_path, times=5, callbacks=(), **arguments):
    steps = Steps()
    fit = trainer(tmp_path, callbacks=[AdaNAGED(), SpacedValidation(times), *callbacks, steps], **arguments)
    fit.fit(Validated(), loader(), loader(1))
    return steps.at


@pytest.mark.parametrize(
    ("max_steps", "expected"),
    [(1, [1]), (3, [1, 2, 3]), (7, [2, 4, 6, 7]), (10, [2, 4, 6, 8, 10]), (50, [10, 20, 30, 40, 50])],
)
def test_evenly_spaced_and_always_at_the_end(max_steps, expected, tmp_path):
    assert validations(tmp_path, max_steps=max_steps) == expected


def test_number_of_validations(tmp_path):
    assert validations(tmp_path, times=2, max_steps=10) == [5, 10]


def test_intervals_of_the_trainer_stay_and_the_end_is_validated(tmp_path):
    assert validations(tmp_path, max_steps=10, val_check_interval=3, check_val_every_n_epoch=None) == [3, 6, 9, 10]


def test_runs_measured_in_epochs(tmp_path):
    assert validations(tmp_path, max_epochs=2) == [2, 4, 6, 8]
    assert validations(tmp_path, max_epochs=2, check_val_every_n_epoch=2) == [8]


def test_whichever_of_steps_and_epochs_ends_first(tmp_path):
    assert validations(tmp_path, max_epochs=2, max_steps=1000) == [2, 4, 6, 8]
    assert validations(tmp_path, max_epochs=100, max_steps=5) == [1, 2, 3, 4, 5]


def test_unknown_length_keeps_the_trainers_intervals(tmp_path):
    assert validations(tmp_path, max_epochs=-1, callbacks=[StopAt(9)]) == [4, 8, 9]


def test_last_weights_are_kept(tmp_path):
    """The best checkpoint exists after a run shorter than any interval, and may be the last step's."""
    checkpoint = ModelCheckpoint(tmp_path / "kept", "best", monitor="val/loss")
    validations(tmp_path, max_steps=1, callbacks=[checkpoint], enable_checkpointing=True)
    assert (tmp_path / "kept" / "best.ckpt").is_file()


def test_no_validation_is_refused():
    with pytest.raises(ValueError, match="times must be at least 1, got 0"):
        SpacedValidation(0)
