"""The factors of all parameters in a few flat tensors, so that what is done to all of them is one operation."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zo_lightning.optim.directions import Address, Factors, LowRank, matrix_shape
from zo_lightning.optim.geometry import Geometry
from zo_lightning.optim.path import Setting, geometry_of, sum_of_squares

__all__ = ["Ahead", "Place", "device_of", "flat_direction", "places_of"]


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
    """

    name: str
    parameter: nn.Parameter
    group: int
    rank: int
    rows: int
    columns: int
    start: int
    right_start: int

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
    right: Tensor | None = None,
) -> Tensor:
    """U of all parameters in one float32 tensor on the CPU, after the geometry; a pure function of its arguments."""
    (seed, step), cpu = seed_and_step, torch.device("cpu")
    drawn = [setting.directions.draw(Address(seed, step, p.name, query), p.parameter.shape, cpu) for p in places]
    members: dict[int, list[Tensor | Factors]] = {}
    for place, z in zip(places, drawn, strict=True):
        members.setdefault(place.group, []).append(z)
    scales = {g: sum_of_squares(zs).rsqrt() for g, zs in members.items() if setting.needs_scale(geometries[g])}
    flat = torch.empty(places[-1].stop, dtype=torch.float32 if right is None else right.dtype)
    for place, unit, z in zip(places, units, drawn, strict=True):
        u = setting.update.probe(z, geometries[place.group], scales.get(place.group))
        part = place.left(flat)
        if isinstance(u, Factors):
            torch.mul(u.left.T, unit, out=part) if unit != 1 else part.copy_(u.left.T)
            if right is not None:
                place.right(right).copy_(u.right)
        else:
            torch.mul(u, unit, out=part) if unit != 1 else part.copy_(u)
    return flat


_Key = tuple[int, int, list[Geometry], list[float]]


class Ahead:
    """Draws the next step's directions in a thread while the device computes the present one's losses.

    Args:
        pin: Whether they are put into pinned memory, from which they go to a GPU without waiting.
    """

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="directions")
        self._key: _Key | None = None
        self._future: Future[list[Tensor]] | None = None

    def start(self, places: Sequence[Place], setting: Setting) -> None:
        """Begin with the directions of the step after the coming one, unless they are under way."""
        step, count = setting.head["step"] + 1, setting.head["num_directions"]
        key = self._key_of(setting, step)
        if self._key == key:
            return
        seed, _, geometries, units = key

        def draw() -> list[Tensor]:
            flats = [flat_direction(places, geometries, units, setting, (seed, step), query) for query in range(count)]
            return [flat.pin_memory() for flat in flats] if self._pin else flats

        self._key, self._future = key, self._worker.submit(draw)

    def take(self, setting: Setting) -> list[Tensor]:
        """The directions of the coming step, if they have been drawn; else none."""
        if self._future is None or self._key != self._key_of(setting, setting.head["step"]):
            return []
        flats = self._future.result()
        self._key = self._future = None
        return flats

    @staticmethod
    def _key_of(setting: Setting, step: int) -> _Key:
        """All that the directions of a step are a function of and that others may change."""
        geometries = [geometry_of(group) for group in setting.groups]
        return setting.head["seed"], step, geometries, [unit for *_, unit in setting.members()]
