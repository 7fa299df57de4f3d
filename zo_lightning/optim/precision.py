"""Keep the optimizer's own arithmetic out of autocast."""

from __future__ import annotations

from contextlib import ContextDecorator
from types import TracebackType

import torch

__all__ = ["no_autocast"]

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")


class no_autocast(ContextDecorator):  # noqa: N801 (used as a function is)
    """Turn autocast off wherever it is on; serves as a decorator too.

    A step runs inside the caller's autocast region (Lightning's ``training_step`` does), and so do the hooks of a forward pass:
    products such as U Vᵀ would be rounded to half precision. A class, since it is entered for every tensor of every forward.
    """

    def __enter__(self) -> None:
        """Turn it off."""
        kinds = [kind for kind in _DEVICE_TYPES if torch.is_autocast_enabled(kind)]
        self._regions = [torch.autocast(kind, enabled=False) for kind in kinds]
        for region in self._regions:
            region.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """As it was."""
        for region in reversed(self._regions):
            region.__exit__(kind, error, trace)

    def _recreate_cm(self) -> no_autocast:
        """One of its own for each call of what it decorates: calls may be nested."""
        return no_autocast()
