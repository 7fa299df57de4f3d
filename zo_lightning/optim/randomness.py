"""Random numbers that are a pure function of what they are for.

Every draw of this package comes from an explicit ``torch.Generator`` whose seed is a hash of the draw's purpose. The global
generator, the order of calls, the default dtype and the number of processes play no part, so a direction can be drawn
again at any time from a few integers and a name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

__all__ = ["generator", "in_parallel", "purpose", "seed_of", "stable_seed"]

_SEPARATOR = "\x1f"


def stable_seed(*parts: int | str) -> int:
    """Hash ``parts`` to a seed that is the same on every machine, process and Python version.

    Args:
        *parts: Integers and strings; ``1`` and ``"1"`` hash differently, and so do ``("ab", "c")`` and ``("a", "bc")``.

    Returns:
        An integer in ``[0, 2**63)``.
    """
    return seed_of(purpose(*parts))


def purpose(*parts: int | str, more: bool = False) -> bytes:
    """What :func:`stable_seed` hashes; ``more`` follows where many seeds differ in their last parts only."""
    text = _SEPARATOR.join(f"{type(part).__name__}:{part}" for part in parts)
    return (text + _SEPARATOR if more else text).encode()


def seed_of(purpose: bytes) -> int:
    """Hash a :func:`purpose`, or one ``more`` of which follows."""
    return int.from_bytes(hashlib.blake2b(purpose, digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator on ``device`` seeded with :func:`stable_seed` of ``parts``."""
    return torch.Generator(device=device).manual_seed(stable_seed(*parts))


def in_parallel(action: Callable[[int], None], numbers: Sequence[int], device: torch.device) -> None:
    """Call ``action`` for each number, on a CPU in as many threads as torch computes with: it draws numbers in one alone."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or len(numbers) < 2 or threads < 2:
        for number in numbers:
            action(number)
        return
    for _ in _pool(threads).map(action, numbers):
        pass


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="draw")
