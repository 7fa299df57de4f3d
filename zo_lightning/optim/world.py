"""Let every evaluation of one step see the same world: random numbers (dropout) and buffers (running statistics)."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["BufferChanges", "World", "each_once", "generators_of", "submodules"]


class World:
    """A snapshot of the global random state (torch's, Python's and numpy's) and of a module's buffers.

    Args:
        module: Whose buffers to keep, and the generators among its own attributes; None keeps the random state alone.
        devices: Devices whose global generator to keep, besides the CPU's.
        generators: Other generators to keep; see :func:`generators_of`.
    """

    def __init__(self, module: nn.Module | None, devices: Iterable[torch.device], generators: Iterable[Any] = ()) -> None:
        self._cpu = torch.get_rng_state()
        self._python, self._numpy = random.getstate(), _numpy_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in set(devices) if device.type == "cuda"}
        own = [*generators, *(() if module is None else _among(module))]
        self._own = [(generator, _get(generator)) for generator in {id(x): x for x in own}.values()]
        self._buffers: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = []
        if module is not None:
            self._buffers = [
                (owner._buffers, name, buffer, each_once(buffer.detach()).clone())
                for owner in submodules(module)
                for name, buffer in owner._buffers.items()
                if buffer is not None
            ]

    def rewind(self) -> None:
        """Put back the random state and the buffers."""
        torch.set_rng_state(self._cpu)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy.random"].set_state(self._numpy)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        for generator, state in self._own:
            _set(generator, state)
        self.restore_buffers()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within this context random numbers may be drawn: afterwards the random state is what it was before."""
        now = World(None, self._cuda)
        now._own = [(generator, _get(generator)) for generator, _ in self._own]
        try:
            yield
        finally:
            now.rewind()

    def moved(self) -> bool:
        """Whether random numbers have been drawn since the snapshot, or since it was put back."""
        now = {device: torch.cuda.get_rng_state(device) for device in self._cuda}
        same = torch.equal(torch.get_rng_state(), self._cpu) and random.getstate() == self._python
        same = same and _plain(_numpy_state()) == _plain(self._numpy)
        same = same and all(_same(_get(generator), state) for generator, state in self._own)
        return not (same and all(torch.equal(now[device], state) for device, state in self._cuda.items()))

    def restore_buffers(self) -> None:
        """Put back the buffers alone, so that the random state goes on as after one evaluation."""
        for owned, name, buffer, copy in self._buffers:
            each_once(buffer).copy_(copy)
            owned[name] = buffer  # a forward may have put another tensor in its place


class BufferChanges:
    """What one evaluation does to a module's buffers (running statistics), to be done for good once all are over.

    Args:
        module: The module, before the evaluation.
    """

    def __init__(self, module: nn.Module) -> None:
        self._before = [
            (owner, [(name, buffer, _version(buffer)) for name, buffer in owner._buffers.items()])
            for owner in submodules(module)
            if owner._buffers
        ]
        self._changes: list[tuple[dict[str, Tensor | None], str, Tensor | None, Tensor | None]] = []

    def take(self) -> None:
        """The evaluation is over, and its changes are still there."""
        for owner, before in self._before:
            owned = owner._buffers
            # torch's normalisation writes its statistics without telling autograd
            if isinstance(owner, _NormBase) or any(owned.get(n) is not b or _version(b) != v for n, b, v in before):
                self._changes += [(owned, n, b, None if b is None else each_once(b.detach()).clone()) for n, b in owned.items()]

    def make(self, loss: Tensor) -> None:
        """Make them, after all evaluations have been undone; not if ``loss`` tells that they may be infinite."""
        if not self._changes or not bool(loss.isfinite().all()):
            return
        for owned, name, buffer, value in self._changes:
            if buffer is not None and value is not None:
                each_once(buffer.detach()).copy_(value)
            owned[name] = buffer


def submodules(module: nn.Module) -> list[nn.Module]:
    """What ``module.modules()`` gives, several times as fast, for what is done at every step."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [module]
    while waiting:
        owner = waiting.pop()
        if owner is not None and owner not in found:
            found[owner] = None
            if owner._modules:
                waiting += [*owner._modules.values()][::-1]
    return list(found)


def _version(buffer: Tensor | None) -> int:
    return 0 if buffer is None or buffer.is_inference() else buffer._version


def each_once(buffer: Tensor) -> Tensor:
    """A view with every element of the memory once: an expanded tensor cannot be written."""
    if buffer.layout is not torch.strided or buffer.is_nested:
        return buffer
    for dim, stride in enumerate(buffer.stride()):
        if stride == 0 and buffer.shape[dim] > 1:
            buffer = buffer.narrow(dim, 0, 1)
    return buffer


def _numpy_state() -> Any:
    """Of numpy's global generator; None where nobody has imported it."""
    module = sys.modules.get("numpy.random")
    return None if module is None else module.get_state()


def _plain(state: Any) -> Any:
    return None if state is None else [part if isinstance(part, (str, int, float)) else part.tobytes() for part in state]


def generators_of(module: nn.Module) -> list[Any]:
    """The generators that a module and its submodules have as attributes (``torch.randn(..., generator=self.generator)``)."""
    return [generator for owner in module.modules() for generator in _among(owner)]


def _among(owner: nn.Module) -> list[Any]:
    kinds: tuple[Any, ...] = (torch.Generator, random.Random)
    if "numpy.random" in sys.modules:
        numpy = sys.modules["numpy.random"]
        kinds += (numpy.Generator, numpy.RandomState)
    return [value for value in vars(owner).values() if isinstance(value, kinds)]


def _get(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else str(one) == str(other)
