"""Commands of ``zo-lightning`` that need no Trainer."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["COMMANDS", "command"]

COMMANDS = {
    "export": "write the model of a checkpoint as a Hugging Face folder",
    "replay": "rebuild fine-tuned weights from the base model and a ledger",
    "convert-finetuner": "write published networks of ZO Fine-tuner as a safetensors file",
}
"""Their names, each that of its module and function here but for the hyphens, and what they do."""


def command(name: str) -> Callable[..., Any]:
    """The function behind a command; its arguments are the command's options."""
    own = name.replace("-", "_")
    function: Callable[..., Any] = getattr(import_module(f"zo_lightning.commands.{own}"), own)
    return function
