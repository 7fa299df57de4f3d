"""Keep the optimizer's own arithmetic out of autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["no_autocast"]

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")


@contextmanager
def no_autocast() -> Iterator[None]:
    """Turn autocast off wherever it is on; serves as a decorator too.

    A step runs inside the caller's autocast region (Lightning's ``training_step`` does), and so do the hooks of a forward pass:
    products such as U Vᵀ would be rounded to half precision.
    """
    with ExitStack() as stack:
        for device_type in _DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
