"""The one error that an unusable model raises."""

from __future__ import annotations

__all__ = ["ModelError"]


class ModelError(ValueError):
    """A model that cannot be loaded or trained as it is; the message is one line for the person at the command line."""
