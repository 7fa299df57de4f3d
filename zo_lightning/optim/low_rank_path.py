"""Low-rank directions inside the forward pass: the weights are only read, and written every ν steps.

All factors of a step lie in a few flat float32 tensors, so that what is done to all of them is one operation. For the matrix W
the model sees ``s W + (C + τ U) Vᵀ``: U is the step's direction, C what the steps since the last write have added up to,
and s their weight decay. Vectors (biases, norms) have no V: they are ``s w + c + τ u``. V changes every ν steps, and
just before it does, C Vᵀ is folded into W. In between, forwards, checkpoints and copies see the folded weights
(:mod:`zo_lightning.optim.pending`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.optim.directions import Directions, Factors, LowRank
from zo_lightning.optim.displacement import Displacement, warn_of
from zo_lightning.optim.flat import Place, device_of, flat_direction, flat_right, places_of
from zo_lightning.optim.geometry import Geometry
from zo_lightning.optim.path import Path, Point, Setting, geometry_of, sum_of_squares
from zo_lightning.optim.precision import no_autocast
from zo_lightning.optim.randomness import generator
from zo_lightning.optim.rounding import round_stochastically
from zo_lightning.optim.sampling import Sampler
from zo_lightning.optim.shown import Shown, ShownMatrix, ShownVector
from zo_lightning.optim.step_rules import StepReport
from zo_lightning.optim.world import submodules

__all__ = ["LowRankPath"]

_FOLDED_AT_ONCE = 1 << 22  # elements of a half-precision weight whose float32 copy is made at a time
_CPU = torch.device("cpu")
_Key = tuple[int, int, list[Geometry], list[Any]]


class LowRankPath(Path):
    """See the module.

    Attributes:
        dirty: Whether an update is pending.
        version: Grows with every change of the pending update.

    Args:
        setting: What it knows of the optimizer; the directions are low-rank.
        displacement: Over the parameters and their module.
        prefetch: Draw the next step's directions while the device computes this one's losses; None does so for CUDA.

    Raises:
        ValueError: If the parameters lie on several devices.
    """

    def __init__(self, setting: Setting, displacement: Displacement, *, prefetch: bool | None = None) -> None:
        super().__init__(setting, displacement)
        self._places: list[Place] = []
        self._prefetch = prefetch
        self._clear()

    def _clear(self) -> None:
        self._pending: Tensor | None = None  # C, flat
        self._scales: list[float] = []  # s of each group
        self._momentum: Tensor | None = None
        self._right: Tensor | None = None
        self._window: tuple[int, int] | None = None  # what V was drawn for
        self._origin: Tensor | None = None  # the vectors, in their places among the left factors
        self._vectors: list[tuple[Tensor, nn.Parameter]] = []  # with their places in it
        self._where: list[int] = []  # the weights' memory, at which the stand-ins look
        self._shown: dict[int, tuple[Tensor, dict[nn.Parameter, Shown]]] = {}
        self._drawn: dict[int, Tensor] = {}
        self._shaped: dict[int, Tensor] = {}
        self._ahead: tuple[_Key, list[Tensor]] | None = None  # the next step's directions, and what they are a function of
        self._spans: list[slice] = []
        self._warned = False
        self._applied = 0  # updates so far, which seed the rounding
        self.dirty = False
        self.version = 0

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the module needs to go on showing the pending update: everything but directions and stand-ins."""
        return {**self.__dict__, "_vectors": [], "_where": [], "_shown": {}, "_drawn": {}, "_shaped": {}, "_ahead": None}

    # ---- layout --------------------------------------------------------------------------------------------------------
    def _lay_out(self) -> None:
        self._places = places_of(self.setting)
        self._device = device_of(self._places)
        self._dtype = torch.float32
        if any(place.parameter.dtype is torch.float64 for place in self._places):
            self._dtype = torch.float64
        last = self._places[-1]
        columns = last.right_start + last.columns * last.rank
        self._pending = torch.zeros(last.stop, dtype=self._dtype, device=self._device)
        self._right = torch.zeros(columns, dtype=self._dtype, device=self._device)
        self._origin = torch.zeros_like(self._pending)
        self._scales = [1.0] * len(self.setting.groups)
        for index in range(len(self.setting.groups)):
            members = [place for place in self._places if place.group == index]
            self._spans.append(slice(members[0].start, members[-1].stop))

    @property
    def _lazy(self) -> bool:
        """Whether the update may wait. Compiled modules would not notice the hooks that show it, nor would in-place uses."""
        assert self.displacement.module is not None
        return not self.displacement.in_place and not any(map(_is_compiled, submodules(self.displacement.module)))

    # ---- directions ----------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """See :meth:`Path.begin`."""
        if not self._places:
            self._lay_out()
        if self.moved_away:
            self._move(device_of(self._places))
        self._warn_of_formed()
        self._drawn, self._shaped = {}, {}
        self._turn()
        self.refresh()

    def refresh(self) -> None:
        """Read the vectors anew, and see where the matrices are: others may have written them, or put them elsewhere."""
        assert self._origin is not None
        if not self._vectors:
            origin = self._origin
            self._vectors = [(place.left(origin), place.parameter) for place in self._places if not place.rank]
        if self._vectors:
            torch._foreach_copy_([into for into, _ in self._vectors], [parameter for _, parameter in self._vectors])
        where = [place.parameter.data_ptr() for place in self._places]
        if where != self._where:
            self._where, self._shown = where, {}

    def _move(self, device: torch.device) -> None:
        self._device = device
        self._pending, self._right, self._origin, self._momentum = (
            None if flat is None else flat.to(self._device)
            for flat in (self._pending, self._right, self._origin, self._momentum)
        )
        self._vectors, self._shown = [], {}

    def _turn(self) -> None:
        """Draw V where a new interval begins, and carry the momentum over to it."""
        head = self.setting.head
        interval = _interval(self.setting.directions)
        window = (head["seed"], head["step"] // interval)
        if window == self._window:
            return
        if self._window is not None:
            self.fold()  # a guard: the last step of an interval has done it, unless the seed was changed
        assert self._right is not None
        old = self._right
        flat = torch.empty(old.shape, dtype=self._dtype)
        flat_right(self._places, self._geometries(), self.setting, (head["seed"], head["step"]), flat)
        new = flat.to(self._device)
        if self._momentum is not None and self._window is not None:
            for place in self._places:
                if place.rank:
                    _carry(place.left(self._momentum), place.right(old), place.right(new))
        if self.setting.sampler is not None and self._window is not None:
            self._carry_learned(self.setting.sampler, old, new)
        old.copy_(new)
        self._window = window
        self._shown = {}

    def _carry_learned(self, sampler: Sampler, old: Tensor, new: Tensor) -> None:
        for place in self._places:
            state = self.setting.state[place.parameter]
            for key in sampler.carried:
                if place.rank and key in state:
                    _carry(state[key], place.right(old), place.right(new))

    def _draw(self, query: int, step: int | None = None) -> Tensor:
        """The flat left factors of a direction, on the CPU; of the coming step if none is given."""
        geometries, head = self._geometries(), self.setting.head
        at = (head["seed"], head["step"] if step is None else step)
        pin = self._device.type == "cuda"
        return flat_direction(self._places, geometries, self._units(), self.setting, at, query, pin=pin)

    def _geometries(self) -> list[Geometry]:
        return [geometry_of(group) for group in self.setting.groups]

    def _units(self) -> list[float]:
        return [unit for *_, unit in self.setting.members()]

    def _key(self, step: int) -> _Key:
        """All that the directions of a step are a function of and that others may change."""
        units = [None if group["units"] is None else list(group["units"]) for group in self.setting.groups]
        return self.setting.head["seed"], step, self._geometries(), units

    @no_autocast()
    def look_ahead(self) -> None:
        """See :meth:`Path.look_ahead`: draw the next step's directions, on the host."""
        if not (self._device.type == "cuda" if self._prefetch is None else self._prefetch):
            return
        step = self.setting.head["step"] + 1
        key, queries = self._key(step), range(self.setting.head["num_directions"])
        drawn = [self._draw(query, step).to(self._device, non_blocking=True) for query in queries]
        self._ahead = key, drawn

    @no_autocast()
    def _direction(self, query: int) -> Tensor:
        """The flat left factors U of a direction of the coming step, each parameter's in its unit of length."""
        if query not in self._drawn and query >= 0 and self._ahead is not None:
            (key, drawn), self._ahead = self._ahead, None
            if key == self._key(self.setting.head["step"]):
                self._drawn |= enumerate(drawn)
        if query not in self._drawn:
            self._drawn[query] = self._draw(query).to(self._device, non_blocking=True)
        if self.setting.sampler is None or query < 0:
            return self._drawn[query]
        if query not in self._shaped:
            self._shaped[query] = self._shape(self._drawn[query].clone(), self.setting.sampler)
        return self._shaped[query]

    def _shape(self, flat: Tensor, sampler: Sampler) -> Tensor:
        """What is learned of the directions' distribution; the right factors are as they are drawn."""
        for place, unit in zip(self._places, self._units(), strict=True):
            left = place.left(flat)
            z = left / unit if unit != 1 else left
            left.copy_(sampler.shape(z, place.parameter, self.setting.state[place.parameter]).mul_(unit))
        return flat

    # ---- what the model sees -------------------------------------------------------------------------------------------
    def stand_ins(self, points: Sequence[Point]) -> Mapping[nn.Parameter, Shown]:
        """See :meth:`Path.stand_ins`."""
        if all(point.tau == 0 for point in points) and not self.dirty:
            return {}
        lefts, shown = self._stand_ins(len(points))
        assert self._pending is not None
        assert self._origin is not None
        for part, point in enumerate(points):
            if point.tau == 0:
                lefts[part].copy_(self._pending)
            else:
                torch.add(self._pending, self._direction(point.query), alpha=point.tau, out=lefts[part])
        if all(scale == 1 for scale in self._scales):
            lefts += self._origin
        else:
            for group, scale in enumerate(self._scales):
                span = self._spans[group]
                lefts[:, span].add_(self._origin[span], alpha=scale)
            for place in self._places:
                if place.rank:
                    shown[place.parameter].scale = self._scales[place.group]  # type: ignore[attr-defined]
        return shown

    def _stand_ins(self, parts: int) -> tuple[Tensor, dict[nn.Parameter, Shown]]:
        """The left factors of ``parts`` parts, and the stand-ins that look at them: made once for an interval."""
        if parts in self._shown:
            return self._shown[parts]
        assert self._pending is not None
        assert self._right is not None
        with torch.inference_mode(False), torch.no_grad():  # what is made here is written again by later steps
            lefts = torch.zeros(parts, self._pending.numel(), dtype=self._dtype, device=self._device)
            shown: dict[nn.Parameter, Shown] = {}
            for place in self._places:
                if place.rank:
                    matrix: ShownMatrix = ShownMatrix.stand_in(place.name, place.parameter, parts)
                    size = place.rank * place.rows
                    matrix.left = lefts[:, place.start : place.stop].unflatten(1, (place.rank, size // place.rank))
                    matrix.right = place.right(self._right).to(place.parameter.dtype)
                    matrix.scale = 1.0
                    if matrix.flat:
                        matrix.turned = place.parameter.detach().t()
                    if parts == 1 and place.rank == 1:
                        matrix.single = matrix.left[0]
                    shown[place.parameter] = matrix
                else:
                    vector: ShownVector = ShownVector.stand_in(place.name, place.parameter, parts)
                    values = lefts[:, place.start : place.stop]
                    vector.entries = values if place.parameter.dim() else values.squeeze(1)
                    if place.parameter.dim():
                        vector.rows = values.unsqueeze(1) if parts > 1 else values  # which broadcast as well
                    shown[place.parameter] = vector
            self._shown[parts] = lefts, shown
        return self._shown[parts]

    def _warn_of_formed(self) -> None:
        """Once: which matrices a low-rank direction cannot follow, so that they are formed in each forward."""
        if self._warned or not self.displacement.observed:
            return
        self._warned = True
        known = ShownMatrix.handlers
        names = [
            place.name
            for place in self._places
            if place.rank and any(func not in known for func in self.displacement.uses.get(place.parameter, ()))
        ]
        warn_of(names, "used by functions that a low-rank direction cannot follow, and displaced as a whole in each forward")

    # ---- the update ----------------------------------------------------------------------------------------------------
    @no_autocast()
    def apply(self, report: StepReport) -> None:
        """See :meth:`Path.apply`: into C; the weights are written at the end of an interval."""
        assert self._pending is not None
        update, sampler = self.setting.update, self.setting.sampler
        weights = update.weights(report.slopes, self.setting.head["smoothing"])
        terms = list(zip(report.taken, weights, strict=True))
        if sampler is not None:
            for place, draw in self._draws():
                sampler.before_update(draw, place.parameter, self.setting.memory(place.parameter), report)
        average = self._average(terms)
        units = iter([] if average is None else self._units())
        for index, (group, lr) in enumerate(zip(self.setting.groups, report.rates, strict=True)):
            span = self._spans[index]
            decay = 1 - lr * group["weight_decay"]
            if decay != 1:
                self._pending[span].mul_(decay)
                self._scales[index] *= decay
            if average is None:
                query, weight = terms[0]
                self._pending[span].add_(self._direction(query)[span], alpha=-lr * update.coefficient(weight))
                continue
            members = [(place, next(units)) for place in self._places if place.group == index]
            self._step_along(average, members, geometry_of(group), lr)
        if sampler is not None:
            for place, draw in self._draws():
                sampler.after_update(draw, place.parameter, self.setting.memory(place.parameter), report)
        self.dirty = True
        self.version += 1
        self._applied += 1
        head = self.setting.head
        if (head["step"] + 1) % _interval(self.setting.directions) == 0 or not self._lazy:
            self.fold()

    def _draws(self) -> Iterator[tuple[Place, _Draw]]:
        for place, unit in zip(self._places, self._units(), strict=True):
            yield place, _Draw(self, place, unit)

    def drawn(self, place: Place, unit: float, query: int) -> Tensor:
        """The left factor of the random direction itself, transposed, in the parameter's unit."""
        self._direction(query)  # makes it
        left = place.left(self._drawn[query])
        return left / unit if unit != 1 else left.clone()

    def _average(self, terms: Sequence[tuple[int, float]]) -> Tensor | None:
        """The estimate ``Σ w u`` through its momentum, as flat factors; None for one direction that is the step."""
        betas = [group["momentum"] for group in self.setting.groups]
        if len(terms) == 1 and not any(betas) and self.setting.update.along:
            return None
        total = torch.zeros(self._spans[-1].stop, dtype=self._dtype, device=self._device)
        for query, weight in terms:
            total.add_(self._direction(query), alpha=weight)
        for place, unit in zip(self._places, self._units(), strict=True):
            if unit != 1:
                place.left(total).div_(unit)
        if not any(betas):
            return total
        if self._momentum is None:
            self._momentum = torch.zeros_like(total)
        for index, beta in enumerate(betas):
            span = self._spans[index]
            self._momentum[span].mul_(beta).add_(total[span], alpha=1 - beta)
        return self._momentum

    def _step_along(self, average: Tensor, members: list[tuple[Place, float]], geometry: Geometry, lr: float) -> None:
        assert self._pending is not None
        assert self._right is not None
        parts: list[Tensor | Factors] = [
            Factors(place.left(average).T, place.right(self._right)) if place.rank else place.left(average)
            for place, _ in members
        ]
        scale = None
        if geometry.coupled and self.setting.update.oracle:
            scale = geometry.coupling(sum_of_squares(parts))
        for (place, unit), part in zip(members, parts, strict=True):
            step = self.setting.update.step(part, geometry, scale, self.setting.memory(place.parameter))
            move = step.left.T if isinstance(step, Factors) else step
            place.left(self._pending).add_(move, alpha=lr * unit)

    # ---- writing the weights -------------------------------------------------------------------------------------------
    @torch.no_grad()
    @no_autocast()
    def fold(self) -> None:
        """Write the pending update into the weights."""
        if not self.dirty:
            return
        assert self._pending is not None
        for place in self._places:
            self._folded(place, place.parameter.detach())
        self._pending.zero_()
        self._scales = [1.0] * len(self._scales)
        self.dirty = False
        self.version += 1
        for _, shown in self._shown.values():
            for matrix in shown.values():
                if isinstance(matrix, ShownMatrix):
                    matrix.scale = 1.0
        torch.clear_autocast_cache()

    @property
    def moved_away(self) -> bool:
        """See :attr:`Path.moved_away`."""
        return self._places[0].parameter.device != self._device

    def holds(self, parameter: nn.Parameter) -> bool:
        """See :meth:`Path.holds`."""
        return self.dirty and any(place.parameter is parameter for place in self._places)

    @torch.no_grad()
    @no_autocast()
    def folded(self, parameter: nn.Parameter, device: torch.device | None = None) -> Tensor:
        """A copy of ``parameter`` as it will be when the pending update is written now."""
        place = next(place for place in self._places if place.parameter is parameter)
        return self._folded(place, parameter.detach().clone()).to(device or parameter.device)

    def _folded(self, place: Place, weight: Tensor) -> Tensor:
        """``s W + C Vᵀ`` into ``weight``, computed where C is.

        The Trainer moves its module to the CPU before ``on_fit_end``; a CPU would round otherwise than a replay on the GPU.
        """
        if weight.device == self._device:
            return self._folded_in_place(place, weight)
        return weight.copy_(self._folded_in_place(place, weight.to(self._device, copy=True)))

    def _folded_in_place(self, place: Place, weight: Tensor) -> Tensor:
        """``s W + C Vᵀ`` into ``weight``, rounded stochastically in half precision, and in pieces, to save memory."""
        assert self._pending is not None
        assert self._right is not None
        left, scale = place.left(self._pending), self._scales[place.group]
        source = generator(self.setting.head["seed"], self._applied, place.name, "rounding", device=weight.device)
        if not place.rank:
            wide = weight.to(self._dtype) * scale + left
            return weight.copy_(round_stochastically(wide, weight.dtype, source))
        matrix = weight.view(place.rows, place.columns) if weight.is_contiguous() else weight.reshape(place.rows, -1)
        right = place.right(self._right).T
        if weight.dtype == self._dtype:
            matrix.addmm_(left.T, right, beta=scale)
        else:
            rows = max(1, _FOLDED_AT_ONCE // place.columns)
            for first in range(0, place.rows, rows):
                piece = matrix[first : first + rows]
                wide = torch.addmm(piece.to(self._dtype), left[:, first : first + rows].T, right, beta=scale)
                piece.copy_(round_stochastically(wide, weight.dtype, source))
        if matrix.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            weight.copy_(matrix.view_as(weight))
        return weight

    # ---- state ---------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on exactly: C, s, the weights that it belongs to, and the momentum; tensors by name."""
        state: dict[str, Any] = {"applied": self._applied}
        if self.dirty:
            assert self._pending is not None
            state["pending"] = {place.name: _saved(place.left(self._pending)) for place in self._places}
            state["scales"] = list(self._scales)
            state["unfolded"] = {place.name: _saved(place.parameter.detach()) for place in self._places}
        if self._momentum is not None:
            state["momentum"] = {place.name: _saved(place.left(self._momentum)) for place in self._places}
        sampler = self.setting.sampler
        learned = sampler is not None and any(
            key in self.setting.state[place.parameter] for place in self._places for key in sampler.carried
        )
        if self.dirty or self._momentum is not None or learned:
            assert self._right is not None
            # V of the interval that they belong to: at the end of one the next has not been drawn yet
            state["right"] = {place.name: _saved(place.right(self._right)) for place in self._places if place.rank}
            state["window"] = None if self._window is None else list(self._window)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; the weights of a started interval are put back.

        Raises:
            ValueError: If the state is of other parameters.
        """
        self._places = []
        self._clear()
        self._lay_out()
        assert self._pending is not None
        assert self._right is not None
        self._applied = int(state.get("applied", 0))
        if "pending" in state:
            self._fill(self._pending, state["pending"])
            self._scales = [float(scale) for scale in state["scales"]]
            with torch.no_grad():
                for place in self._places:
                    place.parameter.copy_(state["unfolded"][place.name])
            self.dirty = True
        if "momentum" in state:
            self._momentum = torch.zeros_like(self._pending)
            self._fill(self._momentum, state["momentum"])
        if "right" in state:
            for place in self._places:
                if place.rank:
                    place.right(self._right).copy_(state["right"][place.name])
            self._window = None if state["window"] is None else (int(state["window"][0]), int(state["window"][1]))

    def _fill(self, flat: Tensor, parts: Mapping[str, Tensor]) -> None:
        names = {place.name for place in self._places}
        if names != set(parts):
            odd = sorted(names ^ set(parts))
            raise ValueError(f"the checkpoint's update is of other parameters: {', '.join(odd[:3])}")
        for place in self._places:
            place.left(flat).copy_(parts[place.name])


class _Draw:
    """A :class:`~zo_lightning.optim.sampling.Draw` of one parameter's left factor."""

    def __init__(self, path: LowRankPath, place: Place, unit: float) -> None:
        self._path, self._place, self._unit = path, place, unit

    def __call__(self, query: int) -> Tensor:
        return self._path.drawn(self._place, self._unit, query)

    def moves(self, query: int) -> bool:
        return True


def _carry(momentum: Tensor, old: Tensor, new: Tensor) -> None:
    """Replace M by the M' for which ``M'ᵀ V'ᵀ`` is nearest to ``Mᵀ Vᵀ`` (LOZO's rule, for any V'): shapes (r, m), (n, r)."""
    overlap = torch.linalg.solve(new.T @ new, new.T @ old)
    momentum.copy_(overlap @ momentum.to(overlap.dtype))


def _saved(tensor: Tensor) -> Tensor:
    """A copy in the host's memory."""
    return tensor.to(_CPU, copy=True)


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"


def _interval(directions: Directions) -> int:
    assert isinstance(directions, LowRank)
    return directions.interval
