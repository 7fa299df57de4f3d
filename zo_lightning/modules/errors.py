"""The errors that an unusable model or checkpoint raises."""

from __future__ import annotations

__all__ = ["CheckpointError", "ModelError"]


class ModelError(ValueError):
    """A model that cannot be loaded or trained as it is; the message is one line for the person at the command line."""


class CheckpointError(ModelError, RuntimeError):
    """Weights that are not those of the module; a ``RuntimeError`` too, as torch's own ``load_state_dict`` raises it."""
