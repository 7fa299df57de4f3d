"""Displaced weights in the forward pass, and no trace of them afterwards."""

from __future__ import annotations

import signal
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optim.reference import bits, loss_at, raw, same_bits
from tests.optim.zoo import CASES, Case, Mixed, inputs
from zo_lightning.optim import Address, Displacement, Gaussian, ZerothOrder
from zo_lightning.optim.interrupts import deferred_interrupt

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_case = pytest.mark.parametrize("name", CASES)
attached = pytest.mark.parametrize("attach", [True, False], ids=["scratch", "in_place"])
ignore_in_place = pytest.mark.filterwarnings("ignore:.*used outside the forward:UserWarning")


def direction(name: str, parameter: torch.Tensor) -> torch.Tensor:
    return Gaussian().draw(Address(0, 0, name), parameter.shape, parameter.device)


def displacement(module: nn.Module, attach: bool = True) -> Displacement:
    return Displacement(dict(module.named_parameters()), module if attach else None)


def shift(module: nn.Module, tau: float):
    """``W + τu`` in float32 or wider, rounded to the weight's dtype."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return lambda parameter: (parameter.detach() + tau * direction(names[parameter], parameter)).to(parameter.dtype)


def displaced(module: nn.Module, tau: float) -> dict[str, torch.Tensor]:
    return {name: shift(module, tau)(parameter) for name, parameter in module.named_parameters()}


def assert_untouched(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """The very same Parameter objects in their slots, and no hook left."""
    now = dict(module.named_parameters())
    assert now.keys() == parameters.keys()
    assert all(now[name] is parameters[name] for name in now)
    for submodule in module.modules():
        hooks = (submodule._forward_hooks, submodule._forward_pre_hooks, submodule._forward_hooks_always_called)
        assert not any(hooks), submodule


# ---- what the forward sees ---------------------------------------------------------------------------------------------
@every_case
@attached
@ignore_in_place
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_forwards_see_the_displaced_weights_and_nothing_stays(name, attach, dtype):
    case = CASES[name]
    module = case.module(dtype)
    before, parameters = bits(module), dict(module.named_parameters())
    moved = displacement(module, attach)
    # the copy's tensors lie elsewhere in memory, and torch leaves its fused attention while a module has hooks
    tolerance = {"rtol": 0, "atol": 1e-2 if dtype is torch.bfloat16 else 1e-12}
    with torch.no_grad():
        if attach:
            torch.testing.assert_close(moved.observe(lambda: case.loss(module)), loss_at(module, {}, case.loss), **tolerance)
            assert sorted(moved.in_place) == sorted(case.in_place)
        else:
            assert sorted(moved.in_place) == sorted(parameters)
        seen = {}
        for tau in (0.1, -0.1, 0.3):
            with moved.at(shift(module, tau)):
                seen[tau] = case.loss(module)
            assert same_bits(bits(module), before)
            assert_untouched(module, parameters)
        with moved.at():
            seen[0] = case.loss(module)
        torch.testing.assert_close(case.loss(module), seen[0], **tolerance)
        assert_untouched(module, parameters)
    for tau, loss in seen.items():
        weights = displaced(module, tau) if tau else {}
        torch.testing.assert_close(loss, loss_at(module, weights, case.loss), **tolerance)
    assert len({float(loss) for loss in seen.values()}) == 4


@every_case
@attached
@ignore_in_place
def test_the_slope_is_the_directional_derivative(name, attach):
    case = CASES[name]
    module = case.module()
    parameters = dict(module.named_parameters())
    with torch.enable_grad():
        gradients = torch.autograd.grad(case.loss(module), list(parameters.values()))
    expected = sum((g * direction(n, g).double()).sum() for (n, _), g in zip(parameters.items(), gradients, strict=True))
    optimizer = ZerothOrder(module.named_parameters(), lr=0.0, smoothing=1e-4, directions="gaussian", update="sgd", seed=0)
    if attach:
        optimizer.attach(module)
    optimizer.step(lambda: case.loss(module))
    assert optimizer.last.slopes[0] == pytest.approx(float(expected), rel=1e-5, abs=1e-8)
    # and each parameter alone: none is left out, none counted twice
    for (n, parameter), g in zip(parameters.items(), gradients, strict=True):
        alone = ZerothOrder([(n, parameter)], lr=0.0, smoothing=1e-4, directions="gaussian", update="sgd", seed=0)
        if attach:
            alone.attach(module)
        alone.step(lambda: case.loss(module))
        assert alone.last.slopes[0] == pytest.approx(float((g * direction(n, g).double()).sum()), rel=1e-5, abs=1e-8), n


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


def test_tied_weights_are_the_same_tensor_at_every_use():
    case = CASES["tied_head"]
    module = case.module()
    seen = []
    module.emb.register_forward_hook(lambda m, *_: seen.append(m.weight.clone()))
    module.head.register_forward_hook(lambda m, *_: seen.append(m.weight.clone()))
    moved = displacement(module)
    moved.observe(lambda: case.loss(module))
    with moved.at(shift(module, 0.5)):
        case.loss(module)
    at_rest, displaced_pair = seen[:2], seen[2:]
    assert torch.equal(*at_rest)
    assert torch.equal(*displaced_pair)
    assert not torch.equal(at_rest[0], displaced_pair[0])
    for hooked in (module.emb, module.head):
        assert len(hooked._forward_hooks) == 1, "the user's own hooks stay"


@pytest.mark.parametrize("dtype", DTYPES)
@attached
def test_every_dtype_is_bit_exact(dtype, attach):
    case = CASES["mixed"]
    module = case.module(dtype)
    with torch.no_grad():  # values whose sums with a displacement round, cancel or change exponent; and a negative zero
        module.head.weight.copy_(torch.tensor([1e-7, -3.0, 0.33325195, -0.0]).repeat(3, 1))
    before = bits(module)
    for direction_family in ("low_rank", "gaussian", "rademacher", "sphere"):
        optimizer = ZerothOrder(module.named_parameters(), smoothing=0.37, directions=direction_family, update="sgd", seed=0)
        if attach:
            optimizer.attach(module)
        with pytest.warns(UserWarning, match="the update is skipped"):
            optimizer.step(lambda: case.loss(module) * float("nan"))
        assert same_bits(bits(module), before)


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
        return x @ self.weight


def failing(error, at_call: int) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.Sequential(nn.LayerNorm(4), Fails(error, at_call))
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), middle, nn.BatchNorm1d(4), nn.Linear(4, 2))


@attached
@pytest.mark.parametrize("at_call", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, "ctrl-c"])
def test_an_exception_in_the_middle_of_a_forward_leaves_no_trace(error, at_call, attach):
    module = failing(error, at_call)
    parameters = dict(module.named_parameters())
    optimizer = ZerothOrder(module.named_parameters(), smoothing=0.1, lr=0.1, seed=0)
    if attach:
        optimizer.attach(module)
    x = inputs(5, 4, dtype=torch.float32)

    def closure():
        return module(x).square().mean()

    if at_call > (3 if attach else 2):  # a step has two forwards, the first one another for observing
        optimizer.step(closure)
    before = bits(module)
    with pytest.raises(KeyboardInterrupt if error == "ctrl-c" else error):
        optimizer.step(closure)
    now = bits(module)
    if not attach:  # only a module's buffers can be put back
        before, now = ({n: t for n, t in x.items() if n in parameters} for x in (before, now))
    assert same_bits(now, before)
    assert_untouched(module, parameters)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    optimizer.step(closure)  # and it goes on
    assert not same_bits(bits(module), before)


@attached
def test_a_failing_shift_leaves_no_trace(attach):
    module = Mixed()
    before, parameters = bits(module), dict(module.named_parameters())
    moved = displacement(module, attach)
    calls = []

    def broken(parameter):
        calls.append(parameter)
        if len(calls) == 4:
            raise MemoryError("no room for the scratch weight")
        return parameter.detach() + 1

    with pytest.raises(MemoryError), moved.at(broken):
        CASES["mixed"].loss(module)
    assert same_bits(bits(module), before)
    assert_untouched(module, parameters)


def test_a_closure_that_survives_an_error_sees_the_same_weights_again():
    module = Case(lambda: nn.Linear(4, 4)).module()
    moved = displacement(module)
    x = inputs(3, 4)
    moved.observe(lambda: module(x))
    with moved.at(shift(module, 0.2)):
        with pytest.raises(RuntimeError):
            module(inputs(3, 5))
        assert isinstance(module.weight, nn.Parameter)
        again = module(x)
    torch.testing.assert_close(again, loss_at(module, displaced(module, 0.2), lambda m: m(x)), rtol=1e-12, atol=1e-12)


def test_an_interrupt_while_the_update_is_written_waits_until_all_of_it_is(monkeypatch):
    case = CASES["mixed"]
    whole, interrupted = case.module(), case.module()

    def optimizer(module):
        return ZerothOrder(module.named_parameters(), lr=0.1, smoothing=0.01, seed=0).attach(module)

    expected = optimizer(whole)
    expected.step(lambda: case.loss(whole))
    other = optimizer(interrupted)
    write = ZerothOrder._write

    def write_and_interrupt(self, *args):
        signal.raise_signal(signal.SIGINT)
        write(self, *args)

    monkeypatch.setattr(ZerothOrder, "_write", write_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        other.step(lambda: case.loss(interrupted))
    assert same_bits(bits(interrupted), bits(whole))
    assert other.step_index == 1, "the step's index moves on with the weights"


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
@ignore_in_place
def test_a_checkpoint_taken_between_forwards_holds_the_weights(name):
    case = CASES[name]
    module = case.module(torch.float32)
    optimizer = ZerothOrder(module.named_parameters(), smoothing=0.1, lr=0.1, seed=0).attach(module)
    optimizer.step(lambda: case.loss(module))
    before = bits(module)
    compared = []

    def compare():
        saved = module.state_dict()
        compared.append({name for name in before if not torch.equal(raw(saved[name]), before[name])})

    def closure():
        compare()
        loss = case.loss(module)
        compare()
        return loss

    optimizer.step(closure)
    assert len(compared) == 4
    assert all(different <= set(case.in_place) for different in compared)


def test_weights_of_modules_that_are_not_running_are_at_rest():
    """At most one module of a chain holds scratch weights at any time."""
    module = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])
    held = []
    for layer in module:
        layer.register_forward_hook(lambda *_: held.append(sum(not isinstance(m.weight, nn.Parameter) for m in module)))
    optimizer = ZerothOrder(module.named_parameters()).attach(module)
    optimizer.step(lambda: module(inputs(2, 4, dtype=torch.float32)).mean())
    assert set(held) == {1}


@pytest.mark.parametrize("family", ["gaussian", "rademacher", "sphere"])
@pytest.mark.parametrize("q", [1, 3])
def test_dense_directions_are_never_whole_in_memory(family, q):
    module = nn.Sequential(*[nn.Linear(8, 8) for _ in range(12)])
    optimizer = ZerothOrder(module.named_parameters(), directions=family, num_directions=q, update="sgd", seed=0).attach(module)
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0
    draw = optimizer.directions.draw

    def counted(*args):
        nonlocal most
        z = draw(*args)
        alive.add(z.untyped_storage())
        alive.add(z)
        most = max(most, sum(isinstance(x, torch.Tensor) for x in alive))
        return z

    optimizer.directions.draw = counted
    for _ in range(2):
        optimizer.step(lambda: module(inputs(2, 8, dtype=torch.float32)).mean())
    assert 1 <= most <= 3, "24 parameters"
    assert not optimizer.state, "no gradient is stored"


# ---- finding out how parameters are used -------------------------------------------------------------------------------
def test_unused_parameters_are_named():
    module = nn.ModuleDict({"used": nn.Linear(4, 4), "spare": nn.Linear(4, 4)})
    optimizer = ZerothOrder(module.named_parameters(), lr=0.0).attach(module)
    with pytest.warns(
        UserWarning, match=r"2 parameters are not used by the first forward pass; freeze .*: spare.weight, spare.bias"
    ):
        optimizer.step(lambda: module["used"](inputs(2, 4, dtype=torch.float32)).mean())


def test_a_module_that_first_runs_later_is_displaced_too():
    module = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)}).double()
    optimizer = ZerothOrder(module.named_parameters(), lr=0.0, smoothing=1e-4, directions="gaussian", update="sgd", seed=0)
    optimizer.attach(module)
    x = inputs(2, 4)
    with pytest.warns(UserWarning, match="not used by the first forward pass"):
        optimizer.step(lambda: module["first"](x).sum())
    optimizer.step(lambda: module["second"](x).sum())
    u = {n: Gaussian().draw(Address(0, 1, n), p.shape, p.device).double() for n, p in module.named_parameters()}
    expected = (x @ u["second.weight"].T + u["second.bias"]).sum()
    assert optimizer.last.slopes[0] == pytest.approx(float(expected), rel=1e-6)


def test_parameters_used_outside_their_module_are_named():
    module = CASES["functional_head"].module()
    optimizer = ZerothOrder(module.named_parameters(), lr=0.0).attach(module)
    with pytest.warns(UserWarning, match=r"1 parameters are used outside .* in place, with a copy: emb.weight"):
        optimizer.step(lambda: CASES["functional_head"].loss(module))


def test_long_lists_of_names_are_cut():
    module = nn.ModuleList([nn.Linear(2, 2) for _ in range(5)])
    with pytest.warns(
        UserWarning, match=r"10 parameters are not used .*: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 5 more"
    ):
        displacement(module).observe(lambda: None)


def test_reading_metadata_is_not_a_use():
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w = self.lin.weight
            assert w.shape == (4, 4)
            assert w.size(0) == len(w) == w.dim() + 2
            assert w.requires_grad
            assert w.numel() == 16
            return self.lin(x.to(device=w.device, dtype=w.dtype))

    module = Asks()
    moved = displacement(module)
    moved.observe(lambda: module(torch.ones(2, 4)))
    assert moved.in_place == []


@pytest.mark.parametrize(
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
def test_every_kind_of_outside_use_is_seen(use):
    module = nn.Linear(4, 4).double()
    x = inputs(4, 4)
    moved = displacement(module)
    with pytest.warns(UserWarning, match=r"not used by the first forward pass.*: bias|forward of the module that owns them"):
        at_rest = moved.observe(lambda: use(module.weight, x))
    assert "weight" in moved.in_place
    with torch.no_grad(), moved.at(shift(module, 0.5)):
        seen = use(module.weight, x)
    assert torch.equal(seen, use(displaced(module, 0.5)["weight"], x))
    assert not torch.equal(seen, at_rest)


def test_a_foreign_parameter_is_refused():
    module, other = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = ZerothOrder([*module.named_parameters(), ("other.weight", other.weight), ("other.bias", other.bias)])
    with pytest.raises(ValueError, match=r"that the attached module does not own: other.weight, other.bias; attach the module"):
        optimizer.attach(module)
    optimizer.attach(nn.ModuleList([module, other]))


def test_attaching_a_wrapper_works():
    inner = CASES["called_twice"].module()
    outer = nn.Sequential(inner)
    settings = {"lr": 0.0, "smoothing": 1e-4, "directions": "gaussian", "update": "sgd", "seed": 0}
    optimizer = ZerothOrder(inner.named_parameters(), **settings).attach(outer)
    optimizer.step(lambda: CASES["called_twice"].loss(outer))
    alone = ZerothOrder(inner.named_parameters(), **settings).attach(inner)
    alone.step(lambda: CASES["called_twice"].loss(inner))
    assert optimizer.last.slopes == alone.last.slopes
