"""ZO-Muon."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.directions import LowRank, Subspace
from zo_lightning.optim.groups import DEFAULT_RADII, GeometrySpec
from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.updates import Muon
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["ZOMuon"]

_NORMS: dict[str, GeometrySpec] = {
    "matrix": "spectral",
    "embedding": "spectral",
    "vector": {"name": "sign", "radius": DEFAULT_RADII["vector"]},
}


class ZOMuon(ZerothOrder):
    """``X ← X - η P NS(mean_i ρ_i u_i)`` with a held basis P and one-sided probes along ``P u_i`` (ZO-Muon, 2026).

    All probes of a step share P, also where it is drawn anew. Newton-Schulz runs in float32. Vectors take steps of ZO-SGD.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Step size η of matrices.
        smoothing: Smoothing radius ε.
        num_directions: Directions q per step, which cost q + 1 forwards.
        rank: Rank r of the subspace.
        interval: Steps ν for which P is held.
        iterations: Newton-Schulz iterations.
        vector_rate: Learning rate of vectors over that of matrices; the released code has 1e-7 beside 1e-2.
        side: On which side of the matrices the held factor is: on the left, the outputs', in the publication; on the
            ``"right"`` probes run inside the forward at no cost.
        normalised: Exact polar factors in place of Newton-Schulz, in probes too, and the norms of AdaNAGED, so that a step rule
            can drive the steps; ``iterations`` and ``vector_rate`` have no effect.
        weight_decay: Decoupled weight decay.
        seed: See :class:`ZerothOrder`.
        step_rule: See :class:`ZerothOrder`; needs ``normalised``.
        probes: See :class:`ZerothOrder`.
        max_nonfinite: See :class:`ZerothOrder`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        smoothing: float = 1e-3,
        *,
        num_directions: int = 4,
        rank: int = 64,
        interval: int = 100,
        iterations: int = 5,
        vector_rate: float = 1e-5,
        side: Literal["left", "right"] = "left",
        normalised: bool = False,
        weight_decay: float = 0.0,
        seed: int | None = None,
        step_rule: StepRule | None = None,
        probes: Literal["auto", "sequential", "stacked"] = "auto",
        max_nonfinite: int = 10,
    ) -> None:
        if side not in ("left", "right"):
            raise ValueError(f"side must be 'left' or 'right', got {side!r}")
        super().__init__(
            params,
            lr,
            smoothing,
            directions=Subspace(rank, interval) if side == "left" else LowRank(rank, interval),
            update="lmo" if normalised else Muon(iterations, "sgd", vector_rate),
            geometry=_NORMS if normalised else None,
            num_directions=num_directions,
            sides=1,
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
