"""JAGUAR: blocks of coordinates and a momentum of every entry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.directions import Block
from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["JaguarSignSGD"]


class JaguarSignSGD(ZerothOrder):
    """``x ← x - η sign(M)`` on all entries, where M remembers each entry's last estimates (JAGUAR SignSGD, 2025).

    Probes move a :class:`~zo_lightning.optim.Block` of each tensor. There ``M ← β M + (1 - β) ρ e``, elsewhere M stays, and
    moves x all the same. In the released code M is cleared at every step, so that β has no effect and only the block moves.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Step size η of each entry.
        smoothing: Smoothing radius ε.
        momentum: β of M; one float32 buffer.
        fraction: Share of rows and of columns in the block.
        signs: See :class:`~zo_lightning.optim.Block`; ``"ones"`` is the released code's.
        num_directions: Blocks per step, each two forwards.
        weight_decay: Decoupled weight decay.
        seed: See :class:`ZerothOrder`.
        step_rule: See :class:`ZerothOrder`.
        probes: See :class:`ZerothOrder`.
        max_nonfinite: See :class:`ZerothOrder`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        smoothing: float = 1e-3,
        *,
        momentum: float = 0.9,
        fraction: float = 0.1,
        signs: Literal["random", "ones"] = "random",
        num_directions: int = 1,
        weight_decay: float = 0.0,
        seed: int | None = None,
        step_rule: StepRule | None = None,
        probes: Literal["auto", "sequential", "stacked"] = "auto",
        max_nonfinite: int = 10,
    ) -> None:
        super().__init__(
            params,
            lr,
            smoothing,
            directions=Block(fraction, signs),
            update="sign",
            num_directions=num_directions,
            momentum=momentum,
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
