"""A checkpoint from which a run goes on exactly."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from zo_lightning.callbacks.boundary import (
    Boundary,
    accumulating,
    between_steps,
    csv_loggers,
    restore,
    restore_random,
    stateful_loaders,
)
from zo_lightning.callbacks.interrupts import GentleInterrupt
from zo_lightning.data.loader import ResumableDataLoader

__all__ = ["ResumeCheckpoint"]


class ResumeCheckpoint(Callback):
    """Keeps one ``last.ckpt``, from which a stopped run goes on as if it had not been stopped: put it first in the list.

    Weights, optimizer, parameter-free state, directions, order of the batches, random numbers and logged values of the resumed
    run are bit for bit those of the uninterrupted one. Lightning's own checkpoints are written inside a step, before its values
    are logged and validation is run; this one is written between two steps, and holds in addition the random number generators'
    states, the loader's place, the values logged so far, and the number of rows of
    :class:`~zo_lightning.loggers.ResumableCSVLogger`.

    The file is written every ``every_minutes`` or ``every_n_steps``, at the end of training, and

    * after the step in which SIGTERM arrives (a cluster's way to say that time is up),
    * after the step in which Ctrl-C is pressed; a second Ctrl-C stops at once,
    * when the loss raises an exception, with the state before the step that failed, since a
      :class:`~zo_lightning.optim.ZerothOrder` step is taken as a whole or not at all.

    It replaces the one before in one stroke: a crash at any time, also while saving, leaves a good file.

    Note:
        The loaders of the training batches must be resumable (:class:`~zo_lightning.data.ResumableDataLoader`, or any with
        ``state_dict`` and ``load_state_dict``). Of metrics logged as ``torchmetrics`` objects over an epoch Lightning keeps no
        state. Random numbers that a dataset draws for its examples are not those of the uninterrupted run in the first batch.

    Args:
        dirpath: The folder; by default ``checkpoints`` in the log folder, as for ``ModelCheckpoint``.
        filename: The file's name without ``.ckpt``.
        every_minutes: Minutes between two saves; None for no clock.
        every_n_steps: Steps between two saves; None for no counting.
        on_exception: Whether to save when the run stops with an exception, SIGTERM included.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str = "last",
        every_minutes: float | None = 10.0,
        every_n_steps: int | None = None,
        on_exception: bool = True,
    ) -> None:
        if not filename or Path(filename).name != filename:
            raise ValueError(f"filename must be a file's name without a folder, got {filename!r}; the folder is dirpath")
        if every_minutes is not None and not 0 < every_minutes < math.inf:
            raise ValueError(f"every_minutes must be positive, or None, got {every_minutes}")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, or None, got {every_n_steps}")
        self.dirpath = dirpath
        self.filename = filename
        self.every_minutes = every_minutes
        self.every_n_steps = every_n_steps
        self.save_on_exception = on_exception
        self.path: str | None = None
        self._forget()

    def _forget(self) -> None:
        self._boundary: Boundary | None = None  # before the step that is being taken
        self._loaders: list[Any] | None = None  # their states after the last batch, unless it was the last of its epoch
        self._foreign = False  # whether one of the loaders is not this package's
        self._logged: int | None = None  # batches that counted for the loggers when the last one ended
        self._loaded: dict[str, Any] | None = None  # a checkpoint's state, until it is put back
        self._saving: tuple[Boundary, dict[str, Any]] | None = None
        self._saved: int | None = None  # the step from which the file goes on
        self._due = False
        self._stopped_early = False
        self._last_time, self._last_step = 0.0, 0
        self._interrupt = GentleInterrupt()
        self._stop = False  # whether all processes stop before the next step

    # ---- set-up and resuming -------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, and remove what a crash has left of an unfinished save."""
        if stage != "fit":
            return
        self._forget()
        folder = self.dirpath
        if folder is None:
            folder = os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")
        self.path = os.path.join(trainer.strategy.broadcast(str(folder)), f"{self.filename}.ckpt")
        if trainer.is_global_zero and "://" not in self.path:
            Path(_unfinished(self.path)).unlink(missing_ok=True)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)  # rather than find out at the first save

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the loaders' states; they are needed if the first step fails."""
        self._loaders = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint that this callback has written."""
        self._loaded = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the loggers what to keep; after a closed epoch, put back the random numbers before the loader draws.

        Raises:
            MisconfigurationException: If another callback writes the same file.
        """
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last:
                theirs = os.path.join(str(callback.dirpath), f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}")
                if os.path.realpath(theirs) == os.path.realpath(str(self.path)):
                    raise MisconfigurationException(
                        f"ModelCheckpoint(save_last=...) and ResumeCheckpoint both write {self.path}; leave save_last out, or "
                        "give ResumeCheckpoint another filename (--resume.filename)"
                    )
        if self._loaded is None:
            return
        if os.path.realpath(str(trainer.ckpt_path)) == os.path.realpath(str(self.path)):
            self._saved = int(self._loaded["step"])
        for logger, rows in zip(csv_loggers(trainer), self._loaded["rows"], strict=False):
            logger.truncate(rows)
        if self._loaded["epoch_end"]:
            restore_random(trainer, self._loaded)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and take Ctrl-C over."""
        self._last_time = time.monotonic()
        self._foreign = any(not isinstance(loader, ResumableDataLoader) for loader in stateful_loaders(trainer))
        self._interrupt.install()
        combined = trainer.fit_loop._combined_loader
        if combined is not None and len(stateful_loaders(trainer)) < len(combined.flattened):
            rank_zero_warn(
                "a loader of the training batches has no state_dict, so that a resumed run may see them in another order; "
                "use zo_lightning.data.ResumableDataLoader with a ShuffleSampler"
            )
        if self._loaded is not None and self._loaded.get("stopped_early") and _early_stopping(trainer):
            trainer.should_stop = True  # Lightning would train for another epoch
            rank_zero_info("EarlyStopping has ended this run; leave the callback out to go on")

    # ---- each step -----------------------------------------------------------------------------------------------------
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The last step is over: its values are logged and validation has been run. Save here if it is due.

        Raises:
            KeyboardInterrupt: If Ctrl-C was pressed, after saving.
        """
        if self._loaded is not None:
            restore(trainer, self._loaded, batch_idx)
            self._loaded = None
        if batch_idx == 0:
            self._loaders = None
        if accumulating(trainer):  # the step goes on, and so does the boundary before it
            return
        self._boundary = Boundary.of(trainer, self._loaders)
        stop = self._stop or (self._interrupt.pressed and trainer.world_size == 1)
        if (self._due or stop) and self._resumable(self._boundary):
            self._due = False
            try:
                self._save(trainer, self._boundary)
            except OSError as error:
                if stop or trainer.world_size > 1:  # the other processes wait in the save
                    raise
                self._last_time = time.monotonic()
                rank_zero_warn(f"{self.path} could not be written, and the run goes on: {type(error).__name__}: {error}")
        if stop:
            raise KeyboardInterrupt

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the loaders' states, before they hand out the next batch, and decide whether to save before it."""
        epoch_loop = trainer.fit_loop.epoch_loop
        # a place at the end of an epoch is no place to go on from in the next one
        self._loaders = None
        if not epoch_loop.batch_progress.is_last_batch:
            self._loaders = [loader.state_dict() for loader in stateful_loaders(trainer)]
        self._logged = epoch_loop._batches_that_stepped
        stepped, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        steps = self.every_n_steps is not None and stepped and trainer.global_step % self.every_n_steps == 0
        clock = self.every_minutes is not None and time.monotonic() - self._last_time >= 60 * self.every_minutes
        self._due = self._due or steps or clock
        if trainer.world_size > 1:  # their clocks differ
            self._due, self._stop = trainer.strategy.broadcast((self._due, self._interrupt.pressed))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; a run with more steps may go on from here.

        Raises:
            KeyboardInterrupt: If Ctrl-C was pressed in the last step, after saving.
        """
        if self._boundary is not None:
            self._stopped_early = trainer.should_stop and any(
                callback.stopped_epoch or callback.wait_count >= callback.patience for callback in _early_stopping(trainer)
            )
            self._save(trainer, Boundary.of(trainer, self._loaders, epoch_end=True))
            self._boundary = None
        self._interrupt.release()
        if self._stop or (self._interrupt.pressed and trainer.world_size == 1):
            raise KeyboardInterrupt

    def _resumable(self, boundary: Boundary) -> bool:
        """Other stateful loaders cannot say where they were before the first batch of an epoch: save after it."""
        return boundary.loaders is not None or not self._foreign

    # ---- stopping ------------------------------------------------------------------------------------------------------
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if the state is that of a boundary between two steps, and say from where a resumed run goes on."""
        if self._boundary is None:  # no step was begun
            self._interrupt.release()
            return
        try:
            boundary = self._boundary_now(trainer)
            if boundary is not None and boundary.step != self._saved and self._may_save(trainer, exception):
                boundary.roll_back()
                self._save(trainer, boundary)
        except Exception as error:  # the run's own exception is the one to see
            rank_zero_info(f"{self.path} could not be written: {type(error).__name__}: {error}")
        where = " in the middle of validation" if trainer.validating else ""
        then = "there is no checkpoint to go on from" if self._saved is None else f"{self.path} goes on from step {self._saved}"
        rank_zero_info(f"stopped{where} after step {trainer.global_step}; {then}")
        self._interrupt.release()

    def _may_save(self, trainer: Trainer, exception: BaseException) -> bool:
        # with several processes the others would have to take part, which they do where Lightning stops all of them
        return self.save_on_exception and (trainer.world_size == 1 or isinstance(exception, SIGTERMException))

    def _boundary_now(self, trainer: Trainer) -> Boundary | None:
        boundary = self._boundary
        if boundary is None or trainer.global_step == 0:
            return None
        if not boundary.holds(trainer):
            closed = None if self._logged is None else between_steps(trainer, self._logged)
            if closed is None or trainer.global_step != boundary.step + 1:
                return None
            boundary = Boundary.of(trainer, self._loaders, epoch_end=closed == "epoch")
        return boundary if self._resumable(boundary) else None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the handler of Ctrl-C back."""
        self._interrupt.release()

    # ---- saving --------------------------------------------------------------------------------------------------------
    def _save(self, trainer: Trainer, boundary: Boundary) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self.path is not None
        for logger in trainer.loggers:
            logger.save()
        state = boundary.state_dict()
        rng = [state["rng"]]
        if trainer.world_size > 1:
            rng = [None] * trainer.world_size
            torch.distributed.all_gather_object(rng, state["rng"])
        self._saving = boundary, {**state, "rng": rng, "stopped_early": self._stopped_early}
        try:
            _replace(partial(trainer.save_checkpoint, weights_only=False), self.path, trainer.is_global_zero)
        finally:
            self._saving = None
        self._saved = boundary.step
        self._last_time = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The boundary's state in the checkpoints of this callback; nothing in those of others."""
        return {} if self._saving is None else self._saving[1]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the loops between two batches, and the loaders where they were there."""
        if self._saving is not None:
            checkpoint["loops"]["fit_loop"] = self._saving[0].loops_of(checkpoint["loops"]["fit_loop"])


def _early_stopping(trainer: Trainer) -> list[EarlyStopping]:
    return [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]


def _replace(save: Callable[[str], None], path: str, first: bool) -> None:
    """Write beside the old file, which then is replaced in one stroke; a remote one is written in place."""
    if "://" in path:
        save(path)
        return
    save(_unfinished(path))
    if first:
        with open(_unfinished(path), "rb") as file:
            os.fsync(file.fileno())
        os.replace(_unfinished(path), path)


def _unfinished(path: str) -> str:
    return f"{path}.tmp"
