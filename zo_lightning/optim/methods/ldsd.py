"""LDSD: learned direction sampling, with plain steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.directions import LowRank
from zo_lightning.optim.sampling import LearnedMean
from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["LDSD"]


class LDSD(ZerothOrder):
    """The best of k directions around a learned mean, and a plain step along it (LDSD-SGD, 2026).

    A step is::

        u_i = μ + σ z_i        f_i = f(x + ε u_i)        i* = argmin f_i
        c = (f_{i*} - f(x - ε u_{i*})) / 2ε              x ← x - η c u_{i*}

    and then the mean's step, see :class:`LearnedMean`. A step costs k + 1 forwards, so that a comparison with ZO-SGD is fair at
    (k + 1)/2 steps of that. State: the mean, and the momentum if there is any.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Learning rate η.
        smoothing: Smoothing radius ε.
        k: Directions that are tried.
        mean_rate: η_μ; 0 leaves only the choice of the best direction.
        sigma: σ, the standard deviation about the mean (called variance in the released code).
        momentum: β of a moving average of g; η is 1/(1 - β) times that of the released code's heavy ball.
        weight_decay: Decoupled weight decay.
        low_rank: Rank of directions U Vᵀ for models whose dense mean does not fit: the mean is then kept as a left factor.
        interval: Steps for which V is held.
        normalised: Steps ``η Σ ρ_i u_i / ‖ρ‖``, which a step rule can drive.
        seed: See :class:`ZerothOrder`.
        step_rule: See :class:`ZerothOrder`; needs ``normalised``.
        probes: See :class:`ZerothOrder`.
        max_nonfinite: See :class:`ZerothOrder`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        smoothing: float = 1e-3,
        *,
        k: int = 5,
        mean_rate: float = 1e-3,
        sigma: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        low_rank: int | None = None,
        interval: int = 50,
        normalised: bool = False,
        seed: int | None = None,
        step_rule: StepRule | None = None,
        probes: Literal["auto", "sequential", "stacked"] = "auto",
        max_nonfinite: int = 10,
    ) -> None:
        super().__init__(
            params,
            lr,
            smoothing,
            directions="gaussian" if low_rank is None else LowRank(low_rank, interval),
            update="unit" if normalised else "sgd",
            num_directions=k,
            scheme="best_of",
            sampler=LearnedMean(mean_rate, sigma),
            momentum=momentum,
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
