"""Two processes that run scenarios and write what came of each to files; importing Lightning takes long, so they share a pair.

``python -m tests.strategies.worker FOLDER SCENARIO...`` with the environment variables of one process.
"""

import gc
import os
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(port: int, **more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settled = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}  # such as a global seed
    return {**inherited, **settled, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}


class Pair:
    """Two processes under one deadline."""

    def __init__(self, folder: Path, *scenarios: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, port = folder, free_port()
        self.processes = []
        for rank in range(2):
            mine = environment(port, NODE_RANK="0", LOCAL_RANK=str(rank), WORLD_SIZE="2")
            command = [sys.executable, "-m", "tests.strategies.worker", str(folder), *scenarios]
            with (folder / f"log.{rank}").open("w") as log:
                self.processes.append(subprocess.Popen(command, env=mine, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes; None for a process that had to be killed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
            time.sleep(0.1)
        codes = [process.poll() for process in self.processes]
        for process in self.processes:
            process.kill()
            process.wait()
        return codes

    def log(self, rank: int) -> str:
        return (self.folder / f"log.{rank}").read_text()

    def result(self, scenario: str) -> list[dict]:
        """What each of the two wrote."""
        results = []
        for rank in range(2):
            path = self.folder / f"{scenario}.{rank}.pt"
            if not path.is_file():
                raise AssertionError(f"{scenario} did not end on rank {rank}:\n{self.log(rank)[-3000:]}")
            result = torch.load(path, weights_only=False)
            if "error" in result:
                raise AssertionError(f"{scenario} on rank {rank}:\n{result['error']}")
            results.append(result)
        return results


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    from tests.strategies import scenarios

    warnings.simplefilter("ignore")
    for name in sys.argv[2:]:
        torch.manual_seed(100 + rank)  # nothing may depend on what each process happens to draw
        begin = time.perf_counter()
        try:
            result = getattr(scenarios, name)(rank, folder)
        except Exception:
            if name.startswith("dies"):
                raise
            result = {"error": traceback.format_exc()}
        torch.save({**result, "seconds": time.perf_counter() - begin}, folder / f"{name}.{rank}.pt")
        gc.collect()


if __name__ == "__main__":
    main()
