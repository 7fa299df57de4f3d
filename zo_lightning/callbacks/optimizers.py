"""Who takes the zeroth-order steps of a run."""

from __future__ import annotations

from lightning.pytorch import Trainer

from zo_lightning.optim import ZerothOrder

__all__ = ["zeroth_order"]


def zeroth_order(trainer: Trainer) -> list[ZerothOrder]:
    """The zeroth-order optimizers of the module, and of callbacks that hold one as ``optimizer``; each once."""
    candidates = [*trainer.optimizers, *(getattr(x, "optimizer", None) for x in trainer.callbacks)]  # type: ignore[attr-defined]
    found = {id(x): x for x in candidates if isinstance(x, ZerothOrder)}
    return list(found.values())
