"""Dense directions: each is drawn where it is used, and the update is written at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_lightning.optim import kernels
from zo_lightning.optim.directions import Dense, Factors, LowRank, block_rows, matrix_shape
from zo_lightning.optim.displacement import eager
from zo_lightning.optim.geometry import Geometry
from zo_lightning.optim.path import Path, Point, geometry_of, sum_of_squares
from zo_lightning.optim.precision import no_autocast
from zo_lightning.optim.randomness import generator
from zo_lightning.optim.rounding import write_rounded
from zo_lightning.optim.shown import Drawn, Shown, ShownDense, ShownVector
from zo_lightning.optim.step_rules import StepReport

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
        directions = self.setting.directions
        if isinstance(directions, LowRank) and self.setting.head["step"] % directions.interval == 0:
            self._carry()

    def end(self) -> None:
        """See :meth:`Path.end`."""
        self._scaled: dict[int, Scales] = {}
        self._places = {p: (index, geometry, name, unit) for index, geometry, name, p, unit in self.setting.members()}

    @no_autocast()
    def _carry(self) -> None:
        """Project what is remembered of matrices onto the V of a new interval, as :class:`LowRankPath` does."""
        sampler = self.setting.sampler
        for parameter, (_, _, name, _) in self._places.items():
            state = self.setting.state.get(parameter, {})
            for key in ("momentum_buffer", *(() if sampler is None else sampler.carried)):
                if key in state and parameter.dim() > 1:
                    z = self._z(parameter, name, 0)
                    assert isinstance(z, Factors)
                    old = state[key].reshape(matrix_shape(parameter.shape))
                    left = torch.linalg.solve(z.right.T @ z.right, z.right.T @ old.T)
                    state[key] = (left.T @ z.right.T).reshape(parameter.shape)

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
        # all directions of the step count, so that a forward takes the same course at each of them and in a stacked batch
        queries = {point.query for point in points} | set(range(self.setting.head["num_directions"]))
        return {
            p: self._stand_in(p, name, points)
            for p, (_, _, name, _) in self._places.items()
            if any(self.moves(name, query) for query in queries)
        }

    def moves(self, name: str, query: int) -> bool:
        """Whether the direction moves this parameter at all; asked for every parameter in every forward."""
        family = self.setting.family(query)
        return not family.sparse or family.moves(self.setting.address(name, query))

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

    def drawn(self, parameter: nn.Parameter, query: int) -> Tensor:
        """The random direction z itself, dense."""
        return self._dense(parameter, self._z(parameter, self._places[parameter][2], query))

    def place(self, parameter: nn.Parameter) -> tuple[int, Geometry, str, float]:
        """Number and geometry of the parameter's group, its name, and its unit of length."""
        return self._places[parameter]

    # ---- directions ----------------------------------------------------------------------------------------------------
    @no_autocast()
    def _u(self, parameter: nn.Parameter, query: int) -> Tensor:
        """The direction u to probe ``parameter`` along, float32, drawn anew."""
        return self._dense(parameter, self._probed(parameter, query))

    def _probed(self, parameter: nn.Parameter, query: int) -> Tensor | Factors:
        """The same, as factors where it is some."""
        index, geometry, name, _ = self._places[parameter]
        z = self._shaped(parameter, name, query)
        if isinstance(z, Factors) and not self._keeps_factors(geometry):
            z = self._dense(parameter, z)
        return self.setting.update.probe(z, geometry, self._scales(query).get(index))

    def _keeps_factors(self, geometry: Geometry) -> bool:
        """Whether factors of which any may be held are factors again in what is done to them."""
        setting = self.setting
        return not (setting.update.oracle and setting.directions.factored) or geometry.name in ("spectral", "euclidean")

    def _shaped(self, parameter: nn.Parameter, name: str, query: int) -> Tensor | Factors:
        """The random direction, as what is learned of its distribution has it."""
        z, sampler = self._z(parameter, name, query), self.setting.shaper
        # a direction that leaves the parameter alone does so whatever its distribution
        if sampler is None or query < 0 or not self.moves(name, query):
            return z
        return sampler.shape(self._dense(parameter, z), parameter, self.setting.memory(parameter))

    @no_autocast()
    def pieces(self, parameter: nn.Parameter, query: int) -> Iterator[tuple[int, int, Tensor]]:
        """The direction u in pieces of rows, where update and geometry treat each row by itself; else as one piece."""
        index, geometry, name, _ = self._places[parameter]
        directions, shape, device = self.setting.family(query), parameter.shape, parameter.device
        total = matrix_shape(shape)[0]
        by_rows = (not self.setting.update.oracle or geometry.by_rows) and self.setting.shaper is None
        if parameter.dim() < 2 or not by_rows or not isinstance(directions, Dense):
            yield 0, total, self._u(parameter, query).reshape(total, -1)
            return
        scale = self._scales(query).get(index)
        step = block_rows(shape, device) * (_BLOCKS_AT_ONCE if device.type == "cpu" else 1)
        for first in range(0, total, step):
            last = min(first + step, total)
            z = directions.rows(self.setting.address(name, query), shape, first, last, device)
            yield first, last, self.setting.update.probe_(z, geometry, scale)

    def looked_up(self, parameter: nn.Parameter, query: int, ids: Tensor) -> Tensor | None:
        """These rows of the direction u of a matrix, where it is a product; None if all of them are as easily formed."""
        setting = self.setting
        factored = isinstance(setting.directions, LowRank) or setting.directions.factored
        if not factored or setting.shaper is not None or ids.numel() >= len(parameter):
            return None
        u = self._probed(parameter, query)
        return F.embedding(ids, u.left) @ u.right.T if isinstance(u, Factors) else None

    def _z(self, parameter: nn.Parameter, name: str, query: int) -> Tensor | Factors:
        return self.setting.family(query).draw(self.setting.address(name, query), parameter.shape, parameter.device)

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
                index: sum_of_squares(self._shaped(p, name, query) for p, name in pairs).rsqrt()
                for index, pairs in members.items()
            }
        return self._scaled[query]

    # ---- the update ----------------------------------------------------------------------------------------------------
    @no_autocast()
    def apply(self, report: StepReport) -> None:
        """See :meth:`Path.apply`; the weights are written here and nowhere else."""
        update, sampler = self.setting.update, self.setting.sampler
        weights = update.weights(report.slopes, self.setting.head["smoothing"])
        terms = list(zip(report.taken, weights, strict=True))
        for group, lr in zip(self.setting.groups, report.rates, strict=True):
            geometry = geometry_of(group)
            simple = update.along and len(terms) == 1 and not group["momentum"]
            scale = None
            if not simple and geometry.coupled and update.oracle:
                # the oracle needs the norm of the whole group's estimate: a pre-pass
                estimates = (self._estimate(p, group, terms, store=False) for p in group["params"])
                scale = geometry.coupling(sum_of_squares(estimates))
            for parameter in group["params"]:
                unit = self._places[parameter][3]
                decay = 1 - lr * group["weight_decay"]
                state = self.setting.memory(parameter)
                draw = _Draw(self, parameter)
                if sampler is not None:
                    sampler.before_update(draw, parameter, state, report)
                if simple:
                    query, weight = terms[0]
                    factor = -lr * unit * update.coefficient(weight)
                    if not _Direction(self, parameter, query).update(factor, decay):
                        self._write(parameter, self.pieces(parameter, query), factor, decay)
                else:
                    estimate = self._estimate(parameter, group, terms, store=True)
                    step = self._dense(parameter, update.step(estimate, geometry, scale, state))
                    self._write(parameter, iter([(0, step.numel(), step.contiguous())]), lr * unit, decay)
                if sampler is not None:
                    sampler.after_update(draw, parameter, state, report)

    @staticmethod
    def _dense(parameter: nn.Parameter, step: Tensor | Factors) -> Tensor:
        return step.dense().reshape(parameter.shape) if isinstance(step, Factors) else step

    def _estimate(
        self, parameter: nn.Parameter, group: dict[str, Any], terms: Sequence[tuple[int, float]], *, store: bool
    ) -> Tensor | Factors:
        """The estimate ``Σ w u`` in the parameter's unit, through its momentum if it has one (float32)."""
        beta, directions, (_, geometry, name, _) = group["momentum"], self.setting.directions, self._places[parameter]
        factored = directions.factored and parameter.dim() > 1 and self.setting.sampler is None
        if not beta and factored and self._keeps_factors(geometry):
            return self._factors(parameter, terms)
        total: Tensor | None = None
        probed: Tensor | None = None
        for query, weight in terms:
            if not self.moves(name, query):
                continue
            u = self._u(parameter, query)
            total = u * weight if total is None else total.add_(u, alpha=weight)
            if beta and directions.sparse:
                probed = u != 0 if probed is None else probed | (u != 0)
        if total is None:
            total = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        if not beta:
            return total
        old = self.setting.state[parameter].get("momentum_buffer")
        if old is None:
            old = torch.zeros_like(total)
        average = total.mul_(1 - beta).add_(old, alpha=beta)
        if directions.sparse:  # an entry that was not probed keeps what is remembered of it
            average = old.clone() if probed is None else torch.where(probed, average, old)
        if store:
            self.setting.state[parameter]["momentum_buffer"] = average
        return average

    def _factors(self, parameter: nn.Parameter, terms: Sequence[tuple[int, float]]) -> Factors:
        """The estimate of a matrix whose directions share a held factor, as factors."""
        total: Factors | None = None
        for query, weight in terms:
            u = self._probed(parameter, query)
            assert isinstance(u, Factors)
            total = u.scaled(weight) if total is None else u.with_fresh(total.fresh.add_(u.fresh, alpha=weight))
        assert total is not None
        return total

    def _write(self, parameter: nn.Parameter, pieces: Iterator[tuple[int, int, Tensor]], factor: float, decay: float) -> None:
        name = self._places[parameter][2]
        head = self.setting.head
        source = generator(head["seed"], head["step"], name, "rounding", device=parameter.device)
        write_rounded(parameter, (rows for _, _, rows in pieces), factor, decay, source)


class _Draw:
    """A :class:`~zo_lightning.optim.sampling.Draw` of one parameter."""

    def __init__(self, path: DensePath, parameter: nn.Parameter) -> None:
        self._path, self._parameter, self._name = path, parameter, path.place(parameter)[2]

    def __call__(self, query: int) -> Tensor:
        return self._path.drawn(self._parameter, query)

    def moves(self, query: int) -> bool:
        return self._path.moves(self._name, query)


class _Direction(Drawn):
    """The direction of one parameter in the coming step."""

    def __init__(self, path: DensePath, parameter: nn.Parameter, query: int) -> None:
        self._path, self._parameter, self._query = path, parameter, query
        setting, (_, geometry, name, _) = path.setting, path.place(parameter)
        self._address = setting.address(name, query)
        self._family = setting.family(query)
        self._multiple = setting.update.multiple(self._family, geometry)
        fits = parameter.dim() > 0 and parameter.is_contiguous() and parameter.dtype in kernels.DTYPES
        fits = fits and isinstance(self._family, Dense) and setting.shaper is None
        self.in_registers = fits and self._multiple is not None and kernels.available(parameter.device)

    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """See :meth:`Drawn.pieces`."""
        return self._path.pieces(self._parameter, self._query)

    def looked_up(self, ids: Tensor) -> Tensor | None:
        """See :meth:`Drawn.looked_up`."""
        return self._path.looked_up(self._parameter, self._query, ids)

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
        directions = self._family
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
        assert isinstance(self._family, Dense)
        return self._family.kind
