"""From a base model and a ledger to the fine-tuned weights: no data, no forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from zo_lightning.ledger.hashing import weights_hash
from zo_lightning.ledger.record import LedgerError, Record, directions_of, environment_of
from zo_lightning.optim import UPDATES, ZerothOrder

__all__ = ["differences", "replay", "under_ledger_names"]


def replay(
    module: nn.Module,
    record: Record,
    *,
    steps: int | None = None,
    check: bool = True,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Take all steps of a ledger; the module's parameters are then those at the end of the run, bit for bit.

    Args:
        module: Holds the weights that the run began with, under the names that they had there.
        record: The ledger.
        steps: Stop after this many, as for the weights of a checkpoint made then; None takes all.
        check: Whether the result has to have the hash that the ledger has of it. Without ``steps`` only.
        progress: Called with the number of steps taken, after each.

    Returns:
        ``weights_hash(module, buffers=False)`` afterwards. Where it is not ``record.final`` an error says so; the module then
        holds the other weights. A ledger of a run that was broken off has no ``final`` to compare with.

    Raises:
        LedgerError: If the module's weights are not those of the base, the directions cannot be drawn here, ``steps`` is not in
            the ledger, or the result is another one.

    Warns:
        UserWarning: If software or hardware differ from the run's, so that the last bits may.
    """
    if steps is not None and not 0 <= steps <= len(record):
        raise LedgerError(f"steps must be between 0 and the {len(record)} steps of the ledger, got {steps}")
    optimizer = _optimizer_over(module, record)
    others = differences(record, next(iter(optimizer.named_parameters().values())).device)
    if others:
        warnings.warn(f"{others}: the last bits of the weights may differ", UserWarning, stacklevel=2)
    with _arithmetic_of(record):
        try:
            for report in record.reports(steps):
                optimizer.retake(report)
                if progress is not None:
                    progress(report.step + 1)
        finally:
            optimizer.detach()
    found = weights_hash(module, buffers=False)
    if check and steps is None and record.final not in (None, found):
        because = f" ({others})" if others else "; were they written by something other than the optimizer's steps?"
        raise LedgerError(
            f"the rebuilt weights have the sha256 {found}, those at the end of the run had {record.final}{because}"
        )
    return found


def differences(record: Record, device: torch.device) -> str:
    """What differs between the run and here that the last bits depend on, as a text; empty if nothing does.

    Args:
        record: The ledger.
        device: Of the parameters.

    Raises:
        LedgerError: If dense directions would be other numbers altogether.
    """
    here = environment_of(device)
    odd = {
        key: f"{key} {value} in the run, {here.get(key)} here"
        for key, value in record.environment.items()
        if here.get(key) != value
    }
    if not directions_of(record.directions).low_rank and {"device", "kernels"} & odd.keys():
        raise LedgerError(f"dense directions are drawn in another way here than in the run: {'; '.join(odd.values())}")
    # what _arithmetic_of puts back to what it was is no difference
    return "; ".join(text for key, text in odd.items() if key not in _PUT_BACK or "," in record.environment[key])


def under_ledger_names(module: nn.Module, record: Record) -> nn.Module:
    """A module under the names that its parameters had in the run, where all of them began with the path of the model.

    Args:
        module: A bare model, as ``AutoModelForCausalLM`` loads it.
        record: The ledger, for example with names that begin with ``model.``.

    Returns:
        The module itself, or one that contains it.

    Raises:
        LedgerError: If no prefix makes the names equal.
    """
    ours = {name for name, _ in module.named_parameters()}
    theirs = [name for group in record.groups for name, _, _ in group["parameters"]]
    parts = theirs[0].split(".")
    for count in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:count])
        if all(name.startswith(prefix) and name.removeprefix(prefix) in ours for name in theirs):
            for part in reversed(parts[:count]):
                inner, module = module, nn.Module()
                module.add_module(part, inner)
            return module
    raise LedgerError(
        f"the ledger is of another architecture: it has a parameter {theirs[0]!r}, the model has "
        f"{min(ours, default='none')!r}; one of an adapter is replayed in Python by zo_lightning.ledger.replay (docs/ledger.md)"
    )


def _optimizer_over(module: nn.Module, record: Record) -> ZerothOrder:
    """The optimizer of the run, before its first step.

    Raises:
        LedgerError: If ``module`` is not the base.
    """
    if record.update not in UPDATES:
        raise LedgerError(f"the ledger's update rule is {record.update!r}, this version has {', '.join(sorted(UPDATES))}")
    named = dict(module.named_parameters())
    groups = []
    for group in record.groups:
        for name, dtype, shape in group["parameters"]:
            if name not in named:
                raise LedgerError(f"the ledger is of another architecture: the model has no parameter {name!r}")
            found = str(named[name].dtype).removeprefix("torch."), list(named[name].shape)
            if found != (dtype, shape):
                raise LedgerError(f"{name!r} is {found[0]} of shape {found[1]}, in the ledger {dtype} of shape {shape}")
        options = {key: value for key, value in group.items() if key != "parameters"}
        groups.append({**options, "params": [(name, named[name]) for name, _, _ in group["parameters"]]})
    base = weights_hash(module)
    if base != record.base:
        raise LedgerError(
            f"the base model is another one: its weights have the sha256 {base}, those that the run began with {record.base}"
        )
    optimizer = ZerothOrder(groups, directions=directions_of(record.directions), update=record.update, seed=record.seed)
    return optimizer.attach(module) if record.attached else optimizer


_PUT_BACK = ("threads", "matmul")


@contextmanager
def _arithmetic_of(record: Record) -> Iterator[None]:
    """Sums in the order, and products in the precision, of the run."""
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    # several values: the run was resumed under others
    if record.environment["threads"].isdigit():
        torch.set_num_threads(int(record.environment["threads"]))
    if "," not in record.environment["matmul"]:
        torch.set_float32_matmul_precision(record.environment["matmul"])
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(matmul)
