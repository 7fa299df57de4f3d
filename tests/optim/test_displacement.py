"""Displaced weights in the forward pass, and no trace of them afterwards."""

from __future__ import annotations

import itertools
import signal
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.optim.reference import bits, dense, loss_at, raw, same_bits
from tests.optim.zoo import CASES, IDS, Case, Mixed, inputs
from zo_lightning.optim import Address, Displacement, Gaussian, LowRank, ZerothOrder
from zo_lightning.optim import dense_path as dense_path_module
from zo_lightning.optim.dense_path import DensePath
from zo_lightning.optim.directions import base as directions_module
from zo_lightning.optim.interrupts import deferred_interrupt
from zo_lightning.optim.low_rank_path import LowRankPath
from zo_lightning.optim.shown import Drawn, Shown, ShownDense, ShownMatrix, ShownVector
from zo_lightning.optim.shown import dense as dense_module

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FAMILIES = {"gaussian": Gaussian, "rank 1": lambda: LowRank(1, 5), "rank 2": lambda: LowRank(2, 5)}
every_case = pytest.mark.parametrize("name", CASES)
every_family = pytest.mark.parametrize("family", FAMILIES)
attached = pytest.mark.parametrize("attach", [True, False], ids=["shown", "in_place"])
low_rank_or_dense = pytest.mark.parametrize("directions", ["low_rank", "gaussian"])
ignore_in_place = pytest.mark.filterwarnings("ignore:.*used otherwise than as their module's attribute:UserWarning")
ignore_formed = pytest.mark.filterwarnings("ignore:.*that a low-rank direction cannot follow:UserWarning")


# ---- displaced weights by hand -----------------------------------------------------------------------------------------
def direction(family: str, name: str, parameter: Tensor, step: int = 0) -> Tensor:
    """A direction as one dense float64 tensor."""
    z = FAMILIES[family]().draw(Address(0, step, name), parameter.shape, CPU)
    return torch.from_numpy(np.array(dense(z, parameter.shape)))


def displaced(module: nn.Module, family: str, tau: float, scale: float = 1.0) -> dict[str, Tensor]:
    """``s W + τ u``, a sum in float64 rounded to the weight's dtype."""
    return {n: (scale * p.detach().double() + tau * direction(family, n, p)).to(p.dtype) for n, p in module.named_parameters()}


class Known(Drawn):
    """A direction that comes in two pieces."""

    def __init__(self, u: Tensor) -> None:
        self.rows = u.reshape(len(u), -1)

    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        edges = sorted({0, len(self.rows) // 2, len(self.rows)})
        for first, last in itertools.pairwise(edges):
            yield first, last, self.rows[first:last].clone()


def stand_ins(module: nn.Module, family: str, tau: float, scale: float = 1.0) -> dict[nn.Parameter, Shown]:
    """What shows ``s W + τ u`` to the forwards; dense directions have no s."""
    made: dict[nn.Parameter, Shown] = {}
    for name, parameter in module.named_parameters():
        wide = torch.promote_types(parameter.dtype, torch.float32)
        z = FAMILIES[family]().draw(Address(0, 0, name), parameter.shape, CPU)
        if parameter.dim() < 2:
            made[parameter] = vector = ShownVector.stand_in(name, parameter, 1)
            vector.entries = (scale * parameter.detach().to(wide) + tau * z.to(wide)).unsqueeze(0)
        elif isinstance(z, Tensor):
            made[parameter] = matrix = ShownDense.stand_in(name, parameter, 1)
            matrix.draws = [(Known(z.to(wide)), tau)]
        else:
            made[parameter] = factors = ShownMatrix.stand_in(name, parameter, 1)
            factors.left, factors.right = tau * z.left.T.to(wide).unsqueeze(0), z.right.to(parameter.dtype)
            factors.scale = scale
    return made


def displacement(module: nn.Module, attach: bool = True) -> Displacement:
    return Displacement(dict(module.named_parameters()), module if attach else None)


# ---- what is left behind -----------------------------------------------------------------------------------------------
def memory(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's and buffer's raw bytes, as they lie in memory: no hook has a say."""
    return {name: raw(tensor) for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers())}


def pending_bits(optimizer: ZerothOrder) -> dict[str, Tensor]:
    """What the weights are to be moved by when the pending update is written."""
    return {name: raw(tensor) for name, tensor in optimizer.state_dict().get("path", {}).get("pending", {}).items()}


class Untouched:
    """What an evaluation leaves as it was: the very same objects in the slots, every bit of them, and the hooks."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.slots = dict(module.named_parameters(remove_duplicate=False))
        self.hooks = self._hooks()
        self.memory = memory(module)

    def _hooks(self) -> dict[str, list]:
        return {
            f"{name}.{kind}": list(hooks.values())
            for name, module in self.module.named_modules()
            for kind, hooks in vars(module).items()
            if kind.endswith(("_hooks", "_hooks_always_called", "_hooks_with_kwargs"))
        }

    def check(self, optimizer: ZerothOrder | None = None) -> None:
        """Objects and hooks; and every forward is wrapped while ``optimizer`` has an update pending, and only then."""
        slots = dict(self.module.named_parameters(remove_duplicate=False))
        assert slots.keys() == self.slots.keys()
        assert all(slots[name] is self.slots[name] for name in slots)
        showing = optimizer is not None and optimizer._pending is not None and optimizer._path.dirty
        assert self._hooks() == self.hooks
        assert {"forward" in vars(module) for module in self.module.modules()} == {showing}

    def check_bits(self) -> None:
        """The weights and buffers, as they lie in memory."""
        assert same_bits(memory(self.module), self.memory)


# ---- what the forward sees ---------------------------------------------------------------------------------------------
@every_case
@attached
@every_family
@ignore_in_place
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_forwards_see_the_displaced_weights_and_nothing_stays(name, attach, family, dtype):
    case = CASES[name]
    module = case.module(dtype)
    before, parameters = Untouched(module), dict(module.named_parameters())
    moved = displacement(module, attach)
    # the copy's tensors lie elsewhere in memory, and torch leaves its fused attention where a weight is a stand-in
    tolerance = {"rtol": 0, "atol": 1e-2 if dtype is torch.bfloat16 else 1e-12}
    # half-precision weights differ by one rounding, and by that of V, which is of the weight's dtype
    spacing = {"rtol": 2**-7, "atol": 4e-3} if dtype is torch.bfloat16 else {"rtol": 0, "atol": 1e-13}
    with torch.no_grad():
        if attach:
            torch.testing.assert_close(moved.observe(lambda: case.loss(module)), loss_at(module, {}, case.loss), **tolerance)
            assert sorted(moved.in_place) == sorted(case.in_place)
            before.check()
            before.check_bits()
        else:
            assert sorted(moved.in_place) == sorted(parameters)
        points = [(0.1, 1.0), (-0.1, 1.0), (0.3, 1.0)] + ([] if family == "gaussian" else [(0.2, 0.9)])
        seen = {}
        for point in points:
            expected = displaced(module, family, *point)
            with moved.at(stand_ins(module, family, *point)):
                seen[point] = case.loss(module)
                for n, weight in module.named_parameters():
                    torch.testing.assert_close(weight.detach(), expected[n], **spacing)
                    if n not in moved.in_place:
                        assert torch.equal(raw(parameters[n]), before.memory[n]), "the parameter itself is only read"
            before.check()
            before.check_bits()
            torch.testing.assert_close(seen[point], loss_at(module, expected, case.loss), **tolerance)
        with moved.at({}):
            seen["at rest"] = case.loss(module)
        torch.testing.assert_close(seen["at rest"], loss_at(module, {}, case.loss), **tolerance)
        torch.testing.assert_close(case.loss(module), seen["at rest"], **tolerance)
        before.check()
    assert len({float(loss) for loss in seen.values()}) == len(points) + 1


@every_case
@attached
@every_family
@ignore_in_place
@ignore_formed
def test_the_slope_is_the_directional_derivative(name, attach, family):
    case = CASES[name]
    module = case.module()
    parameters = dict(module.named_parameters())
    with torch.enable_grad():
        gradients = torch.autograd.grad(case.loss(module), list(parameters.values()))
    products = {n: float((g * direction(family, n, g)).sum()) for n, g in zip(parameters, gradients, strict=True)}
    settings = {"lr": 0.0, "smoothing": 1e-5, "update": "sgd", "seed": 0}
    before = memory(module)
    optimizer = ZerothOrder(module.named_parameters(), directions=FAMILIES[family](), **settings)
    if attach:
        optimizer.attach(module)
    optimizer.step(lambda: case.loss(module))
    assert optimizer.last.slopes[0] == pytest.approx(sum(products.values()), rel=1e-5, abs=1e-8)
    # and each parameter alone: none is left out, none counted twice
    for n, parameter in parameters.items():
        alone = ZerothOrder([(n, parameter)], directions=FAMILIES[family](), **settings)
        if attach:
            alone.attach(module)
        alone.step(lambda: case.loss(module))
        assert alone.last.slopes[0] == pytest.approx(products[n], rel=1e-5, abs=1e-8), n
        alone.detach()
    assert same_bits(memory(module), before)


@every_case
@ignore_in_place
def test_an_update_reaches_the_next_forward(name):
    case = CASES[name]
    module = case.module()
    optimizer = ZerothOrder(module.named_parameters(), lr=0.1, directions="gaussian", seed=0).attach(module)
    optimizer.step(lambda: case.loss(module))
    with torch.no_grad():
        weights = {n: p.detach().clone() for n, p in module.named_parameters()}
        fresh = case.module()
        torch.testing.assert_close(case.loss(module), loss_at(fresh, weights, case.loss), rtol=1e-12, atol=1e-12)
        assert not torch.equal(case.loss(module), case.loss(fresh))


@every_case
@pytest.mark.parametrize("rank", [1, 2])
@ignore_in_place
@ignore_formed
def test_a_pending_update_reaches_the_next_forward(name, rank):
    """Steps 0 and 2 are not written into the weights; all of them are seen, saved, and written on request."""
    case = CASES[name]
    module, fresh = case.module(), case.module()
    before = Untouched(module)
    optimizer = ZerothOrder(
        module.named_parameters(), lr=0.3, weight_decay=0.1, directions=LowRank(rank, 2), update="sgd", seed=0
    ).attach(module)
    untouched = Untouched(module)
    expected = {n: p.detach().clone() for n, p in module.named_parameters()}
    tolerance = {"rtol": 1e-12, "atol": 1e-12}
    with torch.no_grad():
        for step in range(3):
            written = memory(module)
            optimizer.step(lambda: case.loss(module))
            slope = optimizer.last.slopes[0]
            for n, weight in expected.items():
                z = LowRank(rank, 2).draw(Address(0, step, n), weight.shape, CPU)
                weight.mul_(1 - 0.3 * 0.1).sub_(0.3 * slope * torch.from_numpy(np.array(dense(z, weight.shape))))
            waits = step % 2 == 0 and not case.in_place
            torch.testing.assert_close(case.loss(module), loss_at(fresh, expected, case.loss), **tolerance)
            assert optimizer._path.dirty == waits
            assert same_bits(memory(module), written) == waits
            untouched.check(optimizer)
            saved = module.state_dict()
            for n, weight in expected.items():
                torch.testing.assert_close(saved[n], weight, **tolerance)
        optimizer.detach()
        before.check()
        for n, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[n], **tolerance)
        torch.testing.assert_close(case.loss(module), loss_at(fresh, expected, case.loss), **tolerance)


@every_family
def test_tied_weights_are_the_same_tensor_at_every_use(family):
    case = CASES["tied_head"]
    module = case.module()
    seen = []
    module.emb.register_forward_hook(lambda m, *_: seen.append(m.weight.clone()))
    module.head.register_forward_hook(lambda m, *_: seen.append(m.weight.clone()))
    moved = displacement(module)
    moved.observe(lambda: case.loss(module))
    with moved.at(stand_ins(module, family, 0.5)):
        case.loss(module)
    at_rest, displaced_pair = seen[:2], seen[2:]
    assert torch.equal(*at_rest)
    assert torch.equal(*displaced_pair)
    assert not torch.equal(at_rest[0], displaced_pair[0])
    for hooked in (module.emb, module.head):
        assert len(hooked._forward_hooks) == 1, "the user's own hooks stay"


@pytest.mark.parametrize("dtype", DTYPES)
@attached
@pytest.mark.parametrize("directions", ["low_rank", "gaussian", "rademacher", "sphere"])
@pytest.mark.parametrize("steps", [0, 1])
def test_every_dtype_is_bit_exact(dtype, attach, directions, steps):
    case = CASES["mixed"]
    module = case.module(dtype)
    with torch.no_grad():  # values whose sums with a displacement round, cancel or change exponent; and a negative zero
        module.head.weight.copy_(torch.tensor([1e-7, -3.0, 0.33325195, -0.0]).repeat(3, 1))
    optimizer = ZerothOrder(module.named_parameters(), smoothing=0.37, directions=directions, update="sgd", seed=0)
    if attach:
        optimizer.attach(module)
    for _ in range(steps):  # low-rank directions leave a pending update
        optimizer.step(lambda: case.loss(module))
    before, saved, pending = memory(module), bits(module), pending_bits(optimizer)
    waits = steps and attach and directions == "low_rank"
    assert same_bits(before, saved) != waits
    with pytest.warns(UserWarning, match="the update is skipped"):
        optimizer.step(lambda: case.loss(module) * float("nan"))
    assert same_bits(memory(module), before)
    assert same_bits(pending_bits(optimizer), pending)
    assert same_bits(bits(module), saved)


# ---- interruptions -----------------------------------------------------------------------------------------------------
class Fails(nn.Module):
    """Raises, or sends SIGINT, in its n-th forward."""

    def __init__(self, error: type[BaseException] | str, at_call: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.error, self.left = error, at_call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            if self.error == "ctrl-c":
                signal.raise_signal(signal.SIGINT)
            else:
                raise self.error("in the middle")
        return F.linear(x, self.weight)


def failing(error, at_call: int) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.Sequential(nn.LayerNorm(4), Fails(error, at_call))
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), middle, nn.BatchNorm1d(4), nn.Linear(4, 2))


ERRORS = [RuntimeError, KeyboardInterrupt, SystemExit, "ctrl-c"]
every_error = pytest.mark.parametrize("error", ERRORS)


def raised(error) -> type[BaseException]:
    return KeyboardInterrupt if error == "ctrl-c" else error


@attached
@low_rank_or_dense
@pytest.mark.parametrize("at_call", [1, 2, 3, 4])
@every_error
def test_an_exception_in_the_middle_of_a_forward_leaves_no_trace(error, at_call, directions, attach):
    module = failing(error, at_call)
    optimizer = ZerothOrder(module.named_parameters(), smoothing=0.1, lr=0.1, directions=directions, seed=0)
    if attach:
        optimizer.attach(module)
    untouched = Untouched(module)
    x = inputs(5, 4, dtype=torch.float32)

    def closure():
        return module(x).square().mean()

    if at_call > (3 if attach else 2):  # a step has two forwards, the first one another for observing
        optimizer.step(closure)
        assert optimizer._path.dirty == (attach and directions == "low_rank")
    before, saved = memory(module), bits(module)
    with pytest.raises(raised(error)):
        optimizer.step(closure)
    after, saved_after = memory(module), bits(module)
    if not attach:  # only a module's buffers can be put back
        before, after, saved, saved_after = (
            {n: t for n, t in x.items() if n in untouched.slots} for x in (before, after, saved, saved_after)
        )
    assert same_bits(after, before)
    assert same_bits(saved_after, saved)
    untouched.check(optimizer)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    optimizer.step(closure)  # and it goes on
    assert not same_bits(bits(module), saved)


@low_rank_or_dense
@every_error
def test_an_exception_in_the_middle_of_a_stacked_forward_leaves_no_trace(error, directions):
    module = nn.Sequential(nn.Linear(4, 4), Fails(error, 0), nn.Linear(4, 2))
    settings = {"smoothing": 0.1, "lr": 0.1, "directions": directions, "probes": "stacked", "seed": 0}
    optimizer = ZerothOrder(module.named_parameters(), **settings).attach(module)
    untouched = Untouched(module)
    x = inputs(5, 4, dtype=torch.float32)

    def stacked(copies):
        return module(x.repeat(copies, 1)).square().mean(1)

    optimizer.step(lambda: stacked(1), stacked=stacked)
    assert optimizer.param_groups[0]["stacking"] == "trusted"
    before, saved, calls = memory(module), bits(module), module[1].left
    module[1].left = 1
    with pytest.raises(raised(error)):
        optimizer.step(lambda: stacked(1), stacked=stacked)
    assert calls == -4, "one to observe, two points in turn, both at once"
    assert same_bits(memory(module), before)
    assert same_bits(bits(module), saved)
    untouched.check(optimizer)
    optimizer.step(lambda: stacked(1), stacked=stacked)
    assert not same_bits(bits(module), saved)


@pytest.mark.parametrize("error", ERRORS)
@torch.no_grad()
def test_an_exception_in_a_forward_outside_of_a_step_leaves_no_trace(error):
    """The pending update is shown there too."""
    module = failing(error, 0).eval()
    optimizer = ZerothOrder(module.named_parameters(), lr=0.1, seed=0).attach(module)
    untouched = Untouched(module)
    x = inputs(5, 4, dtype=torch.float32)
    optimizer.step(lambda: module(x).square().mean())
    before, saved, seen = memory(module), bits(module), module(x)
    module[2][1].left = 1
    with pytest.raises(raised(error)):
        module(x)
    assert same_bits(memory(module), before)
    assert same_bits(bits(module), saved)
    untouched.check(optimizer)
    assert torch.equal(module(x), seen)


@attached
@low_rank_or_dense
@pytest.mark.parametrize("at_call", [2, 4, 6, 9, 13])
def test_a_failing_draw_leaves_no_trace(directions, at_call, attach, monkeypatch):
    """At any of the draws for the probes: 7 parameters at 2 points, where a direction is not kept for both."""
    module, twin = Mixed().double(), Mixed().double()
    twin.load_state_dict(module.state_dict())
    settings = {"smoothing": 0.01, "lr": 0.1, "directions": directions, "seed": 0}
    optimizer, other = (ZerothOrder(m.named_parameters(), **settings) for m in (module, twin))
    if attach:
        optimizer.attach(module)
        other.attach(twin)
    untouched = Untouched(module)
    calls = itertools.count(1)
    name = "draw" if directions == "low_rank" else "rows"
    draw = getattr(optimizer.directions, name)

    def broken(*args):
        if next(calls) == at_call:
            raise MemoryError("no room for the direction")
        return draw(*args)

    monkeypatch.setattr(optimizer.directions, name, broken)
    with pytest.raises(MemoryError):
        optimizer.step(lambda: module(IDS))
    untouched.check(optimizer)
    untouched.check_bits()
    assert optimizer.step_index == 0
    optimizer.step(lambda: module(IDS))  # and it goes on
    other.step(lambda: twin(IDS))
    assert same_bits(memory(module), memory(twin))
    assert same_bits(bits(module), bits(twin))
    assert not same_bits(bits(module), untouched.memory)


@every_family
def test_a_closure_that_survives_an_error_sees_the_same_weights_again(family):
    module = Case(lambda: nn.Linear(4, 4)).module()
    moved, untouched = displacement(module), Untouched(module)
    x = inputs(3, 4)
    moved.observe(lambda: module(x))
    shown = stand_ins(module, family, 0.2)
    with moved.at(shown):
        with pytest.raises(RuntimeError):
            module(inputs(3, 5))
        assert module.weight is shown[untouched.slots["weight"]]
        again = module(x)
    untouched.check()
    expected = loss_at(module, displaced(module, family, 0.2), lambda m: m(x))
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)


def interrupting(monkeypatch, path: type, method: str, at_call: int = 1) -> None:
    """Ctrl-C just before a call of ``method``; the others go through."""
    write, calls = getattr(path, method), itertools.count(1)

    def write_and_interrupt(self, *args):
        if at_call in (0, next(calls)):
            signal.raise_signal(signal.SIGINT)
        return write(self, *args)

    monkeypatch.setattr(path, method, write_and_interrupt)


@pytest.mark.parametrize(
    ("path", "method", "at_call", "settings"),
    [
        (DensePath, "_write", 0, {"directions": "gaussian"}),
        (DensePath, "_write", 4, {"directions": "gaussian", "num_directions": 2, "momentum": 0.5}),
        (LowRankPath, "apply", 1, {}),
        (LowRankPath, "_step_along", 2, {"num_directions": 2, "momentum": 0.5}),
        (LowRankPath, "fold", 1, {"interval": 1}),
        (LowRankPath, "_folded", 4, {"interval": 1}),
    ],
)
def test_an_interrupt_while_the_update_is_written_waits_until_all_of_it_is(path, method, at_call, settings, monkeypatch):
    case = CASES["mixed"]
    whole, interrupted = case.module(), case.module()

    def optimizer(module):
        return ZerothOrder(module.named_parameters(), lr=0.1, smoothing=0.01, seed=0, **settings).attach(module)

    expected = optimizer(whole)
    expected.step(lambda: case.loss(whole))
    other = optimizer(interrupted)
    start = memory(interrupted)
    untouched = Untouched(interrupted)
    with monkeypatch.context() as patch:
        interrupting(patch, path, method, at_call)
        with pytest.raises(KeyboardInterrupt):
            other.step(lambda: case.loss(interrupted))
    assert same_bits(memory(interrupted), memory(whole))
    assert same_bits(bits(interrupted), bits(whole))
    assert not same_bits(bits(interrupted), start)
    assert same_bits(memory(interrupted), start) == (path is LowRankPath and "interval" not in settings)
    untouched.check(other)
    assert other.step_index == 1, "the step's index moves on with the weights"


@pytest.mark.parametrize("method", ["fold", "detach"])
def test_an_interrupt_while_a_pending_update_is_written_on_request_waits_until_all_of_it_is(method, monkeypatch):
    case = CASES["mixed"]
    module = case.module()
    optimizer = ZerothOrder(module.named_parameters(), lr=0.1, smoothing=0.01, seed=0).attach(module)
    optimizer.step(lambda: case.loss(module))
    expected, start = bits(module), memory(module)
    with monkeypatch.context() as patch:
        interrupting(patch, LowRankPath, "_folded", 4)
        with pytest.raises(KeyboardInterrupt):
            getattr(optimizer, method)()
    assert not optimizer._path.dirty
    assert same_bits(memory(module), expected)
    assert same_bits(bits(module), expected)
    assert not same_bits(expected, start)


def test_deferred_interrupt_hands_over_to_whatever_handler_there_was():
    log = []
    previous = signal.signal(signal.SIGINT, lambda *_: log.append("handled"))
    try:
        with deferred_interrupt():
            with deferred_interrupt():
                signal.raise_signal(signal.SIGINT)
                log.append("inner")
            log.append("outer")
        assert log == ["inner", "outer", "handled"]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


# ---- checkpoints in the middle -----------------------------------------------------------------------------------------
@every_case
@low_rank_or_dense
@pytest.mark.parametrize("keep_vars", [False, True])
@ignore_in_place
@ignore_formed
def test_a_checkpoint_taken_between_forwards_holds_the_weights(name, directions, keep_vars):
    """And so does one taken inside a forward; with a pending update, the weights that the update leads to."""
    case = CASES[name]
    module = case.module(torch.float32)
    optimizer = ZerothOrder(module.named_parameters(), smoothing=0.1, lr=0.1, directions=directions, seed=0).attach(module)
    optimizer.step(lambda: case.loss(module))
    slots = dict(module.named_parameters(remove_duplicate=False))
    before, in_memory = bits(module), memory(module)
    compared = []

    def compare():
        saved = module.state_dict(keep_vars=keep_vars)
        assert saved.keys() == before.keys()
        assert not any(isinstance(weight, Shown) for weight in saved.values())
        if not optimizer._path.dirty and keep_vars:
            assert all(saved[n] is slots[n] for n in slots)
        compared.append({n for n in before if not torch.equal(raw(saved[n]), before[n])})

    def closure():
        compare()
        loss = case.loss(module)
        compare()
        return loss

    hook = module.register_forward_hook(lambda *_: compare())
    optimizer.step(closure)
    hook.remove()
    per_forward = 6 if name == "recursive" else 3  # its forward runs in itself
    assert len(compared) == 2 * per_forward
    assert all(different <= set(case.in_place) for different in compared)
    pending = directions == "low_rank" and not case.in_place
    assert optimizer._path.dirty == pending
    assert same_bits({n: before[n] for n in in_memory}, in_memory) != pending
    assert not same_bits(bits(module), before)


@low_rank_or_dense
@pytest.mark.parametrize("keep_vars", [True, False])
def test_a_checkpoint_taken_in_the_first_forward_is_no_use_of_the_weights(keep_vars, directions):
    case = CASES["mixed"]
    module = case.module()
    optimizer = ZerothOrder(module.named_parameters(), directions=directions, seed=0).attach(module)
    before, slots, calls = bits(module), dict(module.named_parameters()), []

    def closure():
        saved = module.state_dict(keep_vars=keep_vars)
        if keep_vars:  # whoever reads the values of these uses the parameters
            calls.append(all(saved[n] is slots[n] for n in slots))
        else:
            calls.append(same_bits({n: raw(weight) for n, weight in saved.items()}, before))
        return case.loss(module)

    optimizer.step(closure)
    assert calls == [True] * 3
    assert optimizer._path.displacement.in_place == []


@low_rank_or_dense
@pytest.mark.parametrize("keep_vars", [True, False])
def test_a_checkpoint_taken_inside_a_stacked_forward_holds_the_weights(keep_vars, directions):
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    settings = {"smoothing": 0.1, "lr": 0.1, "directions": directions, "probes": "stacked", "seed": 0}
    optimizer = ZerothOrder(module.named_parameters(), **settings).attach(module)
    x = inputs(5, 4, dtype=torch.float32)

    def stacked(copies):
        return module(x.repeat(copies, 1)).square().mean(1)

    optimizer.step(lambda: stacked(1), stacked=stacked)
    assert optimizer.param_groups[0]["stacking"] == "trusted"
    before, saved = bits(module), []

    def save(*args):
        saved.append({n: raw(weight) for n, weight in module.state_dict(keep_vars=keep_vars).items()})

    module[1].register_forward_hook(save)
    optimizer.step(lambda: stacked(1), stacked=stacked)
    assert len(saved) == 1
    assert same_bits(saved[0], before)


# ---- memory ------------------------------------------------------------------------------------------------------------
def chain(depth: int = 12) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)])


def evaluate(optimizer: ZerothOrder, module: nn.Module, stack: bool) -> None:
    """Two steps, with the probes one after the other or, from the end of the first step on, at once."""
    x = inputs(2, 8, dtype=torch.float32)

    def stacked(copies):
        return module(x.repeat(copies, 1)).square().mean(1)

    for _ in range(2):
        optimizer.step(lambda: stacked(1), stacked=stacked if stack else None)
    assert optimizer.param_groups[0]["stacking"] == ("trusted" if stack else "untried")


class Held:
    """How many entries of the tensors that were made are in memory."""

    def __init__(self) -> None:
        self.made: list[tuple[weakref.ref, int]] = []
        self.most = 0

    def entries(self) -> int:
        return sum(entries for storage, entries in self.made if storage() is not None)

    def count(self, make):
        def counted(*args, **kwargs):
            made = make(*args, **kwargs)
            self.made.append((weakref.ref(made.untyped_storage()), made.numel()))
            self.most = max(self.most, self.entries())
            return made

        return counted


in_pieces = pytest.mark.parametrize("rows", [8, 2], ids=["whole", "in pieces"])


def draw_by(rows: int, monkeypatch) -> None:
    """Directions of the chain come by so many rows."""
    monkeypatch.setattr(directions_module, "_BLOCK_CPU", 8 * rows)
    monkeypatch.setattr(dense_path_module, "_BLOCKS_AT_ONCE", 1)


@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("stack", [False, True])
@in_pieces
def test_dense_displaced_weights_are_formed_only_while_they_are_used(q, stack, rows, monkeypatch):
    """At any time the rows that are in use and those that are being formed; none where no module runs."""
    draw_by(rows, monkeypatch)
    module = chain()
    optimizer = ZerothOrder(module.named_parameters(), directions="gaussian", num_directions=q, update="sgd", seed=0)
    optimizer.attach(module)
    held, between = Held(), []
    monkeypatch.setattr(dense_module, "displaced", held.count(dense_module.displaced))
    for layer in module:
        layer.register_forward_hook(lambda *_: between.append(held.entries()))
    evaluate(optimizer, module, stack)
    # each matrix once at each point of both steps; the first step of a stacked run sees its points both ways
    assert sum(entries for _, entries in held.made) == len(module) * 64 * 2 * q * (3 if stack else 2)
    assert 8 * rows <= held.most <= 2 * 8 * rows
    assert set(between) == {0}


def test_low_rank_displaced_weights_are_never_formed(monkeypatch):
    """Where the functions that use them take factors: embedding, convolution, linear layers, in turn and stacked."""

    def never(self, part=0):
        raise AssertionError(f"{self.label} is formed")

    monkeypatch.setattr(ShownMatrix, "value", never)
    for case in CASES.values():
        if not case.formed and not case.in_place:
            module = case.module()
            optimizer = ZerothOrder(module.named_parameters(), directions=LowRank(2, 2), seed=0).attach(module)
            for _ in range(3):
                optimizer.step(lambda case=case, module=module: case.loss(module))
                case.loss(module)
    for stack in (False, True):
        module = chain()
        optimizer = ZerothOrder(module.named_parameters(), num_directions=2, seed=0).attach(module)
        evaluate(optimizer, module, stack)


@pytest.mark.parametrize("family", ["gaussian", "rademacher", "sphere"])
@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("stack", [False, True])
@in_pieces
def test_dense_directions_are_never_whole_in_memory(family, q, stack, rows, monkeypatch):
    draw_by(rows, monkeypatch)
    module = chain()
    optimizer = ZerothOrder(module.named_parameters(), directions=family, num_directions=q, update="sgd", seed=0).attach(module)
    held = Held()
    monkeypatch.setattr(optimizer.directions, "rows", held.count(optimizer.directions.rows))
    evaluate(optimizer, module, stack)
    assert 8 * rows <= held.most <= 3 * 64, "of 12 matrices"
    if family != "sphere" and q == 1:  # the norm of a sphere's and the mean of several directions are taken of whole matrices
        assert held.most <= 3 * 8 * rows
    assert not optimizer.state, "no gradient is stored"


# ---- finding out how parameters are used -------------------------------------------------------------------------------
def test_unused_parameters_are_named():
    module = nn.ModuleDict({"used": nn.Linear(4, 4), "spare": nn.Linear(4, 4)})
    optimizer = ZerothOrder(module.named_parameters(), lr=0.0).attach(module)
    with pytest.warns(
        UserWarning, match=r"2 parameters are not used by the first forward pass; freeze .*: spare.weight, spare.bias"
    ):
        optimizer.step(lambda: module["used"](inputs(2, 4, dtype=torch.float32)).mean())


@every_family
def test_a_module_that_first_runs_later_is_displaced_too(family):
    module = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)}).double()
    settings = {"lr": 0.0, "smoothing": 1e-4, "update": "sgd", "seed": 0}
    optimizer = ZerothOrder(module.named_parameters(), directions=FAMILIES[family](), **settings).attach(module)
    x = inputs(2, 4)
    with pytest.warns(UserWarning, match="not used by the first forward pass"):
        optimizer.step(lambda: module["first"](x).sum())
    optimizer.step(lambda: module["second"](x).sum())
    u = {n: direction(family, n, p, step=1) for n, p in module.named_parameters()}
    expected = (x @ u["second.weight"].T + u["second.bias"]).sum()
    assert optimizer.last.slopes[0] == pytest.approx(float(expected), rel=1e-6)


def test_parameters_used_otherwise_than_through_their_slot_are_named():
    case = CASES["captured"]
    module = case.module()
    optimizer = ZerothOrder(module.named_parameters(), lr=0.0).attach(module)
    with pytest.warns(UserWarning, match=r"1 parameters are used otherwise than .* in place, with a copy: lin.weight$"):
        optimizer.step(lambda: case.loss(module))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.formed])
def test_matrices_that_factors_cannot_reach_are_named_once(name):
    case = CASES[name]
    module = case.module()
    optimizer = ZerothOrder(module.named_parameters(), lr=0.0, interval=2).attach(module)
    what = "used by functions that a low-rank direction cannot follow, and displaced as a whole in each forward"
    with pytest.warns(UserWarning, match=f"^{len(case.formed)} parameters are {what}: ") as caught:
        optimizer.step(lambda: case.loss(module))
    assert len(caught) == 1
    assert sorted(str(caught[0].message).split(": ")[1].split(", ")) == sorted(case.formed)
    for _ in range(3):  # into another interval; a warning would be an error
        optimizer.step(lambda: case.loss(module))


def test_long_lists_of_names_are_cut():
    module = nn.ModuleList([nn.Linear(2, 2) for _ in range(5)])
    with pytest.warns(
        UserWarning, match=r"10 parameters are not used .*: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 5 more"
    ):
        displacement(module).observe(lambda: None)


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.kept = [self.lin.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for w in (self.lin.weight, self.kept[0]):
            assert w.shape == (4, 4)
            assert w.size(0) == len(w) == w.dim() + 2
            assert w.requires_grad
            assert w.numel() == 16
        return self.lin(x.to(device=w.device, dtype=w.dtype))


def test_reading_metadata_is_not_a_use():
    module = Asks()
    moved = displacement(module)
    moved.observe(lambda: module(torch.ones(2, 4)))
    assert moved.in_place == []
    assert moved.uses == {module.lin.weight: [F.linear], module.lin.bias: [F.linear]}


@every_family
def test_stand_ins_have_the_metadata_of_the_weights(family):
    module = Asks()
    with displacement(module).at(stand_ins(module, family, 0.1)):
        module(torch.ones(2, 4))


every_use = pytest.mark.parametrize(
    "use",
    [
        lambda w, x: F.linear(x, w),
        lambda w, x: x @ w.T,
        lambda w, x: torch.cat([w, x]).sum(),
        lambda w, x: torch.einsum("ij,kj->ik", x, w),
        lambda w, x: x + w.data[0],
        lambda w, x: x * w.norm(),
        lambda w, x: torch.stack(tensors=[w[0], x[0]]),
    ],
)


@every_use
@every_family
def test_every_kind_of_outside_use_is_seen(use, family):
    """Of a parameter that was taken from its slot before."""
    module = nn.Linear(4, 4).double()
    w, x = module.weight, inputs(4, 4)
    moved = displacement(module)
    with (
        pytest.warns(UserWarning, match=r"1 parameters are not used by the first forward pass.*: bias$"),
        pytest.warns(UserWarning, match=r"1 parameters are used otherwise than as their module's attribute.*: weight$"),
    ):
        at_rest = moved.observe(lambda: use(w, x))
    assert sorted(moved.in_place) == ["bias", "weight"]
    expected = use(displaced(module, family, 0.5)["weight"], x)
    with torch.no_grad(), moved.at(stand_ins(module, family, 0.5)):
        seen = use(w, x)
        assert module.weight is w, "every use of it sees the same"
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-14)
    assert not torch.equal(seen, at_rest)


@every_use
@every_family
def test_every_kind_of_use_of_an_attribute_is_displaced(use, family):
    """Also outside of the module's forward."""
    module = nn.Linear(4, 4).double()
    untouched, x = Untouched(module), inputs(4, 4)
    moved = displacement(module)
    with pytest.warns(UserWarning, match=r"1 parameters are not used by the first forward pass.*: bias$"):
        at_rest = moved.observe(lambda: use(module.weight, x))
    assert moved.in_place == ["bias"]
    assert torch.equal(at_rest, use(module.weight, x))
    expected = use(displaced(module, family, 0.5)["weight"], x)
    with torch.no_grad(), moved.at(stand_ins(module, family, 0.5)):
        seen = use(module.weight, x)
        assert type(seen) is Tensor
        assert torch.equal(raw(untouched.slots["weight"]), untouched.memory["weight"])
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-13)
    assert not torch.equal(seen, at_rest)
    untouched.check()
    untouched.check_bits()


def test_a_foreign_parameter_is_refused():
    module, other = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = ZerothOrder([*module.named_parameters(), ("other.weight", other.weight), ("other.bias", other.bias)])
    with pytest.raises(ValueError, match=r"that the attached module does not own: other.weight, other.bias; attach the module"):
        optimizer.attach(module)
    optimizer.attach(nn.ModuleList([module, other]))


@every_family
def test_attaching_a_wrapper_works(family):
    inner = CASES["called_twice"].module()
    outer = nn.Sequential(inner)
    settings = {"lr": 0.0, "smoothing": 1e-4, "update": "sgd", "seed": 0}
    optimizer = ZerothOrder(inner.named_parameters(), directions=FAMILIES[family](), **settings).attach(outer)
    optimizer.step(lambda: CASES["called_twice"].loss(outer))
    alone = ZerothOrder(inner.named_parameters(), directions=FAMILIES[family](), **settings).attach(inner)
    alone.step(lambda: CASES["called_twice"].loss(inner))
    assert optimizer.last.slopes == alone.last.slopes
