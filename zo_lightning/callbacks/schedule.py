"""The learning-rate schedule of an optimizer that is never stepped."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from zo_lightning.optim import ZerothOrder

__all__ = ["Schedule"]


class Schedule:
    """Lets the steps of one optimizer follow the learning rates of another, each relative to where it began.

    Args:
        source: The optimizer whose ``lr`` schedulers and callbacks change.
    """

    def __init__(self, source: Optimizer) -> None:
        self._source = source
        self._first = [_reference(group) for group in source.param_groups]

    def split(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Split parameter groups so that each follows one group of the source, whose number it has under ``follows``."""
        if not self._source.param_groups:
            return groups
        number = {p: index for index, group in enumerate(self._source.param_groups) for p in group["params"]}
        result = []
        for group in groups:
            for index in range(len(self._source.param_groups)):
                members = [(name, p) for name, p in group["params"] if number[p] == index]
                if members:
                    result.append({**group, "params": members, "follows": index})
        return result

    def apply(self, optimizer: ZerothOrder) -> None:
        """Hand the present learning rates over, as those that a scheduler has set."""
        for group in optimizer.param_groups:
            if "follows" in group:
                source = self._source.param_groups[group["follows"]]
                first = _reference(source, self._first[group["follows"]])
                if float(source["lr"]) != first or "initial_lr" in group:
                    group["initial_lr"], group["lr"] = first, float(source["lr"])

    def state_dict(self) -> dict[str, Any]:
        """The learning rates at the beginning."""
        return {"first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._first = [float(lr) for lr in state["first"]]


def _reference(group: dict[str, Any], first: float | None = None) -> float:
    """What a learning rate is relative to: the peak of a one-cycle schedule, else what a scheduler or the group began with."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"] if first is None else first)))
