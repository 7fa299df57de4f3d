"""LDSD: directions around a mean that learns where the loss falls."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zo_lightning.optim.randomness import generator
from zo_lightning.optim.sampling.base import Draw, Sampler
from zo_lightning.optim.step_rules import StepReport

__all__ = ["LearnedMean"]


class LearnedMean(Sampler):
    """Directions ``u_i = μ + σ z_i`` with a mean that follows the score function's estimate (LDSD, 2026).

    The rule is::

        a_i = f_i - mean_{j≠i} f_j        g_μ = 1/(k σ²) Σ_i a_i (u_i - μ)        μ ← μ - η_μ g_μ

    where ``f_i = f(x + ε u_i)``, so that g_μ is unbiased for the gradient of ``E f(x + ε u)`` by μ, about ``ε ∇f``. Each z_i is
    drawn again from its own seed: the released code draws other noise here, and its mean is a random walk.

    With directions that move some tensors only, the losses of directions that left a parameter alone say nothing about its
    mean, and are left out.

    Args:
        mean_rate: η_μ; 0 keeps the mean where it begins, so that only the choice of the best direction is left.
        sigma: σ, the standard deviation of the directions about their mean.
        initial: ``"zero"``, or ``"unit"`` for a random mean of norm one in each tensor.
        seed: Of the random mean.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "learned_mean"
    carried = ("mean",)

    def __init__(
        self, mean_rate: float = 1e-3, sigma: float = 1.0, initial: Literal["zero", "unit"] = "zero", seed: int = 0
    ) -> None:
        if not (mean_rate >= 0 and math.isfinite(mean_rate)):
            raise ValueError(f"mean_rate must be a finite number >= 0, got {mean_rate}")
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"sigma must be a finite number > 0, got {sigma}")
        if initial not in ("zero", "unit"):
            raise ValueError(f"initial must be 'zero' or 'unit', got {initial!r}")
        self.mean_rate = mean_rate
        self.sigma = sigma
        self.initial = initial
        self.seed = seed
        self._names: dict[nn.Parameter, str] = {}

    def begin(self, groups: list[dict[str, Any]], step: int) -> None:
        """See :meth:`Sampler.begin`."""
        if len(self._names) != sum(len(group["params"]) for group in groups):  # a group may be added later
            self._names = {p: name for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}

    def shape(self, z: Tensor, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        """See :meth:`Sampler.shape`."""
        if self.sigma != 1:
            z = z.mul_(self.sigma)
        mean = self._mean(z, parameter, state)
        return z if mean is None else z.add_(mean)

    def _mean(self, like: Tensor, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor | None:
        """μ of one parameter, made when it is first needed; None for a mean of zero that does not move."""
        if "mean" not in state:
            if self.initial == "zero":
                if not self.mean_rate:
                    return None
                state["mean"] = torch.zeros_like(like)
            else:
                source = generator(self.seed, self._names[parameter], "mean")
                drawn = torch.randn(like.shape, generator=source, dtype=torch.float32, device="cpu")
                state["mean"] = (drawn / drawn.norm()).to(like)
        mean: Tensor = state["mean"]
        return mean

    def after_update(self, draw: Draw, parameter: nn.Parameter, state: dict[str, Any], report: StepReport) -> None:
        """See :meth:`Sampler.after_update`: with the old mean, ``u_i - μ = σ z_i``."""
        if not self.mean_rate:
            return
        # a direction that leaves the parameter alone is zero
        drawn = [(query, loss) for query, loss in zip(report.asked, report.plus, strict=True) if draw.moves(query)]
        k = len(drawn)
        if k < 2:
            return
        mean = self._mean(draw(drawn[0][0]), parameter, state)
        assert mean is not None
        total = sum(loss for _, loss in drawn)
        for query, loss in drawn:
            advantage = (k * loss - total) / (k - 1)
            mean.add_(draw(query), alpha=-self.mean_rate * advantage / (k * self.sigma))
