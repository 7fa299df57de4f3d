"""Several processes that share nothing but the losses at the probes."""

from zo_lightning.strategies.ranks import StrategyRanks, join, ranks_of
from zo_lightning.strategies.zo_ddp import ZODDPStrategy

__all__ = ["StrategyRanks", "ZODDPStrategy", "join", "ranks_of"]
