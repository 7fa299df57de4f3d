"""The lines per validation and the table at the end."""

import re

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.quadratic import Validated, loader, trainer
from zo_lightning.callbacks import AdaNAGED, MetricsTable, SpacedValidation


class Scripted(Validated):
    """Validation losses 5 before training, then 3, 1, 2."""

    script = (5.0, 3.0, 1.0, 2.0)

    def validation_step(self, batch, batch_idx):
        seen = 0 if self.trainer.sanity_checking else self.trainer.global_step
        self.log("val/loss", torch.tensor(self.script[seen]), batch_size=1)
        self.log("other", 1.0, batch_size=1)


def run(tmp_path, **arguments):
    table = MetricsTable()
    checkpoint = ModelCheckpoint(tmp_path, "best", monitor="val/loss", enable_version_counter=False)
    defaults = {"max_steps": 3, "num_sanity_val_steps": -1, "enable_checkpointing": True}
    fit = trainer(tmp_path, callbacks=[AdaNAGED(), SpacedValidation(3), table, checkpoint], **{**defaults, **arguments})
    return fit, table


def cells(text: str) -> list[list[str]]:
    rows = [re.split(r"[│┃]", line)[1:-1] for line in text.splitlines() if re.search("[│┃]", line)]
    return [[cell.strip() for cell in row] for row in rows]


def test_before_best_and_last(tmp_path, capsys):
    fit, _ = run(tmp_path)
    fit.fit(Scripted(), loader(), loader(1))
    assert cells(capsys.readouterr().out) == [
        ["metric", "before", "best (step 2)", "last (step 3)"],
        ["val/loss", "5.0000", "1.0000", "2.0000"],
    ]


def test_a_line_per_validation(tmp_path, caplog):
    fit, _ = run(tmp_path)
    fit.fit(Scripted(), loader(), loader(1))
    lines = [record.getMessage() for record in caplog.records if "val/loss" in record.getMessage()]
    assert lines == [
        "before: val/loss 5.0000",
        "step 1: val/loss 3.0000",
        "step 2: val/loss 1.0000",
        "step 3: val/loss 2.0000",
    ]


def test_a_partial_sanity_check_is_no_before(tmp_path, capsys):
    fit, table = run(tmp_path, num_sanity_val_steps=1, max_steps=1)
    fit.fit(Scripted(), loader(), loader(1))
    assert table.before == {}
    assert cells(capsys.readouterr().out) == [["metric", "after 1 steps"], ["val/loss", "3.0000"]]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_resuming_keeps_what_was_before(tmp_path, capsys):
    fit, _ = run(tmp_path, max_steps=2)
    fit.fit(Scripted(), loader(), loader(1))
    fit.save_checkpoint(tmp_path / "two.ckpt")
    capsys.readouterr()
    again, table = run(tmp_path)
    with pytest.warns(UserWarning, match="exists and is not empty"):
        again.fit(Scripted(), loader(), loader(1), ckpt_path=tmp_path / "two.ckpt")
    assert table.before == {"val/loss": 5.0}
    assert cells(capsys.readouterr().out)[1] == ["val/loss", "5.0000", "1.0000", "2.0000"]


def test_silent_in_other_stages_and_without_validation(tmp_path, capsys):
    fit, table = run(tmp_path)
    fit.fit(Scripted(), loader(), loader(1))
    capsys.readouterr()
    fit.validate(Scripted(), loader(1), verbose=False)
    assert capsys.readouterr().out == ""
    assert len(table.history) == 3
