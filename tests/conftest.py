"""Set up before anything is imported: no network, one thread, caches of our own. Shared fixtures: tiny models, tiny data."""

import atexit
import os
import shutil
import signal
import tempfile

# of the processes that tests start too: nothing is read from the user's caches or written there
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="zo-lightning-tests-")
os.environ["HF_DATASETS_CACHE"] = f"{os.environ['HF_HOME']}/datasets"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.rows import save_rows
from tests.tiny import film_folder, save_tiny_model, tiny_config
from zo_lightning.data import get_task

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED} with real models and data")
    return SHARED


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory) -> Path:
    """A folder in the hub's layout with a random OPT of 20 thousand parameters and a word tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-opt"), tiny_config("opt"))


@pytest.fixture(scope="session")
def films(tmp_path_factory) -> Path:
    """A data folder for SST-2: 64 training and 12 validation rows."""
    return film_folder(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="session")
def rows_of(tmp_path_factory) -> Callable[[str], Path]:
    """What gives the data folder of a task by its name, written once."""

    @cache
    def folder(task: str) -> Path:
        return save_rows(get_task(task), tmp_path_factory.mktemp(task) / "data")

    return folder


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    """LightningCLI warns where pytest's own arguments look like its own."""
    monkeypatch.setattr("sys.argv", ["zo-lightning"])


@pytest.fixture(autouse=True)
def ctrl_c():
    """Python's own handling of Ctrl-C, which a shell's background jobs do not have."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
