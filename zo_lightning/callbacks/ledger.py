"""The callback that keeps a replay ledger."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.hooks import RemovableHandle

from zo_lightning.callbacks.optimizers import zeroth_order
from zo_lightning.ledger import LedgerError, Record, weights_hash, write
from zo_lightning.ledger.file import pack, unpack
from zo_lightning.optim import ZerothOrder

__all__ = ["Ledger"]


class Ledger(Callback):
    """Writes each step's few numbers to a file from which ``zo-lightning replay`` rebuilds the weights (docs/ledger.md).

    That is 10 bytes per step where steps are normalised and go along one direction, and 9 + 8 q for q directions; the names of
    the parameters come once. The ledger is in the checkpoint too: a resumed run writes the file of an uninterrupted one, byte
    for byte.

    Args:
        path: The file, which is replaced; by default ``ledger.safetensors`` in the logger's folder, without a logger in the
            Trainer's ``default_root_dir``.
        every_n_steps: Steps between writes; it is written at the end of the run and at an exception too.

    Attributes:
        record: The ledger so far, once the first batch has begun.
        path: The file.

    Raises:
        ValueError: If ``every_n_steps`` is less than 1.
    """

    def __init__(self, path: str | None = None, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.path = path
        self.every_n_steps = every_n_steps
        self.record: Record | None = None
        self._file = Path()
        self._written = 0
        self._optimizer: ZerothOrder | None = None
        self._handle: RemovableHandle | None = None

    # ---- set-up --------------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A second fit starts afresh."""
        if stage == "fit":
            self._let_go()
            self.record = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first step: begin the ledger, or check that the one of the checkpoint ends here.

        Only now, when every other callback has made its optimizer and a checkpoint's state has been loaded.

        Raises:
            MisconfigurationException: If there is no zeroth-order optimizer, more than one, or its run could not be replayed.
        """
        if self._optimizer is not None:
            return
        optimizer = _optimizer_of(trainer)
        try:
            if self.record is None:
                self.record = Record.begin(optimizer, pl_module)
            else:
                self.record.go_on(optimizer)
        except LedgerError as error:
            raise MisconfigurationException(f"Ledger: {error}") from error
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._file = Path(self.path) if self.path is not None else folder / "ledger.safetensors"
        self._written = len(self.record)
        self._optimizer = optimizer
        self._handle = optimizer.register_step_post_hook(self._add)

    # ---- each step -----------------------------------------------------------------------------------------------------
    def _add(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        assert self.record is not None
        self.record.add(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the file, every now and then."""
        assert self.record is not None
        if len(self.record) - self._written >= self.every_n_steps:
            self._write(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, with the hash of the weights that the run ends with."""
        if self._optimizer is None or self.record is None:
            return  # not a single batch
        self._optimizer.fold()
        self.record.final = weights_hash(pl_module, buffers=False)
        if weights_hash(pl_module, parameters=False) != self.record.buffers:
            rank_zero_warn(
                "Ledger: the run has changed persistent buffers of the module (running statistics?); a replay rebuilds its "
                "parameters and leaves the buffers as they were in the base model"
            )
        self._write(trainer)
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the steps so far."""
        if self._optimizer is None:
            return
        self._catch_up()
        self._write(trainer)
        self._let_go()

    def _catch_up(self) -> None:
        """Take in a step that was cut off after its update, before the hook."""
        if self._optimizer is not None and self.record is not None:
            with contextlib.suppress(LedgerError):  # then the ledger ends a step earlier
                self.record.add(self._optimizer)

    def _write(self, trainer: Trainer) -> None:
        assert self.record is not None
        self._written = len(self.record)
        if trainer.is_global_zero:
            write(self.record, self._file)

    def _let_go(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._optimizer = self._handle = None

    # ---- state ---------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The ledger so far, as tensors and a text; empty before the first batch."""
        if self.record is None:
            return {}
        self._catch_up()
        tensors, text = pack(self.record)
        return {"text": text, "tensors": tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            LedgerError: If its ledger is damaged.
        """
        if state_dict:
            self.record = unpack(state_dict["tensors"], state_dict["text"], "the ledger in the checkpoint")


def _optimizer_of(trainer: Trainer) -> ZerothOrder:
    """The module's optimizer, or that of a callback that takes the steps in its place."""
    found = zeroth_order(trainer)
    if len(found) != 1:
        raise MisconfigurationException(
            f"Ledger needs one zo_lightning.optim.ZerothOrder, in the module's configure_optimizers or in a callback such as "
            f"AdaNAGED, and found {len(found) or 'none'}"
        )
    return found[0]
