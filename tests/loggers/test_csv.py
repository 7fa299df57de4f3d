"""metrics.csv of a run that goes on: what is kept, what is dropped, and that it is the file of an uninterrupted run."""

import csv
import os

import pytest
from lightning.pytorch.loggers import CSVLogger

from zo_lightning.loggers import ResumableCSVLogger

ROWS = [
    (0, {"loss": 1.5}),
    (1, {"loss": 1.25}),
    (1, {"val": 3.0}),  # a new column, and a second row of the same step
    (2, {"loss": 1 / 3, "a": -0.0}),
    (3, {"loss": float("nan")}),
    (4, {"loss": 1e-30, "val": 2}),
]


def opened(folder, kind=ResumableCSVLogger, **arguments):
    return kind(folder, name="", version=0, **arguments)


def write(logger, rows, flush=True):
    for step, values in rows:
        logger.log_metrics(values, step)
        if flush:  # as the Trainer does
            logger.save()
    logger.finalize("success")


def content(folder) -> bytes:
    return (folder / "version_0" / "metrics.csv").read_bytes()


@pytest.fixture
def whole(tmp_path) -> bytes:
    """What Lightning's own logger writes."""
    write(opened(tmp_path / "whole", CSVLogger), ROWS)
    return content(tmp_path / "whole")


@pytest.mark.parametrize("flush", [True, False])
def test_the_file_is_lightnings(flush, whole, tmp_path):
    write(opened(tmp_path), ROWS, flush)
    assert content(tmp_path) == whole
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("kept", range(len(ROWS) + 1))
@pytest.mark.parametrize("written", range(len(ROWS) + 1))
def test_goes_on_after_the_rows_that_are_kept(kept, written, whole, tmp_path):
    """The file may have rows that came after the checkpoint."""
    if written < kept:
        return
    write(opened(tmp_path), ROWS[:written])
    again = opened(tmp_path)
    again.truncate(kept)
    assert again.rows == kept
    write(again, ROWS[kept:])
    assert again.rows == len(ROWS)
    if kept < len(ROWS):
        assert content(tmp_path) == whole


@pytest.mark.parametrize("cut", range(1, 10))
def test_line_cut_off_by_a_crash(cut, whole, tmp_path):
    write(opened(tmp_path), ROWS[:5])
    path = tmp_path / "version_0" / "metrics.csv"
    line = path.read_bytes().splitlines(keepends=True)[-1]
    assert line == b",nan,3,\r\n"
    path.write_bytes(path.read_bytes()[:-cut])
    again = opened(tmp_path)
    again.truncate(4)
    write(again, ROWS[4:])
    assert content(tmp_path) == whole


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_without_a_count_the_step_decides(cut, whole, tmp_path):
    write(opened(tmp_path), ROWS)
    path = tmp_path / "version_0" / "metrics.csv"
    path.write_bytes(path.read_bytes()[: len(whole) - cut])
    write(opened(tmp_path), ROWS[3:])
    assert content(tmp_path) == whole


def test_a_run_that_starts_afresh_takes_the_place_of_the_old(whole, tmp_path):
    write(opened(tmp_path), ROWS[::-1])
    write(opened(tmp_path), ROWS)
    assert content(tmp_path) == whole


def test_nothing_logged_nothing_changed(whole, tmp_path):
    write(opened(tmp_path), ROWS)
    again = opened(tmp_path)
    again.truncate(2)
    again.save()
    again.finalize("success")
    assert content(tmp_path) == whole


def test_crash_while_rewriting_leaves_the_old_file(tmp_path, monkeypatch):
    write(opened(tmp_path), ROWS[:2])
    before = content(tmp_path)

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write(opened(tmp_path), ROWS[2:3])
    assert content(tmp_path) == before


def test_fewer_rows_than_at_the_checkpoint(tmp_path):
    write(opened(tmp_path), ROWS[:2])
    again = opened(tmp_path)
    again.truncate(5)
    again.log_metrics({"loss": 1.0}, 7)
    with pytest.warns(UserWarning, match="has 2 rows, and had 5 when the checkpoint was written"):
        again.save()
    assert len(content(tmp_path).splitlines()) == 4


def test_file_of_another_kind_is_replaced(tmp_path):
    path = tmp_path / "version_0" / "metrics.csv"
    path.parent.mkdir()
    path.write_text("something else")
    write(opened(tmp_path), ROWS[:1])
    assert list(csv.DictReader(path.read_text().splitlines())) == [{"loss": "1.5", "step": "0"}]


def test_flushes_every_so_many_steps(tmp_path):
    logger = opened(tmp_path, flush_logs_every_n_steps=2)
    logger.log_metrics({"loss": 1.0}, 0)
    assert not (tmp_path / "version_0" / "metrics.csv").exists()
    logger.log_metrics({"loss": 1.0}, 1)
    assert len(content(tmp_path).splitlines()) == 3


def test_hyperparameters_stay(tmp_path):
    logger = opened(tmp_path)
    logger.log_hyperparams({"a": 1})
    logger.save()
    opened(tmp_path).save()
    assert (tmp_path / "version_0" / "hparams.yaml").read_text() == "a: 1\n"


def test_negative_count():
    with pytest.raises(ValueError, match="rows must not be negative, got -1"):
        ResumableCSVLogger("nowhere").truncate(-1)
