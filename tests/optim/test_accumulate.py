"""Steps of several parts of a batch, at the optimizer: the same as one step on the joint batch."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.optim.reference import LAWS
from zo_lightning.optim import ParameterFree, ZerothOrder

STEPS = 4


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def data(rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = torch.Generator().manual_seed(4)
    make = {"generator": source, "dtype": torch.float64}
    return [(torch.randn(rows, 5, **make), torch.randn(rows, 3, **make)) for _ in range(STEPS)]


def losses(module, batch) -> torch.Tensor:
    x, y = batch
    return (module(x) - y).square().mean(1)


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def parts(batch, sizes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(*(tensor.split(sizes) for tensor in batch), strict=True))


def train(sizes, per_example=True, gap=None, **arguments):
    """Steps whose batches come in parts of the given sizes; returns the module, the optimizer, and each step's report."""
    module = model()
    settings = {"lr": 0.05, "smoothing": 0.01, "seed": 0, **arguments}
    optimizer = ZerothOrder(module.named_parameters(), **settings).attach(module)
    reports, returned = [], []
    for number, batch in enumerate(data(sum(sizes))):
        *first, last = parts(batch, sizes)

        def closure(part):
            return lambda: losses(module, part) if per_example else losses(module, part).mean()

        for count, part in enumerate(first):
            assert optimizer.progress == (number, count)
            returned.append(float(optimizer.accumulate(closure(part))))
        if gap == "apart":  # the last part as all others, and the step without a closure
            optimizer.accumulate(closure(last))
            optimizer.step()
        else:
            optimizer.step(closure(last))
        assert optimizer.progress == (number + 1, 0)
        reports.append(optimizer.last)
    optimizer.detach()
    return module, optimizer, reports, returned


FAMILIES = {
    "low-rank": {},
    "dense": {"directions": "rademacher"},
    "several": {"num_directions": 3, "momentum": 0.5},
    "one-sided": {"sides": 1, "directions": "gaussian"},
}


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("gap", [None, "apart"])
def test_parts_make_the_step_of_the_joint_batch(settings, gap):
    together, a, whole, _ = train([12], **settings)
    split, b, several, _ = train([4, 4, 4], gap=gap, **settings)
    torch.testing.assert_close(weights(split), weights(together), rtol=1e-9, atol=1e-9)
    for one, other in zip(whole, several, strict=True):
        assert other.slopes == pytest.approx(one.slopes, rel=1e-9)
        assert other.loss == pytest.approx(one.loss, rel=1e-12)
        assert other.gain == pytest.approx(one.gain, rel=1e-9)  # over all examples
    probes = (a.forwards - 1) / STEPS
    assert b.forwards - 1 == 3 * probes * STEPS
    assert [report.forwards for report in several][1:] == [3 * probes] * (STEPS - 1)
    assert not torch.equal(weights(together), weights(model()))


@LAWS
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_examples_weigh_the_same_in_parts_of_any_size(sizes):
    together, *_ = train([sum(sizes)])
    split, *_ = train(sizes)
    torch.testing.assert_close(weights(split), weights(together), rtol=1e-9, atol=1e-9)


def test_losses_of_whole_parts_weigh_the_same():
    """As with gradients in Lightning: the mean over the parts."""
    _, _, reports, returned = train([2, 6], per_example=False)
    module = model()
    first, last = (float(losses(module, part).mean().detach()) for part in parts(data(8)[0], [2, 6]))
    assert reports[0].loss == pytest.approx((first + last) / 2, rel=1e-3)  # but for the distance of the probes
    assert returned[0] == pytest.approx(first, rel=1e-3)


def test_the_rule_is_asked_once_per_step_and_the_centre_is_that_of_all_parts():
    """The calibration is the first part's, which is here what each part is; from then on all of the batch counts."""

    def rule_of(sizes, repeat):
        module, rule = model(), ParameterFree(STEPS, interval=2)
        optimizer = ZerothOrder(module.named_parameters(), step_rule=rule, seed=0).attach(module)
        for number, batch in enumerate(data(8)):
            given = [parts(batch, [4, 4])[0]] * 2 if number == 0 else parts(batch, [4, 4])
            if repeat:
                given = [tuple(torch.cat(each) for each in zip(*given, strict=True))]
            for part in given[:-1]:
                optimizer.accumulate(lambda part=part: losses(module, part))
            optimizer.step(lambda part=given[-1]: losses(module, part))
            assert (optimizer.last.curvature is not None) == (number % 2 == 0)
        optimizer.detach()
        return module, rule

    (split, first), (together, second) = rule_of([4, 4], False), rule_of([4, 4], True)
    torch.testing.assert_close(weights(split), weights(together), rtol=1e-6, atol=1e-6)
    left, right = first.state_dict(), second.state_dict()
    assert left.pop("reference") is right.pop("reference") is None
    assert left == pytest.approx(right, rel=1e-6)


def test_the_weights_do_not_move_before_the_step():
    module = model()
    optimizer = ZerothOrder(module.named_parameters(), lr=0.05).attach(module)
    before = weights(module)
    for batch in data(4):
        optimizer.accumulate(lambda batch=batch: losses(module, batch))
        with torch.no_grad():
            assert float(losses(module, batch).mean()) == float(losses(model(), batch).mean())
    assert torch.equal(weights(module), before)
    assert optimizer.progress == (0, STEPS)
    optimizer.step()
    optimizer.fold()
    assert not torch.equal(weights(module), before)


def test_a_step_without_anything_gathered_needs_a_closure():
    with pytest.raises(TypeError, match=r"step needs a closure that evaluates the loss"):
        ZerothOrder(model().named_parameters()).step()


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_a_state_in_the_middle_of_a_step_goes_on_exactly(settings):
    def make():
        module = model()
        return module, ZerothOrder(
            module.named_parameters(), step_rule=ParameterFree(STEPS, interval=2), seed=0, **settings
        ).attach(module)

    def go(module, optimizer, numbers):
        for number in numbers:
            batch = data(4)[number // 3]
            optimizer.accumulate(lambda batch=batch, by=1 + number % 3: by * losses(module, batch))
            if number % 3 == 2:
                optimizer.step()

    straight, first = make()
    go(straight, first, range(12))
    for stop in (1, 5, 8, 10):
        module, optimizer = make()
        go(module, optimizer, range(stop))
        state, values = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(module.state_dict())
        assert state["gathered"]["parts"] == stop % 3
        again, other = make()
        again.load_state_dict(values)
        other.load_state_dict(state)
        assert other.progress == (stop // 3, stop % 3)
        go(again, other, range(stop, 12))
        assert other.state_dict()["step_rule"] == first.state_dict()["step_rule"]
        assert other.forwards == first.forwards
        if stop % 3 == 0:  # nothing was in between
            assert "gathered" not in state
        torch.testing.assert_close(again.state_dict(), straight.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_part_skips_the_step(bad):
    module = model()
    optimizer = ZerothOrder(module.named_parameters(), lr=0.05, seed=0).attach(module)
    before = weights(module)
    batch = data(4)[0]
    optimizer.accumulate(lambda: losses(module, batch) * bad)
    with pytest.warns(UserWarning, match=r"step 0: the loss is (nan|inf); the update is skipped"):
        optimizer.step(lambda: losses(module, batch))
    assert not optimizer.last.finite
    assert torch.equal(weights(module), before)
    optimizer.step(lambda: losses(module, batch))  # of a batch of its own
    assert optimizer.last.finite
    assert optimizer.last.forwards == 2


def test_a_part_that_fails_leaves_the_others():
    """The step is that of the parts that went well."""
    first, third = parts(data(4)[0], [2, 2])

    def end(fails: bool) -> torch.Tensor:
        module = model()
        optimizer = ZerothOrder(module.named_parameters(), lr=0.05, seed=0).attach(module)
        optimizer.accumulate(lambda: losses(module, first))
        if fails:
            with pytest.raises(ZeroDivisionError):
                optimizer.accumulate(lambda: 1 / 0)
            assert optimizer.progress == (0, 1)
        optimizer.step(lambda: losses(module, third))
        optimizer.detach()
        return weights(module)

    assert torch.equal(end(True), end(False))
