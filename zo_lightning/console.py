"""What the command line shows: one line for a user's mistake, and no advice that is of no use here."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import torch
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zo_lightning.optim import CalibrationError, NonFiniteLossError

__all__ = ["one_line_errors", "quiet"]

_USERS = (MisconfigurationException, CalibrationError, NonFiniteLossError, OSError, ModuleNotFoundError, torch.OutOfMemoryError)
# a ValueError raised by these is about an argument; one from deeper inside (torch, numpy) is a bug and shows its traceback
_CHECKING = ("zo_lightning", "lightning", "jsonargparse")

_WARNINGS = (
    r".*does not have many workers",  # the rows are tokenised once: workers would only wait
    r".*`max_epochs` was not set\.",  # AdaNAGED says so as an error
    r"Checkpoint directory .* exists and is not empty",  # the best checkpoint of a version's own folder
    r"Using ModelCheckpoint with manual optimization",  # the weights after the update are the ones to keep
    r"The dirpath has changed from",  # each run has its own folder
    r"`is_gradient_checkpointing` is deprecated",  # peft's use of transformers
    r"`past_key_values` is deprecated",  # likewise
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6's use of torch's pytree
)
_LINES = ("litlogger", "litmodels", "TPU available")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn mistakes of the user into ``zo-lightning: error: ...`` on stderr and exit code 2.

    Everything else keeps its traceback, and so do mistakes where the environment variable ``ZO_LIGHTNING_DEBUG`` is set.
    """
    try:
        yield
    except Exception as error:
        cause = _cause(error)
        if os.environ.get("ZO_LIGHTNING_DEBUG") or not _is_users(cause):
            raise
        print(f"zo-lightning: error: {' '.join(str(cause).split())}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Within this context Lightning's advertisements and the loading bars of transformers and datasets are left out."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    libraries = [library.utils.logging for library in (transformers, datasets)]
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    logger.addFilter(_is_worth_reading)
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.removeFilter(_is_worth_reading)
        for library in shown:
            library.enable_progress_bar()


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not any(word in record.getMessage() for word in _LINES)


def _cause(error: BaseException) -> BaseException:
    """What a constructor raised, which jsonargparse wraps in a text about all the types that an argument may have."""
    while _raised_in(error) == "jsonargparse" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_users(error: BaseException) -> bool:
    return isinstance(error, _USERS) or (isinstance(error, ValueError) and _raised_in(error) in _CHECKING)


def _raised_in(error: BaseException) -> str:
    """The top-level package of the code that raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").partition(".")[0] if frames else ""
