"""Lightning loggers: metrics in a file that goes on where a resumed run goes on."""

from zo_lightning.loggers.csv import ResumableCSVLogger

__all__ = ["ResumableCSVLogger"]
