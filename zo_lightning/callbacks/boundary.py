"""The state of a run between two of its steps: what Lightning's checkpoints leave out, as plain values.

Lightning's loops and log results have no public way to be saved and put back between two batches. All that is private to them
is named in this file, and left alone where a release does not have it.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from zo_lightning.callbacks.optimizers import zeroth_order
from zo_lightning.loggers import ResumableCSVLogger
from zo_lightning.optim import ZerothOrder

__all__ = ["Boundary"]


@dataclass
class Boundary:
    """Where a run goes on from.

    Attributes:
        step: Optimizer steps taken.
        loaders: The states of the stateful loaders of the training batches; None where an epoch begins.
        loops: The state of the fit loop, if a step is of several batches, so that it may stop after some of them.
        epoch_end: Whether an epoch has just been closed, rather than a batch.
        logged: Batches that count for the loggers, whose rows have it as their step.
        rng: The states of the random number generators.
        rows: The number of rows of each :class:`~zo_lightning.loggers.ResumableCSVLogger`.
        results: What the epoch's batches have logged so far.
        metrics: The Trainer's metrics by kind.
        optimizers: Each zeroth-order optimizer with the plain values that a step which fails may have changed.
    """

    step: int
    loaders: list[Any] | None
    loops: dict[str, Any] | None
    epoch_end: bool
    logged: int
    rng: dict[str, Any]
    rows: list[int]
    results: list[tuple[Any, dict[str, Any]]]
    metrics: dict[str, dict[str, Any]]
    optimizers: list[tuple[ZerothOrder, list[dict[str, Any]], dict[str, Any] | None]]

    @classmethod
    def of(cls, trainer: Trainer, loaders: list[Any] | None, epoch_end: bool = False) -> Boundary:
        """The state now."""
        connector = trainer._logger_connector
        parts = max(trainer.accumulate_grad_batches, getattr(trainer.lightning_module, "accumulate_grad_batches", 1))
        return cls(
            step=trainer.global_step,
            loaders=loaders,
            loops=trainer.fit_loop.state_dict() if parts > 1 else None,
            epoch_end=epoch_end,
            logged=trainer.fit_loop.epoch_loop._batches_that_stepped,
            rng=_random_states(trainer.strategy.root_device),
            rows=[logger.rows for logger in csv_loggers(trainer)],
            # references suffice: Lightning puts new tensors in the place of these (connectors/logger_connector/result.py)
            results=[
                (result.meta, {name: getattr(result, name) for name in _KEPT if getattr(result, name, None) is not None})
                for result in trainer.fit_loop.epoch_loop._results.values()
                if result.is_tensor and not result.has_reset
            ],
            metrics={kind: dict(getattr(connector, f"_{kind}_metrics", {})) for kind in _KINDS},
            optimizers=[
                (
                    optimizer,
                    [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
                    None if optimizer.step_rule is None else optimizer.step_rule.state_dict(),
                )
                for optimizer in zeroth_order(trainer)
            ],
        )

    def holds(self, trainer: Trainer) -> bool:
        """Whether the weights are still those of this boundary."""
        same = [optimizer.step_index == groups[0]["step"] for optimizer, groups, _ in self.optimizers]
        return bool(same) and all(same) and trainer.global_step == self.step

    def roll_back(self) -> None:
        """Take back what a step that failed has counted and calibrated."""
        for optimizer, groups, rule in self.optimizers:
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.update(before)
            if optimizer.step_rule is not None and rule is not None:
                optimizer.step_rule.load_state_dict(rule)

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and tensors only, so that ``torch.load(weights_only=True)`` takes it."""
        results = [
            {
                **{name: getattr(meta, name) for name in _META},
                "reduce_fx": meta.reduce_fx.__name__,
                "sync_dist": meta.sync.should,
                "rank_zero_only": meta.sync.rank_zero_only,
                "kept": {name: _plain(value) for name, value in kept.items()},
            }
            for meta, kept in self.results
            if meta.sync.group is None and meta.dataloader_idx is None
        ]
        metrics = {
            kind: {name: _plain(value) for name, value in named.items() if isinstance(value, (Tensor, int, float))}
            for kind, named in self.metrics.items()
        }
        return {
            "step": self.step,
            "epoch_end": self.epoch_end,
            "logged": self.logged,
            "rng": _plain_rng(self.rng),
            "rows": list(self.rows),
            "results": results,
            "metrics": metrics,
        }

    def loops_of(self, now: dict[str, Any]) -> dict[str, Any]:
        """The state of the fit loop at this boundary.

        Args:
            now: ``checkpoint["loops"]["fit_loop"]`` as it is now, in the middle of the step or before it.
        """
        loops = copy.deepcopy(now if self.loops is None else self.loops)
        _settle(loops, self.epoch_end, self.loaders)
        return loops


def restore(trainer: Trainer, state: dict[str, Any], batch_idx: int) -> None:
    """Put back, before the first step of a resumed run, what Lightning has not: its loops begin with other counts and no logs.

    Args:
        trainer: The trainer.
        state: That of a boundary.
        batch_idx: The number of the batch in its epoch.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    if hasattr(epoch_loop, "_batches_that_stepped"):  # loops/training_epoch_loop.py, `reset`: one more after some restarts
        epoch_loop._batches_that_stepped = int(state["logged"])
    if not state["epoch_end"]:
        restore_random(trainer, state)
    for result in state["results"]:
        _restore_result(trainer, dict(result))
    connector = trainer._logger_connector
    if batch_idx > 0 and hasattr(connector, "_first_loop_iter"):
        connector._first_loop_iter = False  # at the first batch of an epoch `LightningModule.log` drops what is there
    for kind, named in state["metrics"].items():
        if hasattr(connector, f"_{kind}_metrics"):
            getattr(connector, f"_{kind}_metrics").update(named)


def restore_random(trainer: Trainer, state: dict[str, Any]) -> None:
    """Put back the states of the random number generators."""
    rng = state["rng"]
    rng = rng[trainer.global_rank] if len(rng) == trainer.world_size else rng[0]
    version, internal, gauss = rng["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = rng["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002 (the global one)
    torch.set_rng_state(rng["torch"])
    if "cuda" in rng and trainer.strategy.root_device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"], trainer.strategy.root_device)


def _settle(loops: dict[str, Any], epoch_end: bool, loaders: list[Any] | None) -> None:
    """Make of the state of the fit loop that of a loop between two batches, wherever it was saved.

    Lightning takes a state whose last batch is completed for one in which validation and logging are done too
    (loops/training_epoch_loop.py, RESTARTED_ON_LAST), which is what a boundary is.

    Args:
        loops: ``checkpoint["loops"]["fit_loop"]``; changed in place.
        epoch_end: Whether an epoch has just been closed.
        loaders: The states of the stateful loaders, or None for an epoch that begins.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    ended = epoch_end and batches["is_last_batch"]
    batches["is_last_batch"] = False  # it may speak of the batch that has not been trained on
    for name, progress in loops.items():
        if name.startswith("epoch_loop."):
            _complete(progress)
    if ended:  # the next epoch begins: as `reset` does it there, but not in a resumed run
        for name in ("batch_progress", "scheduler_progress", "automatic_optimization.optim_progress"):
            _empty(loops[f"epoch_loop.{name}"], "current")
        _empty(loops["epoch_loop.val_loop.batch_progress"], "total")
    elif epoch_end:  # the run has ended before its epoch; a longer run goes on within it
        for counts in (epochs["total"], epochs["current"]):
            counts.update(processed=counts["ready"] - 1, completed=counts["ready"] - 1)
    loops["state_dict"].pop("combined_loader", None)
    if loaders and not ended:
        loops["state_dict"]["combined_loader"] = loaders


def _complete(progress: dict[str, Any]) -> None:
    """Take back what was begun and not completed."""
    if "completed" in progress:
        progress.update(dict.fromkeys(progress, progress["completed"]))
    else:
        for inner in progress.values():
            if isinstance(inner, dict):
                _complete(inner)


def _empty(progress: dict[str, Any], which: str) -> None:
    for key, counts in progress.items():
        if key == which:
            counts.update(dict.fromkeys(counts, 0))
        elif isinstance(counts, dict) and key not in ("total", "current"):
            _empty(counts, which)


def accumulating(trainer: Trainer) -> bool:
    """Whether a step has begun, with some of its batches."""
    return any(optimizer.progress[1] > 0 for optimizer in zeroth_order(trainer))


def between_steps(trainer: Trainer, logged: int) -> Literal["batch", "epoch"] | None:
    """What was closed last by a run that stopped outside a step; None if it stopped before all was done.

    Args:
        trainer: The trainer.
        logged: ``_batches_that_stepped`` at the end of the last batch.
    """
    fit_loop = trainer.fit_loop
    counts: Any = fit_loop.epoch_progress.current
    # after validation, and the batch's row (loops/training_epoch_loop.py, `on_advance_end`)
    closed = trainer.training and fit_loop.epoch_loop._batches_that_stepped == logged + 1
    if not closed or accumulating(trainer) or counts.processed != counts.completed or counts.ready != counts.started:
        return None
    return "epoch" if counts.processed == counts.ready else "batch"


def stateful_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of the training batches that have a state, in Lightning's order."""
    combined = trainer.fit_loop._combined_loader
    loaders = [] if combined is None else combined.flattened
    return [x for x in loaders if hasattr(x, "state_dict") and hasattr(x, "load_state_dict")]


def csv_loggers(trainer: Trainer) -> list[ResumableCSVLogger]:
    """The loggers whose rows are counted; they write on the first process only."""
    return [x for x in trainer.loggers if isinstance(x, ResumableCSVLogger)] if trainer.is_global_zero else []


_KEPT = ("value", "cumulated_batch_size", "_forward_cache")  # of a logged value: its sum, its count, and that of the last step
_META = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
_KINDS = ("callback", "logged", "progress_bar")


def _restore_result(trainer: Trainer, result: dict[str, Any]) -> None:
    device = trainer.strategy.root_device
    kept = {name: value.to(device) for name, value in result.pop("kept").items()}
    results = trainer.fit_loop.epoch_loop._results
    reduce_fx = getattr(torch, result.pop("reduce_fx"))
    # as `LightningModule.log` does it, so that the module's own next call finds what it expects
    results.log(value=kept["value"], reduce_fx=reduce_fx, sync_dist_fn=trainer.strategy.reduce, batch_size=1, **result)
    metric = results[f"{result['fx']}.{result['name']}"]
    for name, value in kept.items():
        setattr(metric, name, value)
    metric._computed = None


def _random_states(device: torch.device) -> dict[str, Any]:
    numbers = np.random.get_state()  # noqa: NPY002 (the global one)
    states: dict[str, Any] = {"python": random.getstate(), "numpy": numbers, "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _plain_rng(rng: dict[str, Any]) -> dict[str, Any]:
    version, internal, gauss = rng["python"]
    name, keys, *rest = rng["numpy"]
    return {**rng, "python": [version, list(internal), gauss], "numpy": [name, keys.tolist(), *rest]}


def _plain(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
