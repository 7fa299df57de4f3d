"""How the networks of ZO Fine-tuner are learned: by the loss after the step that they lead to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zo_lightning.optim.directions import Address, Gaussian
from zo_lightning.optim.interrupts import deferred_interrupt
from zo_lightning.optim.sampling.scale_networks import ScaleNetworks
from zo_lightning.optim.sampling.scale_recursion import Moments, ScaleHistory, moments, normaliser, weights_of

__all__ = ["MetaStep", "ScaleLearner"]


@dataclass(frozen=True)
class MetaStep:
    """What one step of learning has seen.

    Attributes:
        plus: L⁺, the loss at x + ε N σ z.
        minus: L⁻.
        loss: f(x'), the loss after the step that the scales lead to: what the networks are to lower.
        sigma: σ, one for each tensor.
        finite: Whether all losses and derivatives were; otherwise nothing has been learned.
    """

    plus: float
    minus: float
    loss: float
    sigma: Sequence[float]
    finite: bool


class ScaleLearner:
    """Learns :class:`ScaleNetworks` by gradients through one zeroth-order step (ZO Fine-tuner, 2025).

    On one batch, with scales σ(φ) and their normaliser N::

        c = (f(x + ε N σ z) - f(x - ε N σ z)) / 2ε
        x'_j = x_j - η_u c N σ_j z_j                                    c and N are taken for constants
        φ ← φ - η_φ ∇_φ f(x')        by the chain rule  ∂f/∂σ_j = -η_u c N ⟨∇_j f(x'), z_j⟩

    so that backpropagation runs through the model once, for P inner products, and then through the small networks alone. The
    model is moved in place and put back bit for bit. η_u multiplies the P numbers, in float64, rather than the model's backward
    pass, and the networks are kept in float64: the released code adds increments in float16, most of them below half a unit in
    the last place, and its networks stay where they began.

    Args:
        named: The parameters to perturb, by the names that the networks get.
        lr: η_u, the learning rate of the step in which the networks are to be used.
        smoothing: ε.
        network_lr: η_φ.
        network_optimizer: ``"sgd"``, as published, or ``"adam"``, whose steps do not shrink with η_u.
        seed: Of z and of the networks as they begin.
        refresh: Steps between two looks at the weights' means and variances.
        embedding_rows: See :class:`LearnedScales`.

    Attributes:
        networks: The networks, in float64 on the CPU.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        lr: float = 1e-6,
        smoothing: float = 1e-3,
        network_lr: float = 1e-3,
        network_optimizer: Literal["sgd", "adam"] = "sgd",
        seed: int = 0,
        refresh: int = 1,
        embedding_rows: int | None = None,
    ) -> None:
        for argument, value in {"lr": lr, "smoothing": smoothing, "network_lr": network_lr}.items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{argument} must be a finite number > 0, got {value}")
        if network_optimizer not in ("sgd", "adam"):
            raise ValueError(f"network_optimizer must be 'sgd' or 'adam', got {network_optimizer!r}")
        if refresh < 1:
            raise ValueError(f"refresh must be at least 1, got {refresh}")
        self._named = dict(named)
        self.lr, self.smoothing, self.seed, self.refresh = lr, smoothing, seed, refresh
        self.networks = ScaleNetworks(list(named), seed).double()
        kind = torch.optim.SGD if network_optimizer == "sgd" else torch.optim.Adam
        self._optimizer: torch.optim.Optimizer = kind(self.networks.parameters(), lr=network_lr)
        self._weights = weights_of(list(named), list(named.values()), embedding_rows)
        self._histories: dict[str, ScaleHistory] = {}
        self._statistics: Moments = []
        self._looked: int | None = None
        self._steps = 0
        self._directions = Gaussian()

    def step(self, closure: Callable[[], Tensor], task: str = "") -> MetaStep:
        """Learn from one batch.

        Args:
            closure: Evaluates the loss of the batch, differentiable by the parameters: a scalar, or losses per example.
            task: Whose history of scales and losses this is.
        """
        parameters = list(self._named.values())
        history = self._histories.setdefault(task, ScaleHistory.begin(len(parameters)))
        sigma = self.networks(history.inputs(self._look(parameters)))
        values: list[float] = sigma.tolist()
        factor = normaliser(self._weights, values)
        units = [factor * value for value in values]
        kept = [p.detach().clone() for p in parameters]
        try:
            with torch.no_grad():
                losses = []
                for epsilon in (self.smoothing, -self.smoothing):
                    self._move(kept, units, epsilon)
                    losses.append(_mean(closure()))
                plus, minus = torch.stack(losses).tolist()
            slope = (plus - minus) / (2 * self.smoothing)
            if not math.isfinite(slope):
                return self._skipped(plus, minus, math.nan, values)
            self._move(kept, units, -self.lr * slope)
            with torch.enable_grad():
                after = _mean(closure())
                gradients = torch.autograd.grad(after, parameters, allow_unused=True)
            products = self._products(gradients)
        finally:
            with deferred_interrupt(), torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
        loss = float(after.detach())
        if not all(math.isfinite(x) for x in (loss, *products)):
            return self._skipped(plus, minus, loss, values)
        self._optimizer.zero_grad()
        sigma.backward(torch.tensor([-self.lr * slope * factor * x for x in products], dtype=sigma.dtype))
        self._optimizer.step()
        self._histories[task] = ScaleHistory(values, plus, minus)
        self._steps += 1
        return MetaStep(plus, minus, loss, values, True)

    def _skipped(self, plus: float, minus: float, loss: float, values: list[float]) -> MetaStep:
        self._steps += 1  # other directions next time
        return MetaStep(plus, minus, loss, values, False)

    def _look(self, parameters: list[nn.Parameter]) -> Moments:
        if self._looked is None or self._steps >= self._looked + self.refresh:
            self._statistics, self._looked = moments(parameters), self._steps
        return self._statistics

    def look_again(self) -> None:
        """The weights have been changed by more than a step: look at them before the next one."""
        self._looked = None

    @torch.no_grad()
    def _move(self, kept: list[Tensor], units: list[float], by: float) -> None:
        """``x_j + by N σ_j z_j``; z is drawn anew at each use, so that it is never kept."""
        for (name, parameter), value, unit in zip(self._named.items(), kept, units, strict=True):
            parameter.copy_(value + (by * unit) * self._draw(name, parameter))

    def _draw(self, name: str, parameter: Tensor) -> Tensor:
        return self._directions.draw(Address(self.seed, self._steps, name), parameter.shape, parameter.device)

    @torch.no_grad()
    def _products(self, gradients: Sequence[Tensor | None]) -> list[float]:
        """``⟨∇_j f(x'), z_j⟩``, in float32 or wider, in one synchronisation."""
        found = []
        for (name, parameter), gradient in zip(self._named.items(), gradients, strict=True):
            product = torch.zeros((), dtype=torch.float64, device=parameter.device)
            if gradient is not None:
                product = (gradient * self._draw(name, parameter)).sum().double()
            found.append(product.to(next(iter(self._named.values())).device))
        result: list[float] = torch.stack(found).tolist()
        return result

    # ---- going on ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and tensors."""
        return {
            "names": list(self.networks.names),
            "networks": {key: value.clone() for key, value in self.networks.state_dict().items()},
            "optimizer": self._optimizer.state_dict(),
            "histories": {task: history.state_dict() for task, history in self._histories.items()},
            "statistics": [list(pair) for pair in self._statistics],
            "looked": self._looked,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            ValueError: If it is of networks of other parameters.
        """
        if state["names"] != list(self.networks.names):
            raise ValueError("the checkpoint's scale networks are of other parameters: use the same model and peft")
        self.networks.load_state_dict(state["networks"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._histories = {task: ScaleHistory.from_state_dict(history) for task, history in state["histories"].items()}
        self._statistics = [(float(mean), float(variance)) for mean, variance in state["statistics"]]
        self._looked, self._steps = state["looked"], int(state["steps"])


def _mean(losses: Tensor) -> Tensor:
    return losses.to(torch.promote_types(losses.dtype, torch.float32)).mean()
