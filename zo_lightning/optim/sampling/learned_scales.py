"""ZO Fine-tuner in use: each parameter tensor is perturbed as far as its network says."""

from __future__ import annotations

import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_lightning.optim.sampling.base import Sampler
from zo_lightning.optim.sampling.scale_networks import ScaleNetworks
from zo_lightning.optim.sampling.scale_recursion import Moments, ScaleHistory, moments, normaliser, weights_of
from zo_lightning.optim.step_rules import StepReport

__all__ = ["LearnedScales"]


class LearnedScales(Sampler):
    """Directions ``u_j = N σ_j z_j`` with a learned scale for each parameter tensor j (ZO Fine-tuner, 2025).

    The rule is, with c the slope ``(L⁺ - L⁻) / 2ε``::

        s_j = (mean x_j, var x_j, L⁺_{t-1}, L⁻_{t-1}, σ_{j,t-1})        σ_j = | W2_j tanh(W1_j s_j + b1_j) + b2_j |
        N = √(Σ w_j) / √(Σ w_j σ_j²)                                    x_j ← x_j - η c N σ_j z_j

    so that one scale for all is MeZO, bit for bit at σ = 1. N σ_j goes into the ``units`` of the parameter groups, by which
    both probes and steps are multiplied. All of this is a few numbers for each tensor, in float64 on the CPU.

    A parameter without a network has the median of the others' scales, with one warning that names them.

    Args:
        networks: Learned networks or their safetensors file; a number for the control with one scale for all; None for the
            control with networks as they begin, in the published files most of what there is.
        network_seed: Of these.
        refresh: Steps between two looks at all weights for their means and variances. At the rates in use a hundred steps
            change these by far less than it takes to change σ (0.05 % for a variance 2.5 times as large, in the published
            networks), and to look at every weight costs about as much as a forward pass of one token.
        embedding_rows: Rows of an embedding that count in N; None for all, so that the perturbation is exactly as long as
            MeZO's. The released code takes 15 · batch size, about as many as a batch looks up.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an argument is out of its range, or the file is none of scale networks.
    """

    name = "learned_scales"
    dense = True
    shapes = False  # the direction itself is left as it was drawn: it is measured in other units

    def __init__(
        self,
        networks: ScaleNetworks | str | Path | float | None = None,
        network_seed: int = 0,
        refresh: int = 100,
        embedding_rows: int | None = None,
    ) -> None:
        if isinstance(networks, (int, float)) and not (networks > 0 and math.isfinite(networks)):
            raise ValueError(f"networks must be a file, None, or a finite number > 0 for one scale for all, got {networks}")
        if refresh < 1:
            raise ValueError(f"refresh must be at least 1, got {refresh}")
        if embedding_rows is not None and embedding_rows < 1:
            raise ValueError(f"embedding_rows must be at least 1, or None, got {embedding_rows}")
        self._source = ScaleNetworks.load(networks) if isinstance(networks, (str, Path)) else networks
        self.network_seed = network_seed
        self.refresh = refresh
        self.embedding_rows = embedding_rows
        self._names: list[str] = []
        self._weights: list[float] = []
        self._networks: ScaleNetworks | None = None
        self._rows: list[int | None] = []  # of each parameter its network, by the number among those in use
        self._history: ScaleHistory | None = None
        self._statistics: Moments = []
        self._looked: int | None = None  # the step at which the weights were looked at
        self._drawn: tuple[int, list[float]] | None = None  # the step that has begun, and its σ

    @property
    def sigma(self) -> dict[str, float]:
        """σ of the last step that was begun, by the parameters' names; empty before the first."""
        return {} if self._drawn is None else dict(zip(self._names, self._drawn[1], strict=True))

    # ---- a step --------------------------------------------------------------------------------------------------------
    def begin(self, groups: list[dict[str, Any]], step: int) -> None:
        """See :meth:`Sampler.begin`: a function of what the steps before have left, whenever and however often it is called.

        Raises:
            ValueError: If no parameter has a network, or the step is not of two-sided differences.
        """
        names = [name for group in groups for name in group["param_names"]]
        parameters = [p for group in groups for p in group["params"]]
        if names != self._names:
            self._prepare(groups, names, parameters)
        assert self._history is not None
        if self._networks is not None and (self._looked is None or not self._looked <= step < self._looked + self.refresh):
            self._statistics, self._looked = moments(parameters), step
        sigma = self._scales()
        self._drawn = step, sigma
        factor = normaliser(self._weights, sigma)
        units = iter([factor * value for value in sigma])
        for group in groups:
            group["units"] = [next(units) for _ in group["params"]]

    @torch.no_grad()
    def _scales(self) -> list[float]:
        history = self._history
        assert history is not None
        if self._networks is None:
            assert isinstance(self._source, (int, float))
            return [float(self._source)] * len(self._names)
        own = [index for index, row in enumerate(self._rows) if row is not None]
        found: list[float] = self._networks(history.inputs(self._statistics)[own]).tolist()
        others = statistics.median(found)
        values = iter(found)
        return [others if row is None else next(values) for row in self._rows]

    def end(self, report: StepReport) -> None:
        """See :meth:`Sampler.end`: only now do the step's scales and losses count, so that a skipped step leaves no trace."""
        if self._drawn is None or self._drawn[0] != report.step:
            return
        self._history = ScaleHistory(self._drawn[1], report.plus[0], report.minus[0])

    # ---- the first step ------------------------------------------------------------------------------------------------
    def _prepare(self, groups: list[dict[str, Any]], names: list[str], parameters: list[nn.Parameter]) -> None:
        """Find each parameter's network."""
        if groups[0].get("sides", 2) != 2:
            raise ValueError("ZO Fine-tuner's scales depend on the losses at both sides: use sides=2")
        fresh = self._history is None or len(self._history.sigma) != len(names)
        if fresh and self._drawn is None and any(unit != 1 for group in groups for unit in group["units"] or ()):
            raise ValueError("ZO Fine-tuner's scales are units of length themselves: use scaling='none'")
        self._rows = []
        if not isinstance(self._source, (int, float)):
            source = ScaleNetworks(names, self.network_seed) if self._source is None else self._source
            self._rows = source.matching(names)
            missing = [name for name, row in zip(names, self._rows, strict=True) if row is None]
            if len(missing) == len(names):
                raise ValueError(
                    f"networks: none of the {len(names)} parameters has a network; the parameters are {_some(names)}, the "
                    f"networks are of {_some(source.names)}: they were learned on another kind of model"
                )
            if missing:
                warnings.warn(
                    f"ZO Fine-tuner: {len(missing)} of {len(names)} parameters have no network and get the median of the "
                    f"others' scales: {', '.join(missing)}",
                    UserWarning,
                    stacklevel=6,
                )
            found = [(name, row) for name, row in zip(names, self._rows, strict=True) if row is not None]
            self._networks = source.select([row for _, row in found], [name for name, _ in found]).double()
        self._names = names
        self._weights = weights_of(names, parameters, self.embedding_rows)
        if fresh:
            self._history = ScaleHistory.begin(len(names))

    # ---- resuming ------------------------------------------------------------------------------------------------------
    def _signature(self) -> str:
        if isinstance(self._source, (int, float)):
            return f"constant {float(self._source)}"
        return f"initial {self.network_seed}" if self._source is None else self._source.fingerprint()

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Sampler.state_dict`."""
        if self._history is None:
            return {}
        return {
            "networks": self._signature(),
            "history": self._history.state_dict(),
            "statistics": [list(pair) for pair in self._statistics],
            "looked": self._looked,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Sampler.load_state_dict`.

        Raises:
            ValueError: If the state was made with other networks.
        """
        if state["networks"] != self._signature():
            raise ValueError("the checkpoint was made with other scale networks; use the same networks and network_seed")
        self._history = ScaleHistory.from_state_dict(state["history"])
        self._statistics = [(float(mean), float(variance)) for mean, variance in state["statistics"]]
        self._looked = state["looked"]
        self._drawn = None


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names[:3])
