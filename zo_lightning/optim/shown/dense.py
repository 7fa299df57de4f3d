"""Weights ``W + τ u`` with a dense direction u, which is drawn where it is used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_lightning.optim.precision import no_autocast
from zo_lightning.optim.shown.base import Shown, divided
from zo_lightning.optim.shown.vectors import ShownVector

__all__ = ["Drawn", "ShownDense", "displaced"]


class Drawn(ABC):
    """A dense direction of one parameter, which is drawn when it is asked for.

    Attributes:
        in_registers: Whether :meth:`displaced` draws it without ever writing it, so that drawing it again costs no traffic.
    """

    in_registers: bool = False

    @abstractmethod
    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """First row, last row + 1, and these rows of the direction of a parameter seen as a matrix, float32."""

    def looked_up(self, ids: Tensor) -> Tensor | None:
        """The rows ``ids`` of the direction, float32, where they cost less than drawing all of them; else None."""
        return None

    def displaced(self, weight: Tensor, tau: float) -> Tensor:
        """``weight + τ u`` as a new tensor."""
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        source, target = _rows(weight), _rows(out)
        for first, last, u in self.pieces():
            target[first:last] = displaced(source[first:last], u, tau, spare=True)
        return out


class ShownDense(Shown):
    """A weight ``W + τ u`` with a dense u.

    Attributes:
        draws: For each part its direction and τ. Parts with the same direction share one draw of it.
    """

    draws: list[tuple[Drawn, float]]

    @no_autocast()
    def value(self, part: int = 0) -> Tensor:
        """See :meth:`Shown.value`."""
        drawn, tau = self.draws[part]
        return drawn.displaced(self.plain.detach(), tau)

    def _shared(self) -> list[tuple[Drawn, list[tuple[int, float]]]]:
        """Each direction with the parts that go along it, and their τ."""
        groups: list[tuple[Drawn, list[tuple[int, float]]]] = []
        for part, (drawn, tau) in enumerate(self.draws):
            if not groups or groups[-1][0] is not drawn:
                groups.append((drawn, []))
            groups[-1][1].append((part, tau))
        return groups

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear``, piece by piece of the weight, so that no more than a piece of the displaced weight exists."""
        flat = x.reshape(self.parts, -1, x.shape[-1])
        plain = self.plain.detach()
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if flat.dtype != dtype:
            flat = flat.to(dtype)
        out = torch.empty(*flat.shape[:-1], plain.shape[0], dtype=dtype, device=x.device)
        biases = [_bias_of(bias, part, dtype) for part in range(self.parts)]
        with no_autocast():
            for drawn, parts in self._shared():
                if drawn.in_registers:
                    for part, tau in parts:
                        out[part] = F.linear(flat[part], drawn.displaced(plain, tau).to(dtype), biases[part])
                    continue
                for first, last, u in drawn.pieces():
                    for number, (part, tau) in enumerate(parts):
                        spare = number == len(parts) - 1
                        weight = displaced(plain[first:last], u, tau, spare=spare).to(dtype)
                        b = biases[part]
                        if b is None:
                            torch.mm(flat[part], weight.T, out=out[part, :, first:last])
                        else:
                            torch.addmm(b[first:last], flat[part], weight.T, out=out[part, :, first:last])
        return out.view(*x.shape[:-1], -1)

    @no_autocast()
    def embedding(self, ids: Tensor) -> Tensor:
        """Only the rows that are looked up are displaced."""
        out = F.embedding(ids, self.plain.detach())
        places = divided(ids, self.parts, self.label) if self.parts > 1 else ids.unsqueeze(0)
        moved = out.view(*places.shape, -1)
        for drawn, parts in self._shared():
            looked_up = drawn.looked_up(torch.stack([places[part] for part, _ in parts]))
            if looked_up is not None:
                for (part, tau), rows in zip(parts, looked_up, strict=True):
                    moved[part] = displaced(moved[part], rows, tau, spare=True)
                continue
            for first, last, u in drawn.pieces():
                for part, tau in parts:
                    hit = (places[part] >= first) & (places[part] < last)
                    rows = F.embedding((places[part] - first).clamp(0, last - first - 1), u)
                    moved[part] = torch.where(hit.unsqueeze(-1), displaced(moved[part], rows, tau), moved[part])
        return out


def _bias_of(bias: Tensor | None, part: int, dtype: torch.dtype) -> Tensor | None:
    if isinstance(bias, ShownVector):
        return bias.entries[part].to(dtype)
    if isinstance(bias, Shown):
        bias = bias.value(part)
    return None if bias is None else bias.detach().to(dtype)


def _rows(weight: Tensor) -> Tensor:
    """A tensor seen as a matrix."""
    return weight.reshape(weight.shape[0], -1) if weight.dim() > 1 else weight.reshape(-1, 1)


def displaced(weight: Tensor, u: Tensor, tau: float, *, spare: bool = False) -> Tensor:
    """``weight + τ u`` as a new tensor of the weight's dtype; the sum is taken in u's dtype, float32 or wider.

    Args:
        weight: The weight.
        u: The direction, of the weight's shape.
        tau: τ.
        spare: u is not needed any more, and its memory serves for the result.
    """
    if weight.dtype == u.dtype:
        return torch.add(weight, u, alpha=tau, out=u) if spare else torch.add(weight, u, alpha=tau)
    return (weight + tau * u).to(weight.dtype)
