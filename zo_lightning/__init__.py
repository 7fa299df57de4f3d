"""Fine-tune language models with forward passes only: zeroth-order optimization for PyTorch Lightning.

The public names are loaded when they are first used, so that ``import zo_lightning.optim`` needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("zo-lightning")

_HOMES = {
    "AdaNAGED": "zo_lightning.callbacks",
    "CausalLMClassificationModule": "zo_lightning.modules",
    "CausalLMMultipleChoiceModule": "zo_lightning.modules",
    "CausalLMGenerationModule": "zo_lightning.modules",
    "ParameterFree": "zo_lightning.optim",
    "PromptDataModule": "zo_lightning.data",
    "ZOModule": "zo_lightning.modules",
    "ZerothOrder": "zo_lightning.optim",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
