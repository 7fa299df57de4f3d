"""Scale each parameter so that a unit step changes its module's output by its own size.

Layers differ by orders of magnitude in how strongly the loss reacts to an equal change of their weights, so that one radius per
geometry lets a few parameters use up the whole step. One forward pass tells the size of each module's inputs and outputs, and
with it how large a random change of a parameter must be to change the output by as much as the output itself. The geometry
then works on the parameters in these units: a step γ is a relative change of γ everywhere.

This is this project's own construction (docs/measurements.md has what it changes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.optim.directions import Directions, matrix_shape
from zo_lightning.optim.geometry import Geometry

__all__ = ["Activity", "entry_target", "output_units", "unit_entry"]


@dataclass
class Activity:
    """Root-mean-square of a module's floating-point input (None if it has none) and of its output, over one forward.

    Both stay tensors until :meth:`read`, so that observing a forward does not synchronise with the device.
    """

    module: nn.Module
    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def record(self, args: tuple[Any, ...], output: Any) -> None:
        """Keep the sizes of the first call."""
        if self.outputs is not None:
            return
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_floating_point():
            self.inputs = _rms(first)
        while isinstance(output, (tuple, list)) and output:
            output = output[0]
        if isinstance(output, Tensor) and output.is_floating_point():
            self.outputs = _rms(output)

    def read(self) -> tuple[float | None, float | None]:
        """The two sizes as numbers, None where there is none or it is zero or not finite."""
        return _usable(self.inputs), _usable(self.outputs)


def output_units(
    parameters: Sequence[nn.Parameter],
    activity: Mapping[nn.Parameter, Activity],
    geometry: Geometry,
    directions: Directions,
) -> list[float]:
    """Each parameter's unit of length: by this a unit-norm direction changes its module's output by the output's own size.

    Args:
        parameters: The members of one group.
        activity: What was seen of their modules.
        geometry: The group's geometry.
        directions: The family of directions.
    """
    shapes = [parameter.shape for parameter in parameters]
    return [entry_target(p, activity.get(p)) / unit_entry(geometry, directions, p.shape, shapes) for p in parameters]


def entry_target(parameter: nn.Parameter, activity: Activity | None) -> float:
    """Root-mean-square entry of a random change of ``parameter`` that changes its module's output by the output's size.

    For ``y = W x + b`` with n inputs a change of W with independent entries of size e changes y by ``e √n rms(x)``, and a
    change of b by e; a row of an embedding table is an output. A module whose output is zero (a fresh LoRA factor) is
    measured by its input; a parameter whose module was not observed by its own size.

    Returns:
        The size, always positive and finite.
    """
    inputs, outputs = activity.read() if activity is not None else (None, None)
    size = outputs or inputs
    if activity is None or size is None:
        return _usable(_rms(parameter.detach())) or 1.0
    if parameter.dim() < 2 or isinstance(activity.module, (nn.Embedding, nn.EmbeddingBag)):
        return size
    rows, columns = matrix_shape(parameter.shape)
    fan_in = rows if type(activity.module).__name__ == "Conv1D" else columns
    return size / (math.sqrt(fan_in) * (inputs or 1.0))


def unit_entry(geometry: Geometry, directions: Directions, shape: torch.Size, group: list[torch.Size]) -> float:
    """Root-mean-square entry of a unit-norm random direction of ``geometry``, for one member of a group.

    Args:
        geometry: The group's geometry, at radius 1.
        directions: The family of directions, of which the rank counts.
        shape: The member's shape.
        group: Shapes of all members, for geometries that couple them.
    """
    if geometry.coupled:
        sizes = [(_random_entry(directions, s), s.numel()) for s in group]
        return _random_entry(directions, shape) / math.sqrt(sum(e * e * n for e, n in sizes))
    if geometry.name != "spectral":
        return 1.0
    if len(shape) < 2:
        return 1 / math.sqrt(shape.numel())
    rows, columns = matrix_shape(shape)
    rank = min(rows, columns, _rank(directions, rows, columns))
    return geometry.aspect(shape) * math.sqrt(rank / (rows * columns))


def _random_entry(directions: Directions, shape: torch.Size) -> float:
    """Root-mean-square entry of a random direction: U Vᵀ with standard normal U and orthonormal V has √(r/n)."""
    if not directions.low_rank or len(shape) < 2:
        return 1.0
    rows, columns = matrix_shape(shape)
    return math.sqrt(_rank(directions, rows, columns) / columns)


def _rank(directions: Directions, rows: int, columns: int) -> int:
    return min(rows, columns, getattr(directions, "rank", min(rows, columns)))


def _rms(x: Tensor) -> Tensor:
    return x.detach().float().square().mean().sqrt()


def _usable(size: Tensor | None) -> float | None:
    if size is None:
        return None
    value = float(size)
    return value if math.isfinite(value) and value > 0 else None
