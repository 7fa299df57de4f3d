"""Lightning callbacks: the parameter-free rule, and what a run shows of itself."""

from zo_lightning.callbacks.adanaged import AdaNAGED
from zo_lightning.callbacks.forecast import Forecast
from zo_lightning.callbacks.ledger import Ledger
from zo_lightning.callbacks.predictions import PredictionWriter
from zo_lightning.callbacks.progress import ZOProgressBar
from zo_lightning.callbacks.resume import ResumeCheckpoint
from zo_lightning.callbacks.step_metrics import StepMetrics
from zo_lightning.callbacks.summary import MetricsTable
from zo_lightning.callbacks.validation import SpacedValidation

__all__ = [
    "AdaNAGED",
    "Forecast",
    "Ledger",
    "MetricsTable",
    "PredictionWriter",
    "ResumeCheckpoint",
    "SpacedValidation",
    "StepMetrics",
    "ZOProgressBar",
]
