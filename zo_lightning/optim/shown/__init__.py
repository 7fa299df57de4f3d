"""Stand-ins for weights: what a forward pass sees of them."""

from zo_lightning.optim.shown.base import METADATA, NotStackableError, Shown
from zo_lightning.optim.shown.dense import Drawn, ShownDense, displaced
from zo_lightning.optim.shown.matrices import ShownMatrix
from zo_lightning.optim.shown.vectors import ShownVector

__all__ = ["METADATA", "Drawn", "NotStackableError", "Shown", "ShownDense", "ShownMatrix", "ShownVector", "displaced"]
