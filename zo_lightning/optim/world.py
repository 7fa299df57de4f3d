"""Let every evaluation of one step see the same world: random numbers (dropout) and buffers (running statistics)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["World"]


class World:
    """A snapshot of the global random state and of a module's buffers.

    Args:
        module: Whose buffers to keep; None keeps the random state alone.
        devices: Devices whose global generator to keep, besides the CPU's.
    """

    def __init__(self, module: nn.Module | None, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in set(devices) if device.type == "cuda"}
        self._buffers: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = []
        if module is not None:
            self._buffers = [
                (owner._buffers, name, buffer, _once(buffer.detach()).clone())
                for owner in module.modules()
                for name, buffer in owner._buffers.items()
                if buffer is not None
            ]

    def rewind(self) -> None:
        """Put back the random state and the buffers."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        self.restore_buffers()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within this context random numbers may be drawn: afterwards the random state is what it was before."""
        now = World(None, self._cuda)
        try:
            yield
        finally:
            now.rewind()

    def moved(self) -> bool:
        """Whether random numbers have been drawn since the snapshot, or since it was put back."""
        now = {device: torch.cuda.get_rng_state(device) for device in self._cuda}
        same = torch.equal(torch.get_rng_state(), self._cpu)
        return not (same and all(torch.equal(now[device], state) for device, state in self._cuda.items()))

    def restore_buffers(self) -> None:
        """Put back the buffers alone, so that the random state goes on as after one evaluation."""
        for owned, name, buffer, copy in self._buffers:
            _once(buffer).copy_(copy)
            owned[name] = buffer  # a forward may have put another tensor in its place


def _once(buffer: Tensor) -> Tensor:
    """A view with every element of the memory once: an expanded tensor cannot be written."""
    if buffer.layout is not torch.strided:
        return buffer
    for dim, stride in enumerate(buffer.stride()):
        if stride == 0 and buffer.shape[dim] > 1:
            buffer = buffer.narrow(dim, 0, 1)
    return buffer
