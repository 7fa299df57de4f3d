"""The factors of all parameters in a few flat tensors, so that what is done to all of them is one operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from zo_lightning.optim.directions import Address, Factors, LowRank, matrix_shape
from zo_lightning.optim.geometry import Euclidean, Geometry, Sign, Spectral
from zo_lightning.optim.path import Setting, sum_of_squares
from zo_lightning.optim.randomness import in_parallel, purpose, seed_of
from zo_lightning.optim.updates import LMO

__all__ = ["Place", "device_of", "flat_direction", "flat_right", "places_of"]

T = TypeVar("T")
_CPU = torch.device("cpu")
_UNDIVIDED = 1 << 15  # torch's threads share operations of so many entries
_THREADS = 4  # at most: a drawing is half a dozen milliseconds, and each thread needs the interpreter for a third of its time


@dataclass
class Place:
    """Where a parameter's factors lie.

    Attributes:
        name: The parameter's name.
        parameter: The parameter.
        group: Number of its group.
        rank: r, 0 for a vector.
        rows: m, the elements of a vector.
        columns: n, 0 for a vector.
        start: Of its r · m (or m) entries in the flat left factors, which lie as U transposed.
        right_start: Of its n · r entries in the flat right factors.
        purpose: What its left factor (or vector) is drawn for, besides seed, step and query.
    """

    name: str
    parameter: nn.Parameter
    group: int
    rank: int
    rows: int
    columns: int
    start: int
    right_start: int
    purpose: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.purpose = purpose(self.name, "vector" if self.parameter.dim() < 2 else "left")

    @property
    def stop(self) -> int:
        """End of its entries in the flat left factors."""
        return self.start + max(self.rank, 1) * self.rows

    def left(self, flat: Tensor) -> Tensor:
        """Its part of flat left factors: shape (r, m), or the vector's."""
        return flat[self.start : self.stop].view((self.rank, self.rows) if self.rank else self.parameter.shape)

    def right(self, flat: Tensor) -> Tensor:
        """Its V, shape (n, r), of flat right factors."""
        return flat[self.right_start : self.right_start + self.columns * self.rank].view(self.columns, self.rank)


def places_of(setting: Setting) -> list[Place]:
    """Give every parameter its place, group by group.

    Raises:
        ValueError: If the parameters lie on several devices.
    """
    assert isinstance(setting.directions, LowRank)
    places: list[Place] = []
    start = right = 0
    for group, _, name, parameter, _ in setting.members():
        if parameter.dim() < 2:
            rank, rows, columns = 0, parameter.numel(), 0
        else:
            rows, columns = matrix_shape(parameter.shape)
            rank = min(setting.directions.rank, rows, columns)
        place = Place(name, parameter, group, rank, rows, columns, start, right)
        places.append(place)
        start, right = place.stop, right + columns * rank
    return places


def device_of(places: Sequence[Place]) -> torch.device:
    """The device of all parameters.

    Raises:
        ValueError: If there are several.
    """
    devices = {place.parameter.device for place in places}
    if len(devices) > 1:
        raise ValueError(f"low-rank directions need all parameters on one device, got {', '.join(map(str, devices))}")
    return devices.pop()


def flat_direction(
    places: Sequence[Place],
    geometries: Sequence[Geometry],
    units: Sequence[float],
    setting: Setting,
    seed_and_step: tuple[int, int],
    query: int,
    *,
    pin: bool = False,
) -> Tensor:
    """U of all parameters in one float32 tensor on the CPU, after the geometry; a pure function of its arguments.

    Args:
        places: Where the parameters' factors lie.
        geometries: Of each group.
        units: Each parameter's unit of length.
        setting: The directions and the update rule.
        seed_and_step: Of the run, and of the step.
        query: Which of the step's directions.
        pin: Put it into pinned memory, from which it goes to a GPU without waiting.
    """
    flat = torch.empty(places[-1].stop, dtype=torch.float32, device=_CPU, pin_memory=pin)
    if _is_simple(places, geometries, setting):
        _draw_at_once(flat, places, geometries, units, purpose(*seed_and_step, query, more=True))
        return flat
    us = _one_by_one(places, geometries, setting, seed_and_step, query)
    for place, unit, u in zip(places, units, us, strict=True):
        left = u.left.T if isinstance(u, Factors) else u
        torch.mul(left, unit, out=place.left(flat)) if unit != 1 else place.left(flat).copy_(left)
    return flat


def flat_right(
    places: Sequence[Place],
    geometries: Sequence[Geometry],
    setting: Setting,
    seed_and_step: tuple[int, int],
    right: Tensor,
) -> None:
    """V of all matrices, on the CPU, after the geometry, into ``right``."""
    if not _is_simple(places, geometries, setting):
        for place, u in zip(places, _one_by_one(places, geometries, setting, seed_and_step, 0), strict=True):
            if isinstance(u, Factors):
                place.right(right).copy_(u.right)
        return
    assert isinstance(setting.directions, LowRank)
    for place in places:
        if place.rank:
            v = setting.directions.right(Address(*seed_and_step, place.name), place.columns, place.rank)
            place.right(right).copy_(v.sign() if isinstance(geometries[place.group], Sign) else v)


def _one_by_one(
    places: Sequence[Place], geometries: Sequence[Geometry], setting: Setting, seed_and_step: tuple[int, int], query: int
) -> list[Tensor | Factors]:
    """Each parameter's direction, after the geometry."""
    drawn = [setting.directions.draw(Address(*seed_and_step, p.name, query), p.parameter.shape, _CPU) for p in places]
    members: dict[int, list[Tensor | Factors]] = {}
    for place, z in zip(places, drawn, strict=True):
        members.setdefault(place.group, []).append(z)
    scales = {g: sum_of_squares(zs).rsqrt() for g, zs in members.items() if setting.needs_scale(geometries[g])}
    return [
        setting.update.probe(z, geometries[place.group], scales.get(place.group))
        for place, z in zip(places, drawn, strict=True)
    ]


def _is_simple(places: Sequence[Place], geometries: Sequence[Geometry], setting: Setting) -> bool:
    """Whether :func:`_draw_at_once` gives what :func:`_one_by_one` does."""
    return (
        isinstance(setting.directions, LowRank)
        and getattr(setting.directions.draw, "__func__", None) is LowRank.draw
        and setting.directions.rank == 1
        and type(setting.update) is LMO
        and all(type(geometry) in (Euclidean, Sign, Spectral) for geometry in geometries)
    )


def _draw_at_once(
    flat: Tensor, places: Sequence[Place], geometries: Sequence[Geometry], units: Sequence[float], address: bytes
) -> None:
    """The directions of rank 1 of all parameters, bit for bit as each for itself, in few operations."""
    parts = flat.split([place.stop - place.start for place in places])
    largest_first = sorted(range(len(places)), key=lambda number: -parts[number].numel())
    count = min(_THREADS, torch.get_num_threads(), len(places))
    chunks = [largest_first[first::count] for first in range(count)]

    def draw(chunk: int) -> None:
        source = torch.Generator(_CPU)
        members: list[list[int]] = [[] for _ in geometries]
        for number in chunks[chunk]:
            parts[number].normal_(generator=source.manual_seed(seed_of(address + places[number].purpose)))
            members[places[number].group].append(number)
        for geometry, numbers in zip(geometries, members, strict=True):
            mine = [parts[number] for number in numbers]
            if not mine or isinstance(geometry, Euclidean):
                continue
            if isinstance(geometry, Spectral):
                # a vector's polar factor; what is zero stays so
                norms = torch.stack(torch._foreach_norm(mine)).clamp_min_(torch.finfo(flat.dtype).tiny)
                torch._foreach_div_(*_pieces(mine, norms.unbind()))
                factors = [geometry.aspect(places[number].parameter.shape) for number in numbers]
            else:
                torch._foreach_sign_(_pieces(mine, mine)[0])
                factors = [1.0] * len(mine)
            _multiply(mine, [factor * geometry.radius for factor in factors])
            _multiply(mine, [units[number] for number in numbers])

    in_parallel(draw, range(count), _CPU)
    for group, geometry in enumerate(geometries):
        if isinstance(geometry, Euclidean):
            numbers = [number for number, place in enumerate(places) if place.group == group]
            mine = [parts[number] for number in numbers]
            torch._foreach_mul_(_pieces(mine, mine)[0], sum_of_squares(mine).rsqrt() * geometry.radius)
            _multiply(mine, [units[number] for number in numbers])


def _multiply(parts: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Multiply each part by its factor."""
    pieces, each = _pieces(parts, factors)
    chosen = [number for number, factor in enumerate(each) if factor != 1]
    if chosen:
        torch._foreach_mul_([pieces[number] for number in chosen], [float(each[number]) for number in chosen])


def _pieces(parts: Sequence[Tensor], values: Sequence[T]) -> tuple[list[Tensor], list[T]]:
    """The parts in pieces that torch does not divide among threads, and to each piece its part's value.

    Waking threads costs more than the work, by orders of magnitude where the machine's cores are shared.
    """
    pieces: list[Tensor] = []
    each: list[T] = []
    for part, value in zip(parts, values, strict=True):
        for piece in (part,) if part.numel() < _UNDIVIDED else part.split(_UNDIVIDED - 1):
            pieces.append(piece)
            each.append(value)
    return pieces, each
