"""What a zeroth-order step costs beside its bare forward passes, and beside the released MeZO step, in one run.

    python scripts/benchmark_step.py --preset cpu-125m --json out.json

On the same model (random weights of OPT's shape), batch and loss it times, interleaved: two bare forwards; our steps with
low-rank directions, probes one after the other (``lowrank_sequential``) and as one forward of the doubled batch
(``lowrank_doubled``), with dense Gaussian directions (``dense``: steps along their signs; ``dense_sgd``: along themselves, on
a GPU drawn in registers); and MeZO's step as released (``mezo``: every weight rewritten three times for the probes and once for
the update, each time with a materialised z, and logits at all positions). Our times include the update, under the
parameter-free rule (all but ``dense_sgd``) one forward more for the curvature in every tenth step, and with low-rank directions
the fold and the new V of every fiftieth. Timed steps follow one another as in a run. Before anything is timed, the losses at
each path's probes are compared with those of a copy of the model whose weights are displaced by hand. On a GPU the time for
which it is busy in a step is given too: the rest is the host's. The preset ``cpu-narrow`` (24 layers, 32 wide) is nearly all
host, and ``--drawing 1.3b`` times the drawing of the directions alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import OPTConfig, OPTForCausalLM

from zo_lightning.optim import Address, Factors, ParameterFree, ZerothOrder, make_geometry

SHAPES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "vocab_size": 512},
    "narrow": {"hidden_size": 32, "num_hidden_layers": 24, "num_attention_heads": 2, "ffn_dim": 64, "vocab_size": 512},
    "125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072, "vocab_size": 50272},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192, "vocab_size": 50272},
}
PRESETS: dict[str, tuple[str, str, torch.dtype, int, int]] = {  # shape, device, dtype, rows, tokens
    "cpu-tiny": ("tiny", "cpu", torch.float32, 4, 16),
    "cpu-narrow": ("narrow", "cpu", torch.float32, 2, 4),
    "cpu-125m": ("125m", "cpu", torch.float32, 16, 64),
    "cuda-125m": ("125m", "cuda", torch.bfloat16, 16, 64),
    "cuda-1.3b": ("1.3b", "cuda", torch.bfloat16, 16, 64),
}
CURVATURE_EVERY = 10
HELD = 50  # steps for which V is held
VERBALIZERS = (7, 11)


@dataclass
class Problem:
    """A model, a batch, and its losses."""

    model: nn.Module
    device: torch.device
    ids: Tensor
    labels: Tensor

    def losses(self, copies: int = 1, model: nn.Module | None = None, *, all_logits: bool = False) -> Tensor:
        """Cross-entropy of two verbalizers at the last position, per row of ``copies`` batches."""
        model = self.model if model is None else model
        ids, labels = (x.repeat(copies, *(1,) * (x.dim() - 1)) for x in (self.ids, self.labels))
        hidden = model.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state  # type: ignore[operator]
        logits = model.lm_head(hidden)[:, -1] if all_logits else model.lm_head(hidden[:, -1])  # type: ignore[operator]
        return F.cross_entropy(logits.float()[:, VERBALIZERS], labels, reduction="none")


def make_problem(preset: str) -> Problem:
    """The preset's model and batch, from a fixed seed."""
    shape, kind, dtype, rows, tokens = PRESETS[preset]
    device = torch.device(kind)
    torch.manual_seed(0)
    sizes = SHAPES[shape]
    config = OPTConfig(**sizes, word_embed_proj_dim=sizes["hidden_size"], max_position_embeddings=2048, dropout=0.0)
    with torch.device(device):
        model = OPTForCausalLM(config).to(dtype).eval()
        ids = torch.randint(4, sizes["vocab_size"], (rows, tokens))
        labels = torch.randint(0, 2, (rows,))
    return Problem(model, device, ids, labels)


# ---- the contestants ---------------------------------------------------------------------------------------------------
class Contestant:
    """Something whose step is timed.

    Attributes:
        seen: Losses of the probes of the last step.
        kinds: The kinds of steps and their shares of a long run.
        course: Index and kind of the steps of one repeat; those without a kind are not timed.
    """

    kinds: Mapping[str, float] = {"plain": 1.0}
    course: Sequence[tuple[int, str | None]] = ((0, "plain"),)

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.seen: list[Tensor] = []

    def step(self, index: int) -> None:
        """One step."""
        raise NotImplementedError

    def check(self) -> None:
        """Compare the losses at the probes with a recomputation."""


class Bare(Contestant):
    """Two forwards at the weights as they are."""

    def step(self, index: int) -> None:
        """See :class:`Contestant`."""
        for _ in range(2):
            self.problem.losses().mean()


class Ours(Contestant):
    """Our optimizer, under the parameter-free rule if the update has one."""

    def __init__(self, problem: Problem, *, directions: str, probes: str, update: str = "lmo") -> None:
        super().__init__(problem)
        settings: dict[str, Any] = {"interval": HELD, "probes": probes, "seed": 1, "directions": directions, "update": update}
        if update == "lmo":
            settings["step_rule"] = ParameterFree(100_000, interval=CURVATURE_EVERY)
        else:
            settings |= {"lr": MeZO.rate, "smoothing": MeZO.epsilon}
        self.optimizer = ZerothOrder(problem.model.named_parameters(), **settings)
        self.optimizer.attach(problem.model)
        # the first of a few steps in a row is not timed: nothing has been prepared for it
        self.course = [(108, None), (109, "plain"), (110, "plain")]
        if update == "lmo":
            curved = 1 / CURVATURE_EVERY
            self.kinds = {"plain": 1 - curved, "curvature": curved}
            self.course = [(108, None), (109, "plain"), (110, "curvature"), (111, "plain")]
        if directions == "low_rank":
            self.kinds = {"plain": 1 - curved - 1 / HELD, "curvature": curved - 1 / HELD, "fold": 1 / HELD, "turn": 1 / HELD}
            self.course += [(147, None), (148, "plain"), (149, "fold"), (150, "turn"), (151, "plain")]

    def step(self, index: int) -> None:
        """See :class:`Contestant`."""
        for group in self.optimizer.param_groups:
            group["step"] = index
        self.seen = []

        def closure() -> Tensor:
            losses = self.problem.losses()
            self.seen.append(losses)
            return losses

        def stacked(copies: int) -> Tensor:
            losses = self.problem.losses(copies)
            self.seen += list(losses.view(copies, -1))
            return losses

        self.optimizer.step(closure, stacked=stacked)

    def check(self) -> None:
        """See :class:`Contestant`."""
        self.step(101)  # calibrates
        self.optimizer.fold()
        twin = copy.deepcopy(self.problem.model)
        start = {name: p.detach().clone() for name, p in self.problem.model.named_parameters()}
        self.step(102)  # along directions that have been drawn ahead, where they are
        tau = self.optimizer.param_groups[0]["smoothing"]
        for sign, seen in zip((1, -1), self.seen[-2:], strict=True):
            for group in self.optimizer.param_groups:
                geometry = make_geometry(group["geometry"], group["radius"], group["transposed"])
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    z = self.optimizer.directions.draw(Address(group["seed"], 102, name), parameter.shape, parameter.device)
                    u = geometry.extreme_point(z) if self.optimizer.update.oracle else z
                    dense = u.dense() if isinstance(u, Factors) else u
                    with torch.no_grad():
                        moved = start[name].float() + sign * tau * dense.to(parameter.device)
                        twin.get_parameter(name).copy_(moved)
            _same(self.problem.losses(model=twin), seen, type(self).__name__)


class MeZO(Contestant):
    """The released step, written again: every perturbation is a pass over all weights with a materialised z."""

    epsilon, rate = 1e-3, 1e-7

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.parameters = [(n, p) for n, p in problem.model.named_parameters() if p.requires_grad]
        self.seeds = torch.Generator().manual_seed(3)

    def _perturb(self, seed: int, factor: float) -> None:
        torch.manual_seed(seed)
        for _, p in self.parameters:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            p.data = p.data + factor * z * self.epsilon

    def step(self, index: int) -> None:
        """See :class:`Contestant`."""
        seed = int(torch.randint(1_000_000_000, (1,), generator=self.seeds))
        self.last_seed, self.seen = seed, []
        self._perturb(seed, 1)
        self._forward()
        self._perturb(seed, -2)
        self._forward()
        slope = ((self.seen[0].mean() - self.seen[1].mean()) / (2 * self.epsilon)).item()
        self._perturb(seed, 1)
        torch.manual_seed(seed)
        for _, p in self.parameters:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            p.data = p.data - self.rate * (slope * z)

    def _forward(self) -> None:
        with torch.inference_mode():
            self.seen.append(self.problem.losses(all_logits=True))

    def check(self) -> None:
        """See :class:`Contestant`."""
        twin = copy.deepcopy(self.problem.model)
        start = {name: p.detach().clone() for name, p in self.parameters}
        self.step(0)
        for sign, seen in zip((1, -1), self.seen, strict=True):
            torch.manual_seed(self.last_seed)
            with torch.no_grad():
                for name, p in self.parameters:
                    z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
                    twin.get_parameter(name).copy_(start[name] + sign * self.epsilon * z)
            _same(self.problem.losses(model=twin), seen, "MeZO")


def _same(expected: Tensor, seen: Tensor, who: str) -> None:
    tolerance = 0.05 if seen.is_cuda else 1e-4  # the CUDA presets are in half precision
    torch.testing.assert_close(seen.float(), expected.float(), rtol=tolerance, atol=tolerance)
    print(f"losses of {who} agree with the recomputation: largest difference {float((seen - expected).abs().max()):.1e}")


# ---- measuring ---------------------------------------------------------------------------------------------------------
@dataclass
class Times:
    """Seconds of one contestant, by kind of step."""

    by_kind: dict[str, list[float]] = field(default_factory=dict)

    def amortised(self, shares: Mapping[str, float]) -> float:
        """Median seconds per step of a long run."""
        return sum(share * statistics.median(self.by_kind[kind]) for kind, share in shares.items())


def timed(action: Callable[[], None], device: torch.device) -> float:
    """Seconds of ``action``."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def busy(action: Callable[[], None]) -> dict[str, float]:
    """Seconds for which the GPU is busy with ``action``, and the number of its kernels and copies."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        action()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"seconds": sum(event.device_time for event in events) / 1e6, "count": len(events)}


def peak_memory(action: Callable[[], None], device: torch.device) -> int:
    """Most bytes that ``action`` holds at a time beyond what there was."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    # each allocation and release, in the order of time
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def drawing(shape: str) -> dict[str, Any]:
    """Seconds in which the host draws one low-rank direction of all parameters; no weights are needed for it."""
    sizes = SHAPES[shape]
    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=sizes["hidden_size"]))
    optimizer = ZerothOrder(model.named_parameters(), seed=1).attach(model)
    path: Any = optimizer._path
    path._lay_out()
    wall, process = [], []
    for _ in range(50):
        start, worked = time.perf_counter(), time.process_time()
        numbers = path._draw(0).numel()
        wall.append(time.perf_counter() - start)
        process.append(time.process_time() - worked)
    return {
        "shape": shape,
        "parameters": sum(len(group["params"]) for group in optimizer.param_groups),
        "numbers": numbers,
        "threads": torch.get_num_threads(),
        "seconds": {"median": statistics.median(wall), "min": min(wall)},
        "process_seconds": {"median": statistics.median(process), "min": min(process)},
    }


def main() -> None:
    """Check, time, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu-125m", help="model shape, device, precision and batch")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats")
    parser.add_argument("--only", nargs="+", help="of lowrank_sequential, lowrank_doubled, dense, dense_sgd, mezo: these alone")
    parser.add_argument("--drawing", choices=list(SHAPES), help="time only the drawing of low-rank directions for this shape")
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    args = parser.parse_args()
    with torch.no_grad():
        result = measure(args) if args.drawing is None else drawing(args.drawing)
    text = json.dumps(result, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one preset."""
    problem = make_problem(args.preset)
    makers: dict[str, Callable[[], Contestant]] = {
        "bare": lambda: Bare(problem),
        "lowrank_sequential": lambda: Ours(problem, directions="low_rank", probes="sequential"),
        "lowrank_doubled": lambda: Ours(problem, directions="low_rank", probes="auto"),
        "dense": lambda: Ours(problem, directions="gaussian", probes="auto"),
        "dense_sgd": lambda: Ours(problem, directions="gaussian", probes="auto", update="sgd"),
        "mezo": lambda: MeZO(problem),
    }
    names = [name for name in makers if name == "bare" or args.only is None or name in args.only]
    weights = sum(p.numel() * p.element_size() for p in problem.model.parameters())
    contestants: dict[str, Contestant] = {}
    memory: dict[str, int] = {}
    device_busy: dict[str, dict[str, float]] = {}
    for name in names:
        contestant = contestants[name] = makers[name]()
        contestant.check()
        for index, _ in contestant.course:
            contestant.step(index)
        memory[name] = peak_memory(lambda c=contestant: c.step(102), problem.device)  # type: ignore[misc]
        if problem.device.type == "cuda":
            contestant.step(103)
            device_busy[name] = busy(lambda c=contestant: c.step(104))  # type: ignore[misc]
        if name == "mezo" and problem.device.type == "cpu":
            memory[name] -= weights  # it puts new tensors in place of the weights, whose release the profiler cannot count
        if isinstance(contestant, Ours):
            state = contestant.optimizer.param_groups[0]["stacking"]
            print(f"{name}: probes {'stacked' if state == 'trusted' else 'one after the other'}")
            contestant.optimizer.fold()
    times: dict[str, Times] = {name: Times() for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    bare = contestants["bare"]
    for _ in range(args.repeats):
        for name, contestant in contestants.items():
            # right beside each other, so that a machine that changes its speed does so for both
            beside = timed(lambda: bare.step(0), problem.device)
            taken = Times()
            for index, kind in contestant.course:
                seconds = timed(lambda c=contestant, i=index: c.step(i), problem.device)  # type: ignore[misc]
                if kind is not None:
                    taken.by_kind.setdefault(kind, []).append(seconds)
                    times[name].by_kind.setdefault(kind, []).append(seconds)
            if isinstance(contestant, Ours):
                contestant.optimizer.fold()
            beside = (beside + timed(lambda: bare.step(0), problem.device)) / 2
            ratios[name].append(taken.amortised(contestant.kinds) / beside)
    per_step = {name: times[name].amortised(contestants[name].kinds) for name in names}
    others = [name for name in names if name != "bare"]
    inference = weights + memory["bare"]
    key = {"lowrank_sequential": "lowrank"}
    return {
        "preset": args.preset,
        "device": torch.cuda.get_device_name() if problem.device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": sum(p.numel() for p in problem.model.parameters()),
        "repeats": args.repeats,
        "seconds": per_step,
        "seconds_by_kind": {
            name: {kind: {"median": statistics.median(xs), "min": min(xs), "max": max(xs)} for kind, xs in t.by_kind.items()}
            for name, t in times.items()
        },
        "ratio": {name: statistics.median(ratios[name]) for name in others},
        "ratio_spread": {name: [min(ratios[name]), max(ratios[name])] for name in others},
        "speedup_vs_mezo": {name: per_step["mezo"] / per_step[name] for name in others if "mezo" in names},
        "device_busy": device_busy or None,
        "memory": {
            **{f"{key.get(name, name)}_over_inference": (weights + memory[name]) / inference for name in others},
            "bytes": {"weights": weights, **memory},
        },
        "bytes_moved": None,  # no counter without privileges
    }


if __name__ == "__main__":
    main()
