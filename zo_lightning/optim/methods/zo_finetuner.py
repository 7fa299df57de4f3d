"""ZO Fine-tuner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.sampling.learned_scales import LearnedScales
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["ZOFineTuner"]


class ZOFineTuner(ZerothOrder):
    """ZO-SGD with a learned scale of the perturbation for each parameter tensor (ZO Fine-tuner, 2025).

    See :class:`LearnedScales`; docs/finetuner.md has how networks are learned and converted. Two forwards per step; 449 numbers
    for each parameter tensor.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Learning rate η.
        smoothing: Smoothing radius ε.
        networks: The file of learned networks. Controls: None takes networks as they begin, and a number one scale for all,
            which is ZO-SGD.
        network_seed: Of the networks as they begin.
        refresh: Steps between two looks at the weights' means and variances.
        embedding_rows: Rows of an embedding that count in the normaliser; None for all. The released code has 15 · batch size.
        weight_decay: Decoupled weight decay.
        seed: See :class:`ZerothOrder`.
        probes: See :class:`ZerothOrder`.
        max_nonfinite: See :class:`ZerothOrder`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an argument is out of its range, or the file is none of scale networks.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        smoothing: float = 1e-3,
        *,
        networks: float | str | None = None,
        network_seed: int = 0,
        refresh: int = 100,
        embedding_rows: int | None = None,
        weight_decay: float = 0.0,
        seed: int | None = None,
        probes: Literal["auto", "sequential", "stacked"] = "auto",
        max_nonfinite: int = 10,
    ) -> None:
        super().__init__(
            params,
            lr,
            smoothing,
            directions="gaussian",
            update="sgd",
            sampler=LearnedScales(networks, network_seed, refresh, embedding_rows),
            weight_decay=weight_decay,
            seed=seed,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
