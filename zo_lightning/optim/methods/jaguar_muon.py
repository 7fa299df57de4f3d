"""JAGUAR with orthogonalised steps of matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.directions import Block
from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.updates import Muon
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["JaguarMuon"]


class JaguarMuon(ZerothOrder):
    """``X ← X - η NS(M)`` for matrices and ``x ← x - η sign(M)`` for vectors (JAGUAR Muon, 2025).

    M is that of :class:`JaguarSignSGD`. Where only the block of the present step is left in it, as in the released code, the
    orthogonalised matrix is but a rescaled sign of one number.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Step size η.
        smoothing: Smoothing radius ε.
        momentum: β of M; one float32 buffer.
        fraction: Share of rows and of columns in the block.
        signs: See :class:`~zo_lightning.optim.Block`.
        iterations: Newton-Schulz iterations.
        normalised: Steps whose entries have a root mean square of about one, which a step rule can drive.
        num_directions: Blocks per step, each two forwards.
        weight_decay: Decoupled weight decay.
        seed: See :class:`ZerothOrder`.
        step_rule: See :class:`ZerothOrder`; needs ``normalised``.
        probes: See :class:`ZerothOrder`.
        max_nonfinite: See :class:`ZerothOrder`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        smoothing: float = 1e-3,
        *,
        momentum: float = 0.9,
        fraction: float = 0.1,
        signs: Literal["random", "ones"] = "random",
        iterations: int = 10,
        normalised: bool = False,
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
            update=Muon(iterations, unit_entries=normalised),
            num_directions=num_directions,
            momentum=momentum,
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
