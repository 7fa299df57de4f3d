"""Commands of ``zo-lightning`` that need no Trainer."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["COMMANDS", "command"]

COMMANDS = {
    "export": "write the model of a checkpoint as a Hugging Face folder",
    "replay": "rebuild fine-tuned weights from the base model and a ledger",
}
"""Their names, each that of its module and function here, and what they do."""


def command(name: str) -> Callable[..., Any]:
    """The function behind a command; its arguments are the command's options."""
    function: Callable[..., Any] = getattr(import_module(f"zo_lightning.commands.{name}"), name)
    return function
