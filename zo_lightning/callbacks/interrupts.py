"""Ctrl-C that lets a step be finished."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["GentleInterrupt"]

_STOPPING = b"\nfinishing the step; press Ctrl-C again to stop at once\n"


class GentleInterrupt:
    """Takes SIGINT over: the first is remembered and said, the second is a ``KeyboardInterrupt`` as ever.

    Only in the main thread, and only where the handler is Python's own.

    Attributes:
        pressed: Whether there was a first.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._previous: Any = None

    def install(self) -> None:
        """Take the place of Python's handler."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous = signal.signal(signal.SIGINT, self._handle)

    def release(self) -> None:
        """Put it back, unless another has taken the place of this one."""
        if self._previous is not None and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._previous)
        self._previous = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        os.write(2, _STOPPING)  # not `print`, which may be what the signal has interrupted
