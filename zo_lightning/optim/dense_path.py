"""Dense directions: each is drawn where it is used, and the update is written at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.optim import kernels
from zo_lightning.optim.directions import Dense, Factors, block_rows, matrix_shape
from zo_lightning.optim.displacement import eager
from zo_lightning.optim.geometry import Geometry
from zo_lightning.optim.path import Path, Point, geometry_of, sum_of_squares
from zo_lightning.optim.precision import no_autocast
from zo_lightning.optim.randomness import generator
from zo_lightning.optim.rounding import write_rounded
from zo_lightning.optim.shown import Drawn, Shown, ShownDense, ShownVector

__all__ = ["DensePath"]

Scales = dict[int, Tensor]

_BLOCKS_AT_ONCE = 16  # of a direction: threads take turns with torch's own, which wait actively, and turns cost time


class DensePath(Path):
    """A direction is never whole in memory: one parameter's part is drawn at its use in a forward, for all parts of the batch
    that go along it, and once more for the update. Parameters that have no module are moved in place.

    Low-rank directions work too, as matrices; :class:`LowRankPath` is for them.
    """  # noqa: D205

    def begin(self) -> None:
        """See :meth:`Path.begin`."""
        self.end()

    def end(self) -> None:
        """See :meth:`Path.end`."""
        self._scaled: dict[int, Scales] = {}
        self._places = {p: (index, geometry, name, unit) for index, geometry, name, p, unit in self.setting.members()}

    @contextmanager
    def show(self, points: Sequence[Point]) -> Iterator[None]:
        """See :meth:`Path.show`; uncompiled, since a graph would break wherever a direction is drawn."""
        with eager(), super().show(points):
            yield

    def stand_ins(self, points: Sequence[Point]) -> Mapping[nn.Parameter, Shown]:
        """See :meth:`Path.stand_ins`."""
        if all(point.tau == 0 for point in points):
            return {}
        for point in points:
            self._scales(point.query)  # before the first use: its pre-pass draws all directions of a group
        return {p: self._stand_in(p, name, points) for p, (_, _, name, _) in self._places.items()}

    def _stand_in(self, parameter: nn.Parameter, name: str, points: Sequence[Point]) -> Shown:
        unit = self._places[parameter][3]
        if parameter.dim() < 2:
            vector: ShownVector = ShownVector.stand_in(name, parameter, len(points))
            with no_autocast():
                wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
                vector.entries = torch.stack([wide + point.tau * unit * self._u(parameter, point.query) for point in points])
            return vector
        dense: ShownDense = ShownDense.stand_in(name, parameter, len(points))
        drawn = {point.query: _Direction(self, parameter, point.query) for point in points}
        dense.draws = [(drawn[point.query], point.tau * unit) for point in points]
        return dense

    def place(self, parameter: nn.Parameter) -> tuple[int, Geometry, str, float]:
        """Number and geometry of the parameter's group, its name, and its unit of length."""
        return self._places[parameter]

    # ---- directions ----------------------------------------------------------------------------------------------------
    @no_autocast()
    def _u(self, parameter: nn.Parameter, query: int) -> Tensor:
        """The direction u to probe ``parameter`` along, float32, drawn anew."""
        index, geometry, name, _ = self._places[parameter]
        z = self._z(parameter, name, query)
        u = self.setting.update.probe(z, geometry, self._scales(query).get(index))
        return u.dense().reshape(parameter.shape) if isinstance(u, Factors) else u

    @no_autocast()
    def pieces(self, parameter: nn.Parameter, query: int) -> Iterator[tuple[int, int, Tensor]]:
        """The direction u in pieces of rows, where update and geometry treat each row by itself; else as one piece."""
        index, geometry, name, _ = self._places[parameter]
        directions, shape, device = self.setting.directions, parameter.shape, parameter.device
        total = matrix_shape(shape)[0]
        by_rows = not self.setting.update.normalised or geometry.by_rows
        if parameter.dim() < 2 or not by_rows or not isinstance(directions, Dense):
            yield 0, total, self._u(parameter, query).reshape(total, -1)
            return
        scale = self._scales(query).get(index)
        step = block_rows(shape, device) * _BLOCKS_AT_ONCE
        for first in range(0, total, step):
            last = min(first + step, total)
            z = directions.rows(self.setting.address(name, query), shape, first, last, device)
            yield first, last, self.setting.update.probe_(z, geometry, scale)

    def _z(self, parameter: nn.Parameter, name: str, query: int) -> Tensor | Factors:
        return self.setting.directions.draw(self.setting.address(name, query), parameter.shape, parameter.device)

    @no_autocast()
    def _scales(self, query: int) -> Scales:
        """One over the Euclidean norm of z, for each group whose directions or geometry are coupled.

        A pre-pass over the group's directions, made once for both probes and the update of a step.
        """
        if query not in self._scaled:
            members: dict[int, list[tuple[nn.Parameter, str]]] = {}
            for parameter, (index, geometry, name, _) in self._places.items():
                if self.setting.needs_scale(geometry):
                    members.setdefault(index, []).append((parameter, name))
            self._scaled[query] = {
                index: sum_of_squares(self._z(p, name, query) for p, name in pairs).rsqrt() for index, pairs in members.items()
            }
        return self._scaled[query]

    # ---- the update ----------------------------------------------------------------------------------------------------
    @no_autocast()
    def apply(self, slopes: list[float], rates: Sequence[float]) -> None:
        """See :meth:`Path.apply`; the weights are written here and nowhere else."""
        update = self.setting.update
        for group, lr in zip(self.setting.groups, rates, strict=True):
            geometry = geometry_of(group)
            simple = len(slopes) == 1 and not group["momentum"]
            scale = None
            if not simple and geometry.coupled and update.normalised:
                # the oracle needs the norm of the whole group's estimate: a pre-pass
                estimates = (self._estimate(p, group, slopes, store=False) for p in group["params"])
                scale = geometry.coupling(sum_of_squares(estimates))
            for parameter in group["params"]:
                unit = self._places[parameter][3]
                decay = 1 - lr * group["weight_decay"]
                if simple:
                    factor = -lr * unit * update.coefficient(slopes[0])
                    if not _Direction(self, parameter, 0).update(factor, decay):
                        self._write(parameter, self.pieces(parameter, 0), factor, decay)
                else:
                    step = self._step(self._estimate(parameter, group, slopes, store=True), geometry, scale)
                    self._write(parameter, iter([(0, len(step.view(-1)), step)]), lr * unit, decay)

    def _step(self, estimate: Tensor, geometry: Geometry, scale: Tensor | None) -> Tensor:
        step = self.setting.update.step(estimate, geometry, scale)
        assert isinstance(step, Tensor)
        return step

    def _estimate(self, parameter: nn.Parameter, group: dict[str, Any], slopes: list[float], *, store: bool) -> Tensor:
        """The averaged estimate ``mean_i ρ_i u_i`` in the parameter's unit, through its momentum if it has one (float32)."""
        total = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        for query, slope in enumerate(slopes):
            total.add_(self._u(parameter, query), alpha=slope / len(slopes))
        beta = group["momentum"]
        if not beta:
            return total
        old = self.setting.state[parameter].get("momentum_buffer")
        average = total.mul_(1 - beta) if old is None else total.mul_(1 - beta).add_(old, alpha=beta)
        if store:
            self.setting.state[parameter]["momentum_buffer"] = average
        return average

    def _write(self, parameter: nn.Parameter, pieces: Iterator[tuple[int, int, Tensor]], factor: float, decay: float) -> None:
        name = self._places[parameter][2]
        head = self.setting.head
        source = generator(head["seed"], head["step"], name, "rounding", device=parameter.device)
        write_rounded(parameter, (rows for _, _, rows in pieces), factor, decay, source)


class _Direction(Drawn):
    """The direction of one parameter in the coming step."""

    def __init__(self, path: DensePath, parameter: nn.Parameter, query: int) -> None:
        self._path, self._parameter, self._query = path, parameter, query
        setting, (_, geometry, name, _) = path.setting, path.place(parameter)
        self._address = setting.address(name, query)
        self._multiple = setting.update.multiple(setting.directions, geometry)
        fits = parameter.dim() > 0 and parameter.is_contiguous() and parameter.dtype in kernels.DTYPES
        fits = fits and isinstance(setting.directions, Dense)
        self.in_registers = fits and self._multiple is not None and kernels.available(parameter.device)

    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """See :meth:`Drawn.pieces`."""
        return self._path.pieces(self._parameter, self._query)

    def displaced(self, weight: Tensor, tau: float) -> Tensor:
        """See :meth:`Drawn.displaced`."""
        if not self.in_registers:
            return super().displaced(weight, tau)
        out = torch.empty_like(weight)
        for rows, seed in self._blocks():
            kernels.displace(weight[rows], seed, tau * self._factor, self._kind, out[rows])
        return out

    def update(self, factor: float, decay: float) -> bool:
        """``W ← decay W + factor u``, if that can be done without writing u."""
        if not self.in_registers:
            return False
        weight = self._parameter.detach()
        for rows, seed in self._blocks():
            # the streams of rounding and direction are distinct
            kernels.update_(weight[rows], seed, factor * self._factor, decay, self._kind, seed)
        return True

    def _blocks(self) -> Iterator[tuple[slice, int]]:
        directions = self._path.setting.directions
        assert isinstance(directions, Dense)
        step = block_rows(self._parameter.shape, self._parameter.device)
        for block, first in enumerate(range(0, len(self._parameter), step)):
            yield slice(first, first + step), directions.block_seed(self._address, block)

    @property
    def _factor(self) -> float:
        assert self._multiple is not None
        return self._multiple

    @property
    def _kind(self) -> kernels.Kind:
        directions = self._path.setting.directions
        assert isinstance(directions, Dense)
        return directions.kind
