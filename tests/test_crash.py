"""Runs of the command line, killed at random moments and started again until they are done, against one that is left alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.callbacks.test_resume import differences

STEPS = 300
CONFIG = Path(__file__).parents[1] / "configs" / "opt-125m" / "sst2.yaml"
KILLS = int(os.environ.get("ZO_CRASH_KILLS", "3"))
SEED = int(os.environ.get("ZO_CRASH_SEED", random.SystemRandom().randrange(10**6)))
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # the first twice as often


def run(options: list[str], cache: str, log: str) -> None:
    """The command line in a process of its own; what it prints goes to a file."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have none
    import datasets

    from zo_lightning.cli import main

    torch.set_num_threads(1)
    sys.argv = ["zo-lightning"]
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    main(["fit", *options])


@pytest.fixture(scope="module")
def start(tiny_opt, films, tmp_path_factory):
    """Starts a run under a root folder: a fork of a server that has imported everything, which takes ten seconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this platform does not fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zo_lightning.cli", "transformers.models.opt.modeling_opt", "rich.live"])
    server = context.Process(target=int)  # the first one waits for the server
    server.start()
    server.join()
    cache = tmp_path_factory.mktemp("datasets")

    def begin(root: Path) -> multiprocessing.Process:
        options = [
            *("--config", str(CONFIG), "--model.model_name_or_path", str(tiny_opt), "--data.data_dir", str(films)),
            *("--data.num_train", "32", "--data.num_dev", "8", "--data.batch_size", "4"),
            *("--trainer.max_steps", str(STEPS), "--trainer.accelerator", "cpu", "--trainer.precision", "32"),
            *("--trainer.log_every_n_steps", "7", "--trainer.default_root_dir", str(root), "--validation.times", "9"),
            *("--resume.every_n_steps", "20", "--ckpt_path", "last"),
        ]
        process = context.Process(target=run, args=(options, str(cache), str(root.with_suffix(".log"))))
        process.start()
        return process

    return begin


def the(root: Path, pattern: str) -> Path:
    (path,) = root.glob(f"lightning_logs/*/{pattern}")
    return path


def test_killed_again_and_again(start, tmp_path):
    print(f"ZO_CRASH_SEED={SEED}")  # noqa: T201
    dice = random.Random(SEED)
    whole = tmp_path / "whole"
    began = time.monotonic()
    process = start(whole)
    while not list(whole.glob("lightning_logs/*/metrics.csv")) and process.is_alive():
        time.sleep(0.01)
    trains = time.monotonic()
    process.join()
    assert process.exitcode == 0, whole.with_suffix(".log").read_text()
    set_up, training = trains - began, time.monotonic() - trains

    killed = dict.fromkeys(SIGNALS, 0)
    jobs = [tmp_path / "cut"]
    while sum(killed.values()) < KILLS:
        process = start(jobs[-1])
        number, in_a_save = dice.choice(SIGNALS), dice.random() < 0.3
        end = time.monotonic() + dice.uniform(0.5, 1) * set_up + dice.expovariate(KILLS / training)
        while process.is_alive() and time.monotonic() < end:
            if in_a_save and list(jobs[-1].glob("lightning_logs/*/checkpoints/last.ckpt.tmp")):
                time.sleep(dice.uniform(0, 0.003))
                break
            time.sleep(0.001)
        if process.is_alive():
            os.kill(process.pid, number)
            killed[number] += 1
        process.join()
        if process.exitcode == 0:
            jobs.append(tmp_path / f"cut{len(jobs)}")
    said = {number.name: count for number, count in killed.items()}
    print(f"{said}, {len(jobs)} jobs of {set_up:.1f} + {training:.1f} s")  # noqa: T201
    process = start(jobs[-1])
    process.join()
    assert process.exitcode == 0, jobs[-1].with_suffix(".log").read_text()
    for job in jobs:
        check_same(job, whole)


def check_same(cut: Path, whole: Path) -> None:
    """Weights, optimizer and log of two roots are the same bytes; so is the best checkpoint."""
    for name in ("last", "best"):
        a, b = (torch.load(the(root, f"checkpoints/{name}.ckpt"), weights_only=True) for root in (whole, cut))
        for state in (a, b):
            for key in [key for key in state["callbacks"] if key.startswith("ModelCheckpoint")]:
                del state["callbacks"][key]  # paths
        assert differences(a, b) == []
    folder = the(cut, "checkpoints/last.ckpt").parents[1]
    assert (folder / "metrics.csv").read_bytes() == the(whole, "metrics.csv").read_bytes()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
