"""All probes of a step as one forward of the stacked batch: the same numbers, fewer calls, and every way back."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.optim import reference
from tests.optim.reference import dense, loss_at, raw, same_bits
from tests.optim.zoo import inputs
from tests.tiny import VOCABULARY_SIZE, tiny_config
from zo_lightning.optim import Address, Gaussian, LowRank, ParameterFree, Rademacher, Sphere, ZerothOrder

CPU = torch.device("cpu")
FAMILIES = {
    "rank 1": lambda: LowRank(1, 3),
    "rank 2": lambda: LowRank(2, 3),
    "gaussian": Gaussian,
    "rademacher": Rademacher,
    "sphere": Sphere,
}
every_family = pytest.mark.parametrize("family", FAMILIES)
low_rank_or_dense = pytest.mark.parametrize("family", ["rank 1", "gaussian"])
DEPENDENT = ".* examples must not depend on each other"


# ---- models ------------------------------------------------------------------------------------------------------------
class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.body = nn.Embedding(VOCABULARY_SIZE, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(self.emb(ids))), self.emb.weight)


class Gains(nn.Module):
    """Raw vectors and a scalar on either side of an operator, as RMSNorm uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        self.scale, self.lin, self.norm = nn.Parameter(torch.ones(())), nn.Linear(6, 3, bias=False), nn.RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.weight * x / x.square().mean(-1, keepdim=True).sqrt())
        return self.lin(torch.tanh(1 - (x - self.shift) * self.weight)) * self.scale


class Convolutions(nn.Module):
    def __init__(self, conv: type[nn.Module]) -> None:
        super().__init__()
        self.conv, self.last = conv(2, 4, 2, stride=2, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.conv(x)).flatten(2).mean(2))


def language_model(kind: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(tiny_config(kind, attn_implementation="eager")).eval()


def classify(module: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    logits = module(x)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), label, reduction="none")


def predict(module: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss of each row's next tokens."""
    positions = {} if isinstance(module, TiedHead) else {"position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
    out = module(ids, **positions)
    logits = (out if isinstance(out, Tensor) else out.logits)[:, :-1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


LABELS = torch.tensor([0, 2, 1, 1, 0])
IDS = torch.tensor([[2, 3, 9, 4, 8, 5], [2, 7, 7, 3, 11, 4], [2, 20, 3, 3, 9, 14]])


@dataclass(frozen=True)
class Case:
    """A model and its batch.

    Attributes:
        build: Makes the model.
        batch: Tensors, the first dimension that of the examples.
        losses: One loss per example.
        dense: Whether dense directions of all of its weights can be stacked.
    """

    build: Callable[[], nn.Module]
    batch: tuple[Tensor, ...]
    losses: Callable[..., Tensor]
    dense: bool = True

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            module = self.build()
            with torch.no_grad():  # no symmetric initial values: zero biases would hide a mistake
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return module.to(dtype)

    def evaluate(self, module: nn.Module, copies: int = 1) -> Tensor:
        dtype = next(module.parameters()).dtype
        batch = [torch.cat([x] * copies) for x in self.batch]
        return self.losses(module, *[x.to(dtype) if x.is_floating_point() else x for x in batch])


CASES = {
    "perceptron": Case(Perceptron, (inputs(5, 6), LABELS), classify),
    "tied_head": Case(TiedHead, (IDS,), predict),
    "gains": Case(Gains, (inputs(5, 6), LABELS), classify),
    "gpt2": Case(lambda: language_model("gpt2"), (IDS,), predict, dense=False),
    "opt": Case(lambda: language_model("opt"), (IDS,), predict),
    "llama": Case(lambda: language_model("llama"), (IDS,), predict),
    "conv1d": Case(lambda: Convolutions(nn.Conv1d), (inputs(5, 2, 7), LABELS), classify, dense=False),
    "conv2d": Case(lambda: Convolutions(nn.Conv2d), (inputs(5, 2, 4, 5), LABELS), classify, dense=False),
}


# ---- runs --------------------------------------------------------------------------------------------------------------
class Run:
    """A model with its optimizer, and what every evaluation gave.

    Attributes:
        calls: Of the current step: 1 for the closure, the number of copies for its stacked form.
        losses: What they returned, in the same order.
    """

    def __init__(self, case: Case, family: str = "rank 1", dtype: torch.dtype = torch.float32, **settings) -> None:
        self.case, self.module = case, case.module(dtype)
        defaults = {"lr": 0.02, "smoothing": 0.05, "seed": 3}
        self.optimizer = ZerothOrder(
            self.module.named_parameters(), directions=FAMILIES[family](), **{**defaults, **settings}
        ).attach(self.module)
        self.calls: list[int] = []
        self.losses: list[Tensor] = []

    def closure(self) -> Tensor:
        return self._evaluate(1)

    def stacked(self, copies: int) -> Tensor | None:
        return self._evaluate(copies)

    def _evaluate(self, copies: int) -> Tensor:
        self.calls.append(copies)
        losses = self.evaluate(copies)
        self.losses.append(losses.detach().clone())
        return losses

    def evaluate(self, copies: int) -> Tensor:
        return self.case.evaluate(self.module, copies)

    def step(self) -> Tensor:
        self.calls, self.losses = [], []
        return self.optimizer.step(self.closure, stacked=self.stacked)

    @property
    def stacking(self) -> str:
        states = {group["stacking"] for group in self.optimizer.param_groups}
        assert len(states) == 1
        return states.pop()

    def weights(self) -> dict[str, Tensor]:
        """The weights with what is pending."""
        return {name: weight.detach().clone() for name, weight in self.module.state_dict().items()}

    def bits(self) -> dict[str, Tensor]:
        return {name: raw(weight) for name, weight in self.module.state_dict().items()}

    def memory(self) -> dict[str, Tensor]:
        """The weights and buffers as they lie in memory."""
        return {n: raw(t) for n, t in itertools.chain(self.module.named_parameters(), self.module.named_buffers())}


def twins(case: Case, *args, **settings) -> tuple[Run, Run]:
    """The same run, with probes at once where that is possible and with probes in turn."""
    return Run(case, *args, **settings), Run(case, *args, probes="sequential", **settings)


def check_close(run: Run, other: Run, loss: float, slope: float, weight: float) -> None:
    a, b = run.optimizer.last, other.optimizer.last
    assert a.loss == pytest.approx(b.loss, rel=loss)
    assert a.slopes == pytest.approx(b.slopes, rel=slope, abs=slope)
    assert a.gain == pytest.approx(b.gain, rel=slope, abs=slope)
    assert (a.curvature is None) == (b.curvature is None)
    expected = other.weights()
    for name, value in run.weights().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=weight, msg=lambda text, name=name: f"{name}: {text}")


def check_exact(run: Run, other: Run) -> None:
    assert run.optimizer.last.slopes == other.optimizer.last.slopes
    assert run.optimizer.last.gain == other.optimizer.last.gain
    assert run.optimizer.last.loss == other.optimizer.last.loss
    assert same_bits(run.bits(), other.bits())


# ---- the same numbers --------------------------------------------------------------------------------------------------
def direction(run: Run, query: int) -> dict[str, np.ndarray]:
    """u of the coming step, as dense float64 arrays."""
    optimizer, u = run.optimizer, {}
    shapes = {name: parameter.shape for name, parameter in optimizer.named_parameters().items()}
    for group in optimizer.param_groups:
        names = group["param_names"]
        drawn = [optimizer.directions.draw(Address(3, optimizer.step_index, n, query), shapes[n], CPU) for n in names]
        z = [dense(x, shapes[n]) for n, x in zip(names, drawn, strict=True)]
        if optimizer.update.name == "lmo":
            z = reference.extreme(group["geometry"], z, group["radius"], group["transposed"])
        elif optimizer.directions.name == "sphere":
            length = math.sqrt(sum((x**2).sum() for x in z))
            z = [x / length for x in z]
        u.update(zip(names, z, strict=True))
    return u


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name, case in CASES.items() for family in FAMILIES if case.dense or family.startswith("rank")],
)
def test_each_part_sees_the_weights_of_its_own_point(name, family):
    """Against float64 copies of the model at ``W + τ u``, before and after an update is pending."""
    case = CASES[name]
    run = Run(case, family, num_directions=2, update="sgd", weight_decay=0.5, lr=0.01, smoothing=0.02)
    run.step()
    assert run.stacking == "trusted"
    for _ in range(2):
        weights = run.weights()
        us = [direction(run, query) for query in range(2)]
        run.step()
        (stacked,) = run.losses
        parts = stacked.view(4, -1)
        points = [(u, sign) for u in us for sign in (1, -1)]
        for part, (u, sign) in zip(parts, points, strict=True):
            at = {n: weights[n].double() + sign * 0.02 * torch.from_numpy(np.array(x)) for n, x in u.items()}
            expected = loss_at(case.module(torch.float64), at, case.evaluate)
            torch.testing.assert_close(part.double(), expected, rtol=2e-6, atol=2e-6)
        assert float((parts[0] - parts[1]).abs().max()) > 1e-3, "the points are told apart"
        assert float((parts[0] - parts[2]).abs().max()) > 1e-3


@every_family
@pytest.mark.parametrize("update", ["lmo", "sgd"])
@pytest.mark.parametrize(("q", "sides"), [(1, 2), (3, 2), (3, 1)])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.5)])
def test_a_run_is_the_same_either_way(family, update, q, sides, momentum, weight_decay):
    settings = {"num_directions": q, "sides": sides, "momentum": momentum, "weight_decay": weight_decay, "update": update}
    run, other = twins(CASES["perceptron"], family, **settings)
    for step in range(4):
        loss, expected = run.step(), other.step()
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)
        if step == 0:
            check_exact(run, other)
        check_close(run, other, loss=1e-6, slope=2e-5, weight=2e-6)
    assert run.stacking == "trusted"
    assert other.calls == [1] * (q * sides + (sides == 1))
    assert run.calls == [1] * (sides == 1) + [q * sides]


@pytest.mark.parametrize("name", CASES)
@low_rank_or_dense
@pytest.mark.filterwarnings("ignore:probes run one after the other, because .* takes one weight for the whole batch")
def test_a_run_of_any_model_is_the_same_either_way(name, family):
    case = CASES[name]
    run, other = twins(case, family, scaling="output" if name == "opt" else "none")
    for _ in range(4):
        run.step(), other.step()
        check_close(run, other, loss=2e-6, slope=5e-5, weight=2e-6)
    assert run.stacking == ("trusted" if case.dense or family == "rank 1" else "off")


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in ("perceptron", "gains", "tied_head") for family in FAMILIES]
    + [(name, family) for name in ("opt", "llama") for family in ("rank 1", "gaussian")],
)
def test_half_precision_runs_are_close_either_way(name, family):
    run, other = twins(CASES[name], family, torch.bfloat16, smoothing=0.2)
    for group in run.optimizer.param_groups:  # in so small a model no difference stands out from bfloat16's rounding
        group["stacking"] = "trusted"
    for _ in range(4):
        run.step(), other.step()
        check_close(run, other, loss=2e-2, slope=8e-2, weight=2e-2)
        torch.testing.assert_close(run.losses[-1].view(2, -1), torch.stack(other.losses[-2:]), rtol=2e-2, atol=2e-2)
        assert run.calls[-1] == 2
        assert run.losses[-1].dtype == torch.float32


@every_family
@pytest.mark.parametrize("sides", [1, 2])
def test_the_parameter_free_rule_is_the_same_either_way(family, sides):
    """Calibration, curvature, and the sizes that follow from them."""
    runs = [
        Run(CASES["perceptron"], family, sides=sides, probes=probes, step_rule=ParameterFree(6, interval=2))
        for probes in ("auto", "sequential")
    ]
    run, other = runs
    for step in range(6):
        run.step(), other.step()
        check_close(run, other, loss=1e-5, slope=1e-3, weight=1e-4)
        rule, twin = run.optimizer.step_rule, other.optimizer.step_rule
        assert rule.smoothing == pytest.approx(twin.smoothing, rel=1e-3)
        assert rule.step_size == pytest.approx(twin.step_size, rel=1e-3)
        assert rule.curvature == pytest.approx(twin.curvature, rel=1e-3)
        assert (run.optimizer.last.curvature is not None) == (step % 2 == 0)
    assert run.stacking == "trusted"


# ---- how many evaluations ----------------------------------------------------------------------------------------------
@low_rank_or_dense
@pytest.mark.parametrize(
    ("q", "sides", "first", "later"),
    [
        (1, 2, [1, 1, 1, 2], [2]),
        (3, 2, [1, 1, 1, 1, 1, 1, 1, 6], [6]),
        (3, 1, [1, 1, 1, 1, 1, 3], [1, 3]),
        (1, 1, [1, 1, 1], [1, 1]),
    ],
)
def test_evaluations_of_a_step(family, q, sides, first, later):
    """The first step observes, and compares; a batch of k copies counts k evaluations."""
    run = Run(CASES["perceptron"], family, num_directions=q, sides=sides)
    total = 0
    for expected in (first, later, later):
        run.step()
        assert run.calls == expected
        assert run.optimizer.last.forwards == sum(expected)
        total += sum(expected)
        assert run.optimizer.forwards == total


@pytest.mark.parametrize(("sides", "with_curvature", "without"), [(2, [1, 2], [2]), (1, [1, 2], [1, 1])])
def test_evaluations_of_the_parameter_free_rule(sides, with_curvature, without):
    """Pairs of the calibration are compared until one is told apart; the others are evaluated at once."""
    run = Run(CASES["perceptron"], sides=sides, step_rule=ParameterFree(9, interval=2))
    run.step()
    tries = run.optimizer.param_groups[0]["unresolved"] + 1
    pairs = (len(run.calls) - 2 - 3 * tries - len(with_curvature)) + tries
    assert pairs % 3 == 0, "three directions at each smoothing"
    assert run.calls == [1, 1] + [1, 1, 2] * tries + [2] * (pairs - tries) + with_curvature
    assert run.optimizer.forwards == sum(run.calls)
    for expected in (without, with_curvature, without):
        before = run.optimizer.forwards
        run.step()
        assert run.calls == expected
        assert run.optimizer.forwards - before == sum(expected)


@low_rank_or_dense
def test_sequential_probes_never_stack(family):
    run = Run(CASES["perceptron"], family, probes="sequential", num_directions=2)
    for _ in range(3):
        run.step()
        assert run.calls[-4:] == [1] * 4
    assert run.optimizer.forwards == 13
    assert run.stacking == "untried", "a later run may"


def test_a_closure_without_a_stacked_form_runs_in_turn():
    run, other = twins(CASES["perceptron"])
    for _ in range(2):
        run.optimizer.step(run.closure), other.step()
        check_exact(run, other)
    assert run.stacking == "untried"
    assert run.calls == [1] * 5


def test_losses_of_any_shape():
    run, other = twins(CASES["perceptron"])
    for _ in range(3):
        run.optimizer.step(lambda: run.closure().view(5, 1), stacked=lambda copies: run.stacked(copies).view(copies, 5, 1))
        other.step()
        check_close(run, other, loss=1e-6, slope=2e-5, weight=2e-6)
    assert run.stacking == "trusted"


# ---- ways back ---------------------------------------------------------------------------------------------------------
def unwarned(run: Run) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run.step()


def turned_off(run: Run, other: Run, reason: str, *, calls: list[int], quietly: bool = False, caplog=None) -> None:
    """In the first step ``run`` says why it does without, and takes the same steps as ``other`` bit for bit."""
    for step in range(4):
        if step == 0 and not quietly:
            with pytest.warns(UserWarning, match=f"probes run one after the other, because {reason}") as said:
                run.step()
            assert len(said) == 1
        elif step == 0:
            with caplog.at_level(logging.INFO, logger="zo_lightning"):
                unwarned(run)
            assert [record.message for record in caplog.records].count(f"probes run one after the other, because {reason}") == 1
        else:
            unwarned(run)
        assert run.calls == ([1, 1, 1, *calls] if step == 0 else [1, 1])
        assert run.stacking == "off"
        other.step()
        check_exact(run, other)


OUT_OF_MEMORY = {
    "host": MemoryError(),
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "allocator": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


class Full(Run):
    """Its stacked forward runs out of memory while ``error`` is set."""

    error: Exception | None = None

    def stacked(self, copies):
        losses = super().stacked(copies)  # in the middle: the model has run
        if self.error is not None:
            raise self.error
        return losses


@low_rank_or_dense
@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_at_the_first_try(family, error):
    run, other = Full(CASES["perceptron"], family), Run(CASES["perceptron"], family, probes="sequential")
    run.error = OUT_OF_MEMORY[error]
    turned_off(run, other, "there is not enough memory", calls=[2])
    assert run.optimizer.forwards == other.optimizer.forwards == 9, "what failed does not count"


@low_rank_or_dense
@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_later_on(family, error):
    """The step it happens in is taken all the same, and is that of probes in turn."""
    run, other = Full(CASES["perceptron"], family), Run(CASES["perceptron"], family)
    for _ in range(2):
        run.step(), other.step()
    check_exact(run, other)
    assert run.stacking == "trusted"
    run.error, other.optimizer.probes = OUT_OF_MEMORY[error], "sequential"
    with pytest.warns(UserWarning, match="because there is not enough memory") as said:
        run.step()
    assert len(said) == 1
    assert run.calls == [2, 1, 1]
    for _ in range(3):
        other.step()
        check_exact(run, other)
        unwarned(run)
        assert run.calls == [1, 1]
    assert run.stacking == "off"


def test_a_real_allocation_that_fails_is_out_of_memory():
    run = Run(CASES["perceptron"])

    def stacked(copies):
        return run.stacked(copies) + torch.empty(10**15)[:1]

    with pytest.warns(UserWarning, match="because there is not enough memory"):
        run.optimizer.step(run.closure, stacked=stacked)
    assert run.stacking == "off"


@low_rank_or_dense
@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError("CUDA error: device-side assert triggered")])
def test_other_errors_of_a_trusted_forward_are_the_callers(family, error):
    run, other = Full(CASES["perceptron"], family), Run(CASES["perceptron"], family)
    for _ in range(2):
        run.step(), other.step()
    memory, seen, forwards, random = run.memory(), run.bits(), run.optimizer.forwards, torch.get_rng_state()
    run.error = error
    with pytest.raises(type(error), match=str(error)):
        run.step()
    assert same_bits(run.memory(), memory)
    assert same_bits(run.bits(), seen)
    assert torch.equal(torch.get_rng_state(), random)
    assert (run.optimizer.forwards, run.optimizer.step_index, run.stacking) == (forwards, 2, "trusted")
    with torch.no_grad():
        assert torch.equal(run.closure(), other.closure()), "what is pending is still seen"
    run.error = None
    for _ in range(2):
        run.step(), other.step()
        assert run.calls == [2]
        check_exact(run, other)


def test_errors_at_the_first_try_say_why_there_is_no_stacking():
    run, other = Full(CASES["perceptron"]), Run(CASES["perceptron"], probes="sequential")
    run.error = ValueError("this model wants a batch of 5\nand no other")
    turned_off(run, other, "this model wants a batch of 5$", calls=[2])


class Repeats(Run):
    """What is made of the losses of the stacked batch."""

    change: Callable[[Tensor, int], Tensor | None]

    def stacked(self, copies):
        return self.change(super().stacked(copies), copies)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda losses, copies: losses[:-1], "2 copies of the batch gave 9 losses"),
        (lambda losses, copies: losses.mean(), "2 copies of the batch gave 1 losses"),
        (lambda losses, copies: losses.view(copies, -1).mean(1), "it gives 1 losses for each copy of the batch in place of 5"),
        (lambda losses, copies: losses.view(copies, -1).T, DEPENDENT),
        (lambda losses, copies: losses.tolist(), "the closure must return the loss as a tensor, got list"),
    ],
)
def test_stacked_forms_that_return_something_else(change, reason):
    run, other = Repeats(CASES["perceptron"]), Run(CASES["perceptron"], probes="sequential")
    run.change = change
    turned_off(run, other, reason, calls=[2])


def test_a_batch_that_cannot_be_repeated(caplog):
    run, other = Repeats(CASES["perceptron"]), Run(CASES["perceptron"], probes="sequential")
    run.change = lambda losses, copies: None
    turned_off(run, other, "the batch cannot be repeated", calls=[2], quietly=True, caplog=caplog)


def test_a_batch_that_cannot_be_repeated_any_more():
    """That of a later step: it is seen in turn."""
    run, other = Repeats(CASES["perceptron"]), Run(CASES["perceptron"])
    run.change = lambda losses, copies: losses
    for _ in range(2):
        run.step(), other.step()
    run.change, other.optimizer.probes = lambda losses, copies: None, "sequential"
    for _ in range(2):
        unwarned(run), other.step()
        check_exact(run, other)
    assert run.stacking == "off"


def mean_loss(module: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    return classify(module, x, label).mean()


def test_one_loss_for_the_batch(caplog):
    case = Case(Perceptron, CASES["perceptron"].batch, mean_loss)
    run, other = twins(case)
    turned_off(run, other, "the loss is one number for the whole batch", calls=[], quietly=True, caplog=caplog)


def contrast(module: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    z = F.normalize(module(x), dim=1)
    return F.cross_entropy(5 * z @ z.T, torch.arange(len(z)), reduction="none")


def standardised(module: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    z = module(x)
    return classify(nn.Identity(), (z - z.mean(0)) / z.std(0), label)


@low_rank_or_dense
@pytest.mark.parametrize("losses", [contrast, standardised])
def test_examples_that_depend_on_each_other(family, losses):
    run, other = twins(Case(Perceptron, CASES["perceptron"].batch, losses), family)
    turned_off(run, other, DEPENDENT, calls=[2])
    assert run.optimizer.forwards == other.optimizer.forwards + 2


class TimeMajor(Run):
    """Activations of shape (time, batch, channels), which is repeated along its second dimension."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(Case(Perceptron, (inputs(4, 5, 6),), None), *args, **settings)

    def evaluate(self, copies):
        x = torch.cat([self.case.batch[0].to(next(self.module.parameters()).dtype)] * copies, dim=1)
        return self.module(x).float().square().mean((0, 2))


@every_family
def test_a_batch_that_is_not_the_first_dimension(family):
    run, other = TimeMajor(family), TimeMajor(family, probes="sequential")
    turned_off(run, other, r"first.weight meets activations of shape \[\(4, 10, 6\)\], which do not hold 2 batches", calls=[2])


@pytest.mark.filterwarnings("ignore:probes run one after the other")
def test_a_batch_that_is_not_the_first_dimension_in_half_precision():
    """Each part would see all points, and every slope would be 0."""
    slopes = []
    for probes in ("auto", "sequential"):
        run = TimeMajor("rank 1", torch.bfloat16, probes=probes, step_rule=ParameterFree(9))
        run.step(), run.step()
        slopes.append(run.optimizer.last.slopes[0])
    assert abs(slopes[1]) > 1e-3
    assert slopes[0] == pytest.approx(slopes[1], rel=0.2)


class Positions(nn.Module):
    """A language model whose positions are looked up by one index for all rows."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.rows = rows
        self.emb, self.pos, self.head = nn.Embedding(VOCABULARY_SIZE, 8), nn.Embedding(6, 8), nn.Linear(8, VOCABULARY_SIZE)
        self.body = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(4)])

    def forward(self, ids: Tensor) -> Tensor:
        index = torch.arange(ids.shape[1])
        return self.head(self.body(self.emb(ids) + self.pos(index.unsqueeze(0) if self.rows else index)))


def next_token(module: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(module(ids)[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


@low_rank_or_dense
@pytest.mark.parametrize("rows", [True, False])
def test_positions_that_are_looked_up_once_for_all_rows(family, rows):
    """By an index of shape (1, 6), or (6,), which could be 2 batches of 3."""
    run, other = twins(Case(lambda: Positions(rows), (IDS,), next_token), family)
    turned_off(run, other, r"pos.weight meets activations of shape .*, which do not hold 2 batches", calls=[2])


@pytest.mark.filterwarnings("ignore:probes run one after the other")
@pytest.mark.parametrize("rehearse", [False, True])
def test_positions_that_are_looked_up_once_in_a_calibrated_run(rehearse):
    """The calibration's first smoothing is so small that their share of a difference is not seen."""
    case = Case(lambda: Positions(False), (IDS,), next_token)
    runs = [Run(case, probes=probes, step_rule=ParameterFree(9)) for probes in ("auto", "sequential")]
    if rehearse:
        runs[0].optimizer.rehearse(runs[0].closure, stacked=runs[0].stacked)
    for _ in range(3):
        for r in runs:
            r.step()
        assert runs[0].optimizer.last.slopes == pytest.approx(runs[1].optimizer.last.slopes, rel=1e-3, abs=1e-5)


@pytest.mark.filterwarnings("ignore:probes run one after the other")
def test_positions_that_are_looked_up_once_in_a_run_that_stacks_later():
    """Its first step has no stacked form, or is broken off, or a batch norm is in training."""
    run, other = twins(Case(lambda: Positions(False), (IDS,), next_token), smoothing=3e-4)
    run.optimizer.step(run.closure), other.step()
    for _ in range(3):
        run.step(), other.step()
        for group in (*run.optimizer.param_groups, *other.optimizer.param_groups):
            group["smoothing"] = 0.5
    assert run.optimizer.last.slopes == pytest.approx(other.optimizer.last.slopes, rel=1e-3, abs=1e-5)


def test_gpt2_without_positions_for_each_row():
    """What transformers makes of it by itself is such an index."""

    def losses(module, ids):
        return F.cross_entropy(module(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    run, other = twins(Case(lambda: language_model("gpt2"), (IDS,), losses))
    turned_off(run, other, r"transformer.wpe.weight meets activations of shape \(1, 6\)", calls=[2])


class Captured(nn.Module):
    """A weight that is used as an object too."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.kept = [self.lin.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(x)) @ self.kept[0]


@low_rank_or_dense
def test_a_weight_that_is_moved_in_place(family):
    run, other = twins(Case(Captured, CASES["perceptron"].batch, classify), family)
    for r in (run, other):
        with pytest.warns(UserWarning, match=r"1 parameters are used otherwise .*: lin\.weight"):
            r.step()
    for _ in range(3):
        check_exact(run, other)
        unwarned(run), other.step()
        assert run.calls == [1, 1]
    assert run.stacking == "untried"


class Frequencies(nn.Module):
    """A vector that makes a new last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.frequency, self.lin = nn.Parameter(torch.linspace(0.1, 1, 8)), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(torch.sin(x.unsqueeze(-1) * self.frequency).flatten(1))


def test_a_vector_that_adds_a_dimension():
    run, other = twins(Case(Frequencies, CASES["perceptron"].batch, classify))
    for _ in range(3):
        run.step(), other.step()
        check_close(run, other, loss=1e-6, slope=2e-5, weight=2e-6)
    assert run.stacking == "trusted"


class MatrixBias(nn.Module):
    """What is added is a matrix of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.zeros(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.filterwarnings("ignore:probes run one after the other")
def test_a_matrix_as_a_bias_takes_one_weight_for_all():
    run = Run(Case(MatrixBias, CASES["perceptron"].batch, classify))
    with pytest.warns(UserWarning, match="bias is used as a bias, which takes one weight for the whole batch"):
        run.step()


def test_a_batch_of_one_sequence():
    """With a loss for each of its tokens."""

    def tokens(module, ids):
        return F.cross_entropy(module(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")

    run, other = twins(Case(TiedHead, (IDS[:1],), tokens))
    for _ in range(3):
        unwarned(run), other.step()
        check_close(run, other, loss=1e-6, slope=2e-5, weight=2e-6)
    assert run.stacking == "trusted"


def test_frozen_biases_do_not_count():
    """In transformers' Conv1D they come before the activations."""
    run, other = twins(CASES["gpt2"], geometry={"vector": None})
    for _ in range(3):
        unwarned(run), other.step()
        check_close(run, other, loss=2e-6, slope=5e-5, weight=2e-6)
    assert run.stacking == "trusted"


def test_batches_of_different_sizes():
    """One is observed, another the first that can be stacked, and others follow."""
    run, other = twins(Case(lambda: Normed(affine=False), CASES["perceptron"].batch, classify))
    whole = run.case.batch
    for step, rows in enumerate([5, 3, 4, 1, 5]):
        for r in (run, other):
            r.case = Case(Normed, tuple(x[:rows] for x in whole), classify)
            r.module.train(step == 0)
        unwarned(run), other.step()
        check_close(run, other, loss=1e-6, slope=2e-5, weight=2e-6)
    assert run.stacking == "trusted"
    assert run.calls == [2]


def test_a_batch_of_one_example():
    """Once stacking is trusted; at first it looks like one loss for the batch."""
    run, other = twins(CASES["perceptron"])
    for _ in range(2):
        run.step(), other.step()
    for r in (run, other):
        r.case = Case(Perceptron, tuple(x[:1] for x in r.case.batch), classify)
    for _ in range(2):
        run.step(), other.step()
        assert run.calls == [2]
        check_close(run, other, loss=1e-6, slope=2e-5, weight=2e-6)


@low_rank_or_dense
@pytest.mark.parametrize("name", ["perceptron", "gains", "opt"])
def test_mixed_precision_runs_are_close_either_way(name, family):
    run, other = twins(CASES[name], family, smoothing=0.2)
    for group in run.optimizer.param_groups:
        group["stacking"] = "trusted"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            run.step(), other.step()
            check_close(run, other, loss=2e-2, slope=8e-2, weight=2e-2)
            assert run.calls[-1] == 2


# ---- random numbers and batch norms ------------------------------------------------------------------------------------
class Dropout(nn.Module):
    """Dropout as a module or as a function, and what its masks were."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.drop = (lambda x: F.dropout(x, 0.5, self.training)) if functional else nn.Dropout(0.5)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(1 + torch.tanh(self.first(x)).square())  # positive: a zero is a dropped one
        self.masks.append(h != 0)
        return self.last(h)


def dropout_twins(functional: bool, family: str) -> tuple[Run, Run]:
    return twins(Case(lambda: Dropout(functional), CASES["perceptron"].batch, classify), family)


def checked_masks(run: Run) -> Tensor:
    """Those of the step's single batches, which are the same; no unit is dropped in all rows or none."""
    masks = [mask for mask in run.module.masks if len(mask) == 5]
    run.module.masks.clear()
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert 0.2 < float(masks[0].float().mean()) < 0.8
    return masks[0]


dropouts = pytest.mark.parametrize("functional", [False, True], ids=["module", "functional"])


@dropouts
@low_rank_or_dense
def test_dropout_sees_the_same_mask_at_every_probe(functional, family, caplog):
    run, other = dropout_twins(functional, family)
    random = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="zo_lightning"):
        unwarned(run)
    assert caplog.text.count("because the forward draws random numbers") == 1
    assert run.calls == [1, 1, 1, 2]
    torch.set_rng_state(random)
    other.step()
    check_exact(run, other)
    first = checked_masks(run)
    assert torch.equal(first, checked_masks(other))
    for _ in range(2):
        random = torch.get_rng_state()
        unwarned(run)
        assert run.calls == [1, 1]
        torch.set_rng_state(random)
        other.step()
        check_exact(run, other)
        mask = checked_masks(run)
        assert not torch.equal(mask, first), "fresh in every step"
        assert torch.equal(mask, checked_masks(other))
    assert run.stacking == "off"


@dropouts
def test_a_run_with_dropout_is_that_of_sequential_probes(functional):
    """From one random state the two runs draw the same masks."""
    masks = []
    for r in dropout_twins(functional, "rank 1"):
        torch.manual_seed(1)
        for _ in range(3):
            unwarned(r)
            masks.append(checked_masks(r))
    assert all(torch.equal(a, b) for a, b in zip(masks[:3], masks[3:], strict=True))


@dropouts
@low_rank_or_dense
def test_dropout_that_is_switched_on_later(functional, family):
    """The forward that drew its own mask for every copy is not used; the random state goes on as in turn."""
    states = []
    run, _ = dropout_twins(functional, family)
    other = Run(run.case, family)
    for r in (run, other):
        torch.manual_seed(2)
        r.module.eval()
        for _ in range(2):
            unwarned(r)
        assert r.stacking == "trusted"
        r.module.train()
        r.module.masks.clear()
    check_exact(run, other)
    other.optimizer.probes = "sequential"
    for r in (run, other):
        torch.manual_seed(3)
        for step in range(3):
            unwarned(r)
            assert r.calls == ([2, 1, 1] if r is run and step == 0 else [1, 1])
            states.append((checked_masks(r), torch.get_rng_state(), r.optimizer.last.slopes))
    for (mask, random, slopes), (mask_, random_, slopes_) in zip(states[:3], states[3:], strict=True):
        assert torch.equal(mask, mask_)
        assert torch.equal(random, random_)
        assert slopes == slopes_
    assert same_bits(run.bits(), other.bits())
    assert run.stacking == "off"


class Normed(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8, **settings), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


@low_rank_or_dense
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"affine": False, "track_running_stats": False}])
def test_batch_norms_in_training_are_never_stacked(family, settings):
    run, other = twins(Case(lambda: Normed(**settings), CASES["perceptron"].batch, classify), family)
    for r in (run, other):
        r.module.eval() if settings.get("track_running_stats") is False else r.module.train()
    for step in range(3):
        unwarned(run), other.step()
        assert run.calls == [1] * (3 if step == 0 else 2)
        assert run.stacking == "untried", "nothing was tried"
        check_exact(run, other)


@low_rank_or_dense
def test_batch_norms_are_stacked_in_eval_mode_only(family):
    run, other = twins(Case(lambda: Normed(affine=False).eval(), CASES["perceptron"].batch, classify), family)
    for step, training in enumerate([False, False, True, True, False]):
        run.module.train(training), other.module.train(training)
        unwarned(run), other.step()
        assert run.calls == {0: [1, 1, 1, 2]}.get(step, [1, 1] if training else [2])
        check_close(run, other, loss=1e-6, slope=2e-5, weight=2e-6)
    assert run.stacking == "trusted"


def test_batch_norms_with_weights_of_their_own_take_one_for_all():
    run, other = twins(Case(lambda: Normed().eval(), CASES["perceptron"].batch, classify))
    turned_off(run, other, r"norm\.(weight|bias) is used by batch_norm, which takes one weight for the whole batch", calls=[2])


# ---- what decides ------------------------------------------------------------------------------------------------------
def test_losses_that_are_not_finite_decide_nothing():
    run = Repeats(CASES["perceptron"])
    run.change = lambda losses, copies: losses
    bad: list[float] = [math.nan, math.inf]

    def closure():
        return run.closure() + bad[0] if bad else run.closure()

    def stacked(copies):
        return run.stacked(copies) + bad[0] if bad else run.stacked(copies)

    for count in (1, 2):
        run.calls = []
        with pytest.warns(UserWarning, match=rf"the update is skipped \({count} in a row\)"):
            run.optimizer.step(closure, stacked=stacked)
        bad.pop(0)
        assert run.calls == ([1, 1, 1, 2] if count == 1 else [1, 1, 2])
        assert run.stacking == "untried"
        assert run.optimizer.param_groups[0]["unresolved"] == 0
    for expected in ([1, 1, 2], [2]):
        run.calls = []
        run.optimizer.step(closure, stacked=stacked)
        assert run.calls == expected
    assert run.stacking == "trusted"


@low_rank_or_dense
def test_one_bad_loss_of_the_stacked_batch_alone_decides_nothing(family):
    run, other = Repeats(CASES["perceptron"], family), Run(CASES["perceptron"], family, probes="sequential")
    run.change = lambda losses, copies: torch.cat([losses[:-1], losses[-1:] * math.nan])
    for _ in range(2):
        unwarned(run), other.step()
        check_exact(run, other)
        assert run.stacking == "untried"


@low_rank_or_dense
def test_probes_that_cannot_be_told_apart_are_trusted_in_the_end(family):
    """Ten comparisons over as many steps, which a checkpoint in between remembers."""
    run, other = twins(CASES["perceptron"], family, smoothing=1e-9)
    for step in range(12):
        if step == 4:
            run = resumed(run)
            run.optimizer.rehearse(run.closure, stacked=run.stacked)  # counts no try
        unwarned(run), other.step()
        assert run.calls == {0: [1, 1, 1, 2], 4: [1, 1, 1, 2]}.get(step, [1, 1, 2] if step < 10 else [2])
        assert run.stacking == ("untried" if step < 9 else "trusted")
        assert run.optimizer.param_groups[0]["unresolved"] == min(step + 1, 10)
        check_exact(run, other) if step < 10 else None


# ---- the argument ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("probes", ["doubled", "", None, True])
def test_other_kinds_of_probes_are_refused(probes):
    with pytest.raises(ValueError, match=f"probes must be 'auto', 'sequential' or 'stacked', got {probes!r}"):
        Run(CASES["perceptron"], probes=probes)


@low_rank_or_dense
def test_stacked_probes_are_those_of_auto_where_possible(family):
    run, other = Run(CASES["perceptron"], family, probes="stacked"), Run(CASES["perceptron"], family)
    for _ in range(3):
        run.step(), other.step()
        assert run.calls == other.calls
        check_exact(run, other)


def test_stacked_probes_need_a_stacked_form():
    run = Run(CASES["perceptron"], probes="stacked")
    memory = run.memory()
    with pytest.raises(
        ValueError, match="probes='stacked' is not possible, because the closure has no stacked form; use 'auto'"
    ):
        run.optimizer.step(run.closure)
    assert same_bits(run.memory(), memory)
    assert run.optimizer.step_index == 0
    run.step()
    assert run.stacking == "trusted"


@pytest.mark.filterwarnings("ignore:1 parameters are used otherwise")
@pytest.mark.parametrize("attach", [True, False])
def test_stacked_probes_move_no_weight_in_place(attach):
    run = Run(Case(Captured, CASES["perceptron"].batch, classify), probes="stacked")
    if not attach:
        run.optimizer.detach()
    memory = run.memory()
    with pytest.raises(ValueError, match="probes='stacked' is not possible, because a parameter is moved in place; use 'auto'"):
        run.step()
    assert same_bits(run.memory(), memory)


@torch.no_grad()
def test_a_refused_step_leaves_the_pending_update_in_sight():
    run = Run(CASES["perceptron"], probes="stacked", lr=0.5)
    run.step()
    seen = run.closure()
    with pytest.raises(ValueError, match="the closure has no stacked form"):
        run.optimizer.step(run.closure)
    assert torch.equal(run.closure(), seen)


@torch.no_grad()
def test_an_error_in_the_first_forward_of_a_resumed_run_leaves_the_pending_update_in_sight():
    run = Run(CASES["perceptron"], lr=0.5)
    run.step()
    again = resumed(run)
    seen = again.closure()
    assert torch.equal(seen, run.closure())
    with pytest.raises(ZeroDivisionError):
        again.optimizer.step(lambda: 1 / 0)
    assert torch.equal(again.closure(), seen)


IMPOSSIBLE = {
    "one loss": Case(Perceptron, CASES["perceptron"].batch, mean_loss),
    "dependent losses": Case(Perceptron, CASES["perceptron"].batch, contrast),
    "dropout": Case(lambda: Dropout(False), CASES["perceptron"].batch, classify),
    "batch norm in training": Case(Normed, CASES["perceptron"].batch, classify),
    "one index for all rows": Case(lambda: Positions(True), (IDS,), next_token),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_stacked_probes_refuse_what_cannot_be_stacked(case):
    run = Run(IMPOSSIBLE[case], probes="stacked")
    memory = run.memory()
    with pytest.raises(ValueError, match="probes='stacked' is not possible, because "):
        run.step()
    assert same_bits(run.memory(), memory)
    assert run.optimizer.step_index == 0


@pytest.mark.parametrize("trusted", [False, True])
def test_stacked_probes_refuse_what_does_not_fit(trusted):
    run = Full(CASES["perceptron"], probes="stacked")
    if trusted:
        run.step()
    seen = run.bits()
    run.error = MemoryError()
    with pytest.raises(ValueError, match="probes='stacked' is not possible, because there is not enough memory; use 'auto'"):
        run.step()
    assert same_bits(run.bits(), seen)
    assert run.optimizer.step_index == trusted
    run.error = None
    run.step()
    assert run.stacking == "trusted"


def test_stacked_probes_refuse_what_was_given_up_before():
    """By a run with "auto", whose checkpoint says so."""
    run = Full(CASES["perceptron"])
    run.error = MemoryError()
    with pytest.warns(UserWarning, match="there is not enough memory"):
        run.step()
    run.optimizer.probes = "stacked"
    with pytest.raises(ValueError, match="probes='stacked' is not possible"):
        run.step()


# ---- resuming, rehearsing ----------------------------------------------------------------------------------------------
def resumed(run: Run) -> Run:
    """The run from its checkpoint, in fresh objects."""
    settings = {key: run.optimizer.defaults[key] for key in ("lr", "smoothing", "num_directions", "sides", "momentum")}
    rule = None if run.optimizer.step_rule is None else ParameterFree(9, interval=2)
    family = next(name for name, make in FAMILIES.items() if make().signature() == run.optimizer.directions.signature())
    other = type(run)(run.case, family, probes=run.optimizer.probes, step_rule=rule, **settings)
    other.module.load_state_dict(copy.deepcopy(run.module.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    return other


@low_rank_or_dense
@pytest.mark.parametrize("rule", [False, True], ids=["fixed", "parameter free"])
@pytest.mark.parametrize("at", [1, 4])
def test_a_resumed_run_goes_on_with_the_same_evaluations(family, rule, at):
    run = Run(CASES["opt"], family, step_rule=ParameterFree(9, interval=2) if rule else None)
    for _ in range(at):
        run.step()
    assert run.stacking == "trusted"
    saved = run.optimizer.state_dict()
    assert {group["stacking"] for group in saved["param_groups"]} == {"trusted"}
    again = resumed(run)
    for step in range(3):
        run.step(), again.step()
        assert again.calls == [1] * (step == 0) + run.calls, "it has to observe, which does not count again"
        assert again.optimizer.forwards == run.optimizer.forwards
        check_exact(again, run)
    assert again.stacking == "trusted"


@low_rank_or_dense
def test_a_resumed_run_goes_on_trying(family):
    run = Run(CASES["perceptron"], family, smoothing=1e-9)
    for _ in range(3):
        run.step()
    again = resumed(run)
    for step in range(3):
        run.step(), again.step()
        assert again.stacking == run.stacking == "untried"
        assert again.calls[-3:] == run.calls == [1, 1, 2]
        assert again.optimizer.forwards == run.optimizer.forwards, step


def test_a_resumed_run_does_without_stacking_where_it_did_before():
    run = Full(CASES["perceptron"])
    run.error = MemoryError()
    with pytest.warns(UserWarning, match="there is not enough memory"):
        run.step()
    again = resumed(run)
    for _ in range(3):
        unwarned(run), unwarned(again)
        assert run.calls == again.calls[-2:] == [1, 1]
        assert again.optimizer.forwards == run.optimizer.forwards
        check_exact(again, run)
    assert again.stacking == "off"


def plain(state) -> list:
    """A nested state as something that compares by value."""
    if isinstance(state, dict):
        return sorted(((str(key), plain(value)) for key, value in state.items()), key=lambda pair: pair[0])
    if isinstance(state, (list, tuple)):
        return [plain(value) for value in state]
    return raw(state).tolist() if isinstance(state, Tensor) else state


@low_rank_or_dense
@pytest.mark.parametrize("steps", [0, 1, 3, 4])
@pytest.mark.parametrize("name", ["perceptron", "dropout"])
def test_a_rehearsal_changes_nothing(family, name, steps):
    """Before the first step, in the middle of an interval, at its end, and just after; it takes the step's own forwards."""
    case = IMPOSSIBLE["dropout"] if name == "dropout" else CASES[name]
    settings = {"num_directions": 2, "momentum": 0.5, "weight_decay": 0.1, "scaling": "output"}
    run, other = Run(case, family, **settings), Run(case, family, **settings)
    for r in (run, other):
        torch.manual_seed(4)
        for _ in range(steps):
            r.step()
    memory, seen, random, forwards = run.memory(), run.bits(), torch.get_rng_state(), run.optimizer.forwards
    state, last = plain(run.optimizer.state_dict()), run.optimizer.last
    run.calls = []
    seconds = run.optimizer.rehearse(run.closure, stacked=run.stacked)
    assert 0 < seconds < 5
    observing = [] if steps else [1]
    expected = {("perceptron", False): [1, 1, 1, 1, 4, 4], ("dropout", False): [1, 1, 1, 1, 4, 1, 1, 1, 1]}
    after = {("perceptron", True): [4, 4], ("dropout", True): [1] * 8}
    assert run.calls == observing + (expected | after)[name, steps > 0]
    assert torch.equal(torch.get_rng_state(), random)
    assert same_bits(run.memory(), memory)
    assert same_bits(run.bits(), seen)
    assert run.optimizer.forwards == forwards
    assert run.optimizer.last is last
    if not (steps == 3 and family == "rank 1"):  # where V is drawn anew, and the momentum goes over to it
        assert plain(run.optimizer.state_dict()) == state
    for r in (run, other):
        torch.set_rng_state(random)
        for _ in range(3):
            r.step()
    check_exact(run, other)
    assert run.optimizer.forwards == other.optimizer.forwards
    assert run.stacking == other.stacking
