"""The parameter-free rule: its formulas by hand, its calibration on known curvatures, and that it is the rule that trains."""

from __future__ import annotations

import copy
import json
import math
import statistics
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.optim.reference import LAWS, bits, same_bits
from zo_lightning.optim import LMO, CalibrationError, ParameterFree, Probe, StepReport, ZerothOrder


class Landscape(Probe):
    """Losses along fresh directions, given as functions of the signed distance."""

    def __init__(self, base: float, *along: Callable[[float], float]) -> None:
        self.base, self.along, self.forwards = base, along, 0

    def loss(self) -> float:
        self.forwards += 1
        return self.base

    def pair(self, direction: int, smoothing: float) -> tuple[float, float]:
        self.forwards += 2
        f = self.along[direction % len(self.along)]
        return self.base + f(smoothing), self.base + f(-smoothing)


def parabola(curvature: float, slope: float = 0.0) -> Callable[[float], float]:
    return lambda t: slope * t + curvature / 2 * t * t


def report(step: int, loss: float, curvature: float | None = None, finite: bool = True) -> StepReport:
    return StepReport(step=step, loss=loss, slopes=[0.0], gain=0.0, curvature=curvature, finite=finite)


class Hand:
    """The formulas written from the lists of everything seen."""

    def __init__(self, n, *, f_low, eta, schedule, t0, base, curvatures, share) -> None:
        self.n, self.f_low, self.eta, self.schedule, self.t0 = n, f_low, eta, schedule, t0
        self.curvatures, self.losses, self.share = list(curvatures), [base], share

    def moments(self, count: int) -> tuple[float, float]:
        """Weighted mean and variance of the first losses: equal weights for fifty, then a memory of fifty."""
        weights: list[float] = []
        for k in range(1, count + 1):
            newest = max(1 / k, 0.02)
            weights = [w * (1 - newest) for w in weights] + [newest]
        mean = sum(w * x for w, x in zip(weights, self.losses, strict=False))
        return mean, sum(w * (x - mean) ** 2 for w, x in zip(weights, self.losses, strict=False))

    def sizes(self, t: int) -> tuple[float, float]:
        curvature = statistics.fmean(self.curvatures)
        mean, variance = self.moments(len(self.losses))
        gap = mean - self.f_low
        attainable = self.share * gap
        if len(self.losses) >= 50:
            fallen = self.moments(50)[0] - mean - math.sqrt(variance / 50)
            attainable = min(gap, max(attainable, 2 * fallen))
        n = self.n if self.n is not None else t + self.t0
        gamma = math.sqrt(2 * attainable / (n * curvature))
        if self.n is not None and self.schedule == "linear":
            gamma *= math.sqrt(3) * max(0.0, 1 - t / n)
        return gamma, math.sqrt(2 * self.eta * gap / curvature)


# ---- the formulas ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [200, None])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("f_low", [0.0, -1.5])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_gamma_and_tau_by_hand(n, schedule, f_low, share):
    settings = {"probe_rise": 0.02, "interval": 7, "schedule": schedule, "unknown_horizon": 30, "attainable": share}
    rule = ParameterFree(n, f_low=f_low, **settings)
    curvatures = [3.0, 5.0, 4.0]
    probe = Landscape(2.0, *map(parabola, curvatures))
    hand = Hand(n, f_low=f_low, eta=0.02, schedule=schedule, t0=30, base=2.0, curvatures=curvatures, share=share)
    noise = torch.Generator().manual_seed(0)
    shares = set()
    for t in range(150):
        wanted = rule.before_step(t, probe)
        assert wanted == (t % 7 == 0)
        gamma, tau = hand.sizes(t)
        assert rule.step_size == pytest.approx(gamma, rel=1e-9)
        assert rule.smoothing == pytest.approx(tau, rel=1e-9)
        shares.add(round(rule.attainable_gap / rule.gap, 3))
        loss, curvature = 2.0 / (1 + t / 50) + 0.1 * torch.rand((), generator=noise).item(), None
        if wanted:
            curvature = 4 * torch.randn((), generator=noise).item()  # half of them negative: clipped, and counted
            hand.curvatures.append(max(0.0, curvature))
        hand.losses.append(loss)
        rule.after_step(report(t, loss, curvature))
    assert rule.curvature == pytest.approx(statistics.fmean(hand.curvatures))
    assert min(shares) == share
    assert (len(shares) > 1) == (share < 1), "the fall of the loss was large enough to count"


def test_a_small_example_in_plain_numbers():
    rule = ParameterFree(100, schedule="constant", interval=1, attainable=1.0)
    rule.before_step(0, Landscape(8.0, parabola(4.0)))
    assert rule.curvature == pytest.approx(4.0)
    assert rule.gap == 8.0
    assert rule.step_size == pytest.approx(math.sqrt(2 * 8 / (100 * 4)))  # 0.2
    assert rule.smoothing == pytest.approx(math.sqrt(2 * 0.01 * 8 / 4))  # 0.2: a rise of 4/2 · 0.04 = 0.08 = 1 % of 8
    rule.after_step(report(0, 6.0, 12.0))
    assert rule.gap == 7.0
    rule.before_step(1, Landscape(8.0))
    assert rule.attainable_gap == 7.0
    assert ParameterFree(100).attainable == 0.1
    tenth = ParameterFree(100, schedule="constant")
    tenth.before_step(0, Landscape(8.0, parabola(4.0)))
    assert tenth.step_size == pytest.approx(math.sqrt(2 * 0.1 * 8 / (100 * 4)))
    assert tenth.smoothing == pytest.approx(0.2), "the smoothing follows the whole gap"
    assert rule.curvature == pytest.approx((4 + 4 + 4 + 12) / 4)


def test_the_linear_schedule_ends_at_zero_and_keeps_the_sum_of_squares():
    n = 1000
    squares = {}
    for schedule in ("linear", "constant"):
        rule = ParameterFree(n, schedule=schedule, attainable=1.0)
        rule.before_step(0, Landscape(1.0, parabola(1.0)))
        squares[schedule] = 0.0
        for t in range(n):
            rule.before_step(t, Landscape(1.0))
            squares[schedule] += rule.step_size**2
    assert squares["constant"] == pytest.approx(2.0)
    assert squares["linear"] == pytest.approx(squares["constant"], rel=2 / n)
    rule.before_step(n, Landscape(1.0))
    assert rule.step_size > 0  # of the constant one
    late = ParameterFree(10)
    late.before_step(0, Landscape(1.0, parabola(1.0)))
    for t in (10, 11, 500):
        late.before_step(t, Landscape(1.0))
        assert late.step_size == 0, "steps past the horizon do not move"


@LAWS
@given(st.integers(1, 10**6), st.integers(2, 100))
def test_gamma_goes_with_one_over_the_root_of_the_horizon(n, factor):
    def gamma(horizon):
        rule = ParameterFree(horizon)
        rule.before_step(0, Landscape(2.5, parabola(3.0)))
        return rule.step_size, rule.smoothing

    (a, tau), (b, same) = gamma(n), gamma(n * factor)
    assert a / b == pytest.approx(math.sqrt(factor))
    assert tau == same


def test_an_unknown_horizon_grows_with_the_steps():
    rule = ParameterFree(None, attainable=1.0)  # t₀ = 1000, and no decay though "linear" is the default
    rule.before_step(0, Landscape(2.0, parabola(1.0)))
    assert rule.step_size == pytest.approx(math.sqrt(4 / 1000))
    rule.before_step(3000, Landscape(2.0))
    assert rule.step_size == pytest.approx(math.sqrt(4 / 4000))


# ---- calibration -------------------------------------------------------------------------------------------------------
@LAWS
@given(st.integers(-40, 40), st.floats(0.01, 1000), st.floats(-3, 3), st.sampled_from([0.001, 0.01, 0.3]))
def test_calibration_finds_the_curvature_of_a_quadratic(exponent, base, slope, eta):
    curvature = 2.0**exponent
    rule = ParameterFree(100, probe_rise=eta)
    probe = Landscape(base, parabola(curvature, slope * math.sqrt(curvature * base)))
    rule.before_step(0, probe)
    if eta * base <= curvature / 2 * 2.0**-28:  # already the first τ is wide enough
        return
    assert rule.curvature == pytest.approx(curvature, rel=1e-9)
    assert curvature / 2 * rule.smoothing**2 == pytest.approx(eta * base, rel=1e-9)
    assert probe.forwards <= 1 + 6 * 21


def test_calibration_takes_the_median_over_three_directions():
    rule = ParameterFree(100)
    rule.before_step(0, Landscape(1.0, parabola(1e-9), parabola(2.0), parabola(50.0)))
    assert rule.curvature == pytest.approx((1e-9 + 2 + 50) / 3)
    # a τ of a power of two at which the median rise is above 1 %: 2 τ²/2 ≥ 0.01 from τ = 1/8 on
    rises: list[float] = []
    spy = Landscape(1.0, parabola(1e-9), parabola(2.0), lambda t: rises.append(abs(t)) or 25 * t * t)
    ParameterFree(100).before_step(0, spy)
    assert max(rises) == 2.0**-2
    assert 2.0**-3 in rises, "halved once"


def test_calibration_clips_negative_curvatures():
    rule = ParameterFree(100)
    rule.before_step(0, Landscape(1.0, parabola(-8.0), parabola(2.0), parabola(4.0)))
    assert rule.curvature == pytest.approx(2.0)


def test_a_loss_that_every_change_lowers_is_calibrated_by_the_size_of_its_change():
    """τ²/2 ≥ 0.01 first at τ = 2**-2 (×4 from 2**-14), where the quotient has the size of the curvature."""
    rule = ParameterFree(100)
    rule.before_step(0, Landscape(1.0, parabola(-1.0)))
    assert rule.curvature == pytest.approx(1.0)
    assert rule.smoothing == pytest.approx(math.sqrt(2 * 0.01 * 1.0 / 1.0))


@pytest.mark.parametrize("overflow", [math.inf, math.nan])
def test_a_loss_that_is_lowered_until_it_overflows_is_calibrated_likewise(overflow):
    rule = ParameterFree(100)
    rule.before_step(0, Landscape(1.0, lambda t: -t * t / 2 if abs(t) < 1 else overflow))
    assert rule.curvature == pytest.approx(1.0)


@pytest.mark.parametrize("overflow", [math.inf, math.nan])
def test_an_overflowing_direction_counts_as_a_rise_and_not_as_a_curvature(overflow):
    rule = ParameterFree(100)
    rule.before_step(0, Landscape(1.0, lambda t: overflow, parabola(2.0), parabola(2.0)))
    assert rule.curvature == pytest.approx(2.0)
    assert math.isfinite(rule.step_size)


def test_calibration_happens_once():
    rule = ParameterFree(100)
    probe = Landscape(1.0, parabola(1.0))
    rule.before_step(0, probe)
    used = probe.forwards
    rule.before_step(1, probe)
    assert probe.forwards == used
    assert rule.calibrated


@pytest.mark.parametrize(
    ("base", "along", "settings", "message"),
    [
        (
            1.0,
            parabola(0.0),
            {},
            r"does not rise by 1% along any of 3 directions .* does the closure use the opt",
        ),
        (1.0, parabola(0.0, slope=1.0), {}, r"does not rise by 1%"),
        (math.nan, parabola(1.0), {}, r"the loss of the first batch is nan; check the weights and the data"),
        (math.inf, parabola(1.0), {}, r"the loss of the first batch is inf"),
        (0.5, parabola(1.0), {"f_low": 0.6}, r"the loss of the first batch is 0.5, not above f_low=0.6; pass a lower bound"),
        (-3.0, parabola(1.0), {}, r"the loss of the first batch is -3, not above f_low=0"),
    ],
    ids=["flat", "linear", "nan", "inf", "f_low above", "negative loss"],
)
def test_calibration_errors(base, along, settings, message):
    with pytest.raises(CalibrationError, match=message):
        ParameterFree(100, **settings).before_step(0, Landscape(base, along))


def test_a_batch_that_leaves_nothing_to_gain_is_passed_over():
    """As one of decisions that are all right: no step, and the calibration waits for another batch."""
    rule = ParameterFree(100)
    for t in range(3):
        assert rule.before_step(t, Landscape(0.0, parabola(1.0))) is False
        assert (rule.step_size, rule.calibrated) == (0.0, False)
        rule.after_step(report(t, 0.0))
    fresh = ParameterFree(100)
    for each in (rule, fresh):
        each.before_step(3, Landscape(1.0, parabola(1.0)))
    assert rule.step_size == fresh.step_size > 0
    assert rule.state_dict() == fresh.state_dict()


def test_a_loss_that_is_never_above_its_bound_is_an_error():
    rule = ParameterFree(1000)
    for t in range(100):
        rule.before_step(t, Landscape(0.0, parabola(1.0)))
    with pytest.raises(CalibrationError, match=r"the loss of the first batch is 0, not above f_low=0; pass a lower bound"):
        rule.before_step(100, Landscape(0.0, parabola(1.0)))


# ---- losses that count decisions ---------------------------------------------------------------------------------------
def test_the_gap_of_decisions_is_that_to_the_nearer_bound():
    rule = ParameterFree(100, f_high=1.0)
    rule.before_step(0, Landscape(0.9, parabola(1.0)))
    assert rule.gap == pytest.approx(0.1)
    low = ParameterFree(100, f_high=1.0)
    low.before_step(0, Landscape(0.2, parabola(1.0)))
    assert low.gap == pytest.approx(0.2)


def test_the_rise_of_decisions_counts_by_its_size():
    """Where jumps go up and down, τ is that at which the loss first changes by ηΔ; a rule that waits for a rise goes beyond."""

    def along(distance: float) -> float:
        return 0.0 if abs(distance) < 0.25 else -0.1 if abs(distance) < 4 else 0.3

    rule, smooth = ParameterFree(100, f_high=1.0, probe_rise=0.05), ParameterFree(100, probe_rise=0.05)
    for each in (rule, smooth):
        each.before_step(0, Landscape(0.5, along))
    c = 2 * 0.1 / 0.25**2
    assert rule.curvature == pytest.approx(c)
    assert rule.smoothing == pytest.approx(math.sqrt(2 * 0.05 * 0.5 / c))
    assert rule.step_size == pytest.approx(math.sqrt(2 * 0.1 * 0.5 / (100 * c)) * math.sqrt(3))
    assert smooth.smoothing > 5 * rule.smoothing


def test_the_curvature_of_decisions_counts_by_its_size():
    rule = ParameterFree(100, f_high=1.0)
    rule.before_step(0, Landscape(0.5, parabola(1.0)))
    before, count = rule.curvature, 3  # of the calibration
    rule.after_step(report(0, 0.5, curvature=-8.0))
    assert rule.curvature == pytest.approx((count * before + 8.0) / (count + 1))


def test_decisions_that_are_all_wrong_are_passed_over_and_then_an_error():
    rule = ParameterFree(1000, f_high=1.0)
    for t in range(100):
        assert rule.before_step(t, Landscape(1.0, parabola(1.0))) is False
    with pytest.raises(CalibrationError, match=r"is 1, not below f_high=1: no decision is right; begin with a model that"):
        rule.before_step(100, Landscape(1.0, parabola(1.0)))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bound", [0.0, 0.8])
def test_a_loss_is_at_its_bound_up_to_rounding(bound, sign):
    """In float32 0.9 less 0.1 is 0.79999995, or 0.80000001."""
    base = bound + sign * 5e-8
    rule = ParameterFree(1000, f_high=0.8)
    for t in range(100):
        assert rule.before_step(t, Landscape(base, parabola(1.0))) is False
    with pytest.raises(CalibrationError, match=r"not above f_low=0;|not below f_high=0\.8: no decision is right"):
        rule.before_step(100, Landscape(base, parabola(1.0)))


def test_decisions_that_nothing_changes_are_an_error():
    with pytest.raises(CalibrationError, match=r"the loss \(0\.5\) does not rise by 1%.*; take larger batches"):
        ParameterFree(100, f_high=1.0).before_step(0, Landscape(0.5, lambda distance: 0.0))


def test_a_bounded_loss_never_explodes():
    rule = ParameterFree(1000, f_high=1.0)
    rule.before_step(0, Landscape(0.01, parabola(1.0)))
    for t in range(20):
        rule.after_step(report(t, 0.9))
    assert rule.calibrated
    assert rule.recalibrations == 0


# ---- where the formulas say nothing ------------------------------------------------------------------------------------
def test_the_last_gamma_stays_and_a_warning_says_why():
    rule = ParameterFree(100, schedule="constant")
    rule.before_step(0, Landscape(1.0, parabola(1.0)))
    last = rule.step_size, rule.smoothing
    for t in range(200):
        rule.after_step(report(t, -0.5))  # the "lower bound" is none
    with pytest.warns(UserWarning, match=r"step 200: the loss gap is -0.\d+ .* the last step size stays; is f_low=0.0 a lower"):
        rule.before_step(200, Landscape(1.0))
    assert (rule.step_size, rule.smoothing) == last


def test_zero_curvature_keeps_the_last_gamma():
    rule = ParameterFree(100, schedule="constant")
    rule.before_step(0, Landscape(1.0, parabola(1.0)))
    state = rule.state_dict() | {"curvature_sum": 0.0}
    rule.load_state_dict(state)
    with pytest.warns(UserWarning, match="the mean curvature 0, so that the last step size stays"):
        rule.before_step(1, Landscape(1.0))
    assert rule.step_size == state["step_size"] > 0


def test_steps_with_a_nonfinite_loss_teach_nothing():
    rule = ParameterFree(100)
    rule.before_step(0, Landscape(1.0, parabola(1.0)))
    before = rule.state_dict()
    rule.after_step(report(0, math.nan, math.nan, finite=False))
    rule.after_step(report(1, math.inf, None, finite=False))
    assert rule.state_dict() == before


# ---- the safeguard -----------------------------------------------------------------------------------------------------
def feed(rule: ParameterFree, losses, first: int = 0, probe: Probe | None = None) -> list[int]:
    """Steps with the given losses; returns those after which a calibration was due."""
    due = []
    for step, loss in enumerate(losses, first):
        rule.before_step(step, probe or Landscape(2.0, parabola(4.0)))
        rule.after_step(report(step, loss))
        if not rule.calibrated:
            due.append(step)
    return due


def test_five_exploded_losses_in_a_row_halve_the_step_and_calibrate_anew(caplog):
    rule = ParameterFree(1000, schedule="constant")
    assert feed(rule, [2.0] * 60) == []
    assert rule.recalibrations == 0
    with caplog.at_level("WARNING", "zo_lightning.optim.parameter_free"):
        assert feed(rule, [6.1] * 5, 60) == [64]
    assert rule.recalibrations == 1
    assert [record.getMessage() for record in caplog.records] == [
        "step 64: the loss has exploded to 6.1; the step size is halved and calibrated anew (1 so far)"
    ]
    probe = Landscape(9.0, parabola(50.0))
    rule.before_step(65, probe)
    fresh = ParameterFree(1000, schedule="constant")
    fresh.before_step(65, Landscape(9.0, parabola(50.0)))
    assert probe.forwards > 1
    assert rule.curvature == pytest.approx(50.0)
    assert rule.smoothing == fresh.smoothing == pytest.approx(math.sqrt(2 * 0.01 * 9 / 50))
    assert rule.step_size == pytest.approx(fresh.step_size / 2)
    assert rule.step_size == pytest.approx(math.sqrt(2 * 0.1 * 9 / (1000 * 50)) / 2)


@pytest.mark.parametrize(
    ("losses", "due"),
    [
        ([6.1] * 4 + [5.9] + [6.1] * 4, []),  # never five in a row
        ([5.9] * 30, []),  # three times as far is not more than three times
        ([6.1] * 5 + [2.0], [64]),
        ([1e9] * 5, [64]),
    ],
)
def test_what_counts_as_an_explosion(losses, due):
    rule = ParameterFree(1000)
    feed(rule, [2.0] * 60)
    assert feed(rule, losses, 60) == due


@pytest.mark.parametrize("f_low", [-1.0, 1.0])
def test_the_distance_is_from_the_lower_bound(f_low):
    for loss, explodes in ((f_low + 3.01 * (2 - f_low), True), (f_low + 2.99 * (2 - f_low), False)):
        rule = ParameterFree(1000, f_low=f_low)
        feed(rule, [2.0] * 60)
        assert bool(feed(rule, [loss] * 5, 60)) == explodes


def test_an_explosion_at_the_very_beginning_is_seen_against_the_first_loss():
    rule = ParameterFree(1000)
    assert feed(rule, [2.0, 7.0, 12.0, 30.0, 90.0, 200.0, 400.0])[:1] == [5]
    assert rule.recalibrations == 1


def test_the_first_batch_alone_may_be_an_easy_one():
    rule = ParameterFree(1000)
    assert feed(rule, [2.0] * 60, probe=Landscape(0.1, parabola(4.0))) == []


@pytest.mark.parametrize(("calm", "exploded"), [(12, 9.0), (20, 7.0), (45, 6.5), (48, 6.1)])
def test_an_explosion_before_the_running_loss_has_settled_is_seen(calm, exploded):
    """Though the exploded losses are a part of the running loss, and of that after the first fifty."""
    rule = ParameterFree(1000)
    assert feed(rule, [2.0] * calm + [exploded] * 5) == [calm + 4]


def test_steps_with_a_nonfinite_loss_neither_count_nor_break_the_row():
    rule = ParameterFree(1000)
    feed(rule, [2.0] * 60)
    feed(rule, [7.0] * 4, 60)
    rule.after_step(report(64, math.nan, finite=False))
    assert rule.recalibrations == 0
    assert feed(rule, [7.0], 65) == [65]


def test_every_further_explosion_halves_again():
    rule = ParameterFree(10**6, schedule="constant")
    feed(rule, [2.0] * 60)
    sizes = []
    for number in range(3):
        first = 60 + 70 * number
        feed(rule, [100.0] * 5 + [2.0] * 60, first)
        assert rule.recalibrations == number + 1
        sizes.append(rule.step_size)
    assert sizes[1] / sizes[0] == pytest.approx(0.5)
    assert sizes[2] / sizes[1] == pytest.approx(0.5)


def test_halving_stays_until_the_end():
    """Other than the calibration, which the losses after it change."""
    pair = [ParameterFree(1000), ParameterFree(1000)]
    for rule in pair:
        feed(rule, [2.0] * 60)
    feed(pair[0], [7.0] * 5, 60)
    state = pair[0].state_dict()
    pair[1].load_state_dict({**state, "recalibrations": 0})
    for rule in pair:
        feed(rule, [2.0] * 100, 65)
    assert pair[0].step_size == pytest.approx(pair[1].step_size / 2)


@LAWS
@given(st.integers(0, 2**16), st.floats(0.01, 0.45), st.floats(1e-3, 1e3), st.floats(0.3, 1.0))
def test_noisy_losses_are_no_explosion(seed, noise, scale, end):
    """Losses that fall to a share of the first on the whole, each off by a log-normal factor."""
    source = torch.Generator().manual_seed(seed)
    rule = ParameterFree(400)
    factors = (noise * torch.randn(400, generator=source, dtype=torch.float64)).exp().tolist()
    losses = [scale * (1 - (1 - end) * t / 400) * by for t, by in enumerate(factors)]
    assert feed(rule, losses, probe=Landscape(losses[0], parabola(scale))) == []
    assert rule.recalibrations == 0


@pytest.mark.parametrize("stop", [3, 58, 62, 64, 65, 66, 80])
def test_a_state_in_the_middle_of_an_explosion_goes_on_exactly(stop):
    losses = [2.0 + 0.1 * math.sin(t) for t in range(60)] + [7.0 + 0.1 * t for t in range(5)] + [2.0] * 30
    whole = ParameterFree(200)
    feed(whole, losses)
    first, second = ParameterFree(200), ParameterFree(200)
    feed(first, losses[:stop])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.recalibrations == (1 if stop >= 65 else 0)
    feed(second, losses[stop:], stop)
    assert second.state_dict() == whole.state_dict()
    assert whole.recalibrations == 1


def test_a_run_that_explodes_recovers():
    """With γ a thousand times too large for a while, as where the curvature has been underestimated."""
    module, x, y = problem()
    rule = ParameterFree(300)
    optimizer = ZerothOrder(module.named_parameters(), step_rule=rule, seed=0).attach(module)

    def loss() -> torch.Tensor:
        return F.cross_entropy(module(x), y, reduction="none")

    for _ in range(15):
        optimizer.step(loss)
    start = float(optimizer.last.loss)
    rule._curvature_sum /= 10**6
    losses = []
    for _ in range(100):
        losses.append(float(optimizer.step(loss)))
        if rule.recalibrations:
            break
    assert rule.recalibrations == 1
    assert max(losses) > 3 * start
    wild = optimizer.last.lr
    optimizer.step(loss)
    assert optimizer.last.lr < wild / 50
    after = [float(optimizer.step(loss)) for _ in range(200)]
    assert statistics.fmean(after[-20:]) < 0.5 * statistics.fmean(losses[-5:])
    assert rule.recalibrations <= 4  # while the loss is still far above where it began


# ---- state -------------------------------------------------------------------------------------------------------------
def test_the_state_is_plain_and_the_round_trip_exact():
    rule = ParameterFree(50, interval=2)
    probe = Landscape(1.7, parabola(0.3), parabola(0.7), parabola(1.1))
    for t in range(5):
        rule.before_step(t, probe)
        rule.after_step(report(t, 1.7 / (t + 1), 0.1 * t))
    text = json.dumps(rule.state_dict())
    other = ParameterFree(50, interval=2)
    other.load_state_dict(json.loads(text))
    for t in range(5, 12):
        assert other.before_step(t, Landscape(0.0)) == rule.before_step(t, Landscape(0.0))
        assert (other.step_size, other.smoothing) == (rule.step_size, rule.smoothing)
        for r in (rule, other):
            r.after_step(report(t, 1 / 3, 0.2))
    assert other.state_dict() == rule.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, or None if unknown, got 0"),
        ({"probe_rise": 0.0}, "probe_rise must be positive, got 0.0"),
        ({"probe_rise": math.nan}, "probe_rise must be positive, got nan"),
        ({"attainable": 0.0}, r"attainable must be a share in \(0, 1\], got 0.0"),
        ({"attainable": 1.5}, r"attainable must be a share in \(0, 1\], got 1.5"),
        ({"attainable": math.nan}, r"attainable must be a share in \(0, 1\], got nan"),
        ({"interval": 0}, "interval must be at least 1 step, got 0"),
        ({"schedule": "cosine"}, "schedule must be 'linear' or 'constant', got 'cosine'"),
        ({"unknown_horizon": 0}, "unknown_horizon must be at least 1 step, got 0"),
        ({"f_high": 0.0}, "f_high must be finite and above f_low=0.0, or None, got 0.0"),
        ({"f_high": math.inf}, "f_high must be finite and above f_low=0.0, or None, got inf"),
        ({"f_low": math.nan}, "f_low must be finite, got nan"),
        ({"f_low": -math.inf}, "f_low must be finite, got -inf"),
    ],
)
def test_errors_name_the_argument(settings, message):
    with pytest.raises(ValueError, match=message):
        ParameterFree(**settings)


# ---- with the optimizer ------------------------------------------------------------------------------------------------
class Bowl(nn.Module):
    """c/2 ‖x‖² + const."""

    def __init__(self, n: int = 40, curvature: float = 3.0, constant: float = 0.5) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
        self.curvature, self.constant = curvature, constant

    def forward(self) -> torch.Tensor:
        return self.curvature / 2 * self.x.square().sum() + self.constant


@pytest.mark.parametrize("directions", ["sphere", "gaussian", "rademacher", "low_rank"])
@pytest.mark.parametrize("sides", [1, 2])
def test_the_optimizer_measures_the_analytic_curvature(directions, sides):
    module = Bowl()
    rule = ParameterFree(100, interval=2)
    geometry = {"vector": {"name": "euclidean", "radius": 1}}
    settings = {"directions": directions, "sides": sides, "geometry": geometry, "step_rule": rule, "seed": 0}
    optimizer = ZerothOrder(module.named_parameters(), **settings).attach(module)
    base = float(module().detach())
    for t in range(4):
        optimizer.step(module)
        assert rule.curvature == pytest.approx(3.0, rel=1e-5), "‖u‖ = 1"
        assert optimizer.last.curvature == (pytest.approx(3.0, rel=1e-5) if t % 2 == 0 else None)
        if t == 0:
            assert 1.5 * optimizer.last.smoothing**2 == pytest.approx(0.01 * base, rel=1e-5)
            calibration = optimizer.last.forwards - 1 - 2 - 1  # observing, two probes, the centre
            assert calibration % 6 == 1
            assert calibration > 6
        else:
            assert optimizer.last.forwards == 2 + (t % 2 == 0)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(x)))


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(7)
    x = torch.randn(64, 8, generator=source)
    y = (x @ torch.randn(8, generator=source) > 0).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Classifier(), x, y


EUCLIDEAN = {kind: {"name": "euclidean", "radius": 1.0} for kind in ("matrix", "vector")}
FAMILIES = {
    "low_rank": {"directions": "low_rank"},
    "low_rank of rank 4": {"directions": "low_rank", "rank": 4},
    "gaussian, euclidean": {
        "directions": "gaussian",
        "geometry": EUCLIDEAN,
    },
    "rademacher, sign": {"directions": "rademacher"},
}


def fit(settings: dict, steps: int = 160, scale: float = 1.0, **more) -> tuple[nn.Module, ZerothOrder, float, float]:
    """Returns the model, the optimizer, and the loss before and after."""
    module, x, y = problem()
    optimizer = ZerothOrder(
        module.named_parameters(), **{"step_rule": ParameterFree(steps), "seed": 0, **copy.deepcopy(settings), **more}
    )
    optimizer.attach(module)

    def loss() -> torch.Tensor:
        return F.cross_entropy(module(x), y, reduction="none") * scale

    with torch.no_grad():
        start = float(loss().mean())
        for _ in range(steps):
            optimizer.step(loss)
        return module, optimizer, start, float(loss().mean())


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_it_trains_untuned(settings):
    *_, start, end = fit(settings)
    assert end < 0.6 * start


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_it_trains_with_an_unknown_horizon_and_other_estimators(settings):
    module, x, y = problem()
    optimizer = ZerothOrder(module.named_parameters(), step_rule=ParameterFree(), num_directions=2, sides=1, seed=0, **settings)
    optimizer.attach(module)
    with torch.no_grad():
        losses = [float(optimizer.step(lambda: F.cross_entropy(module(x), y))) for _ in range(100)]
    assert statistics.fmean(losses[-5:]) < 0.8 * losses[0]


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("more", [{}, {"momentum": 0.9, "num_directions": 2}], ids=["plain", "momentum"])
def test_a_factor_on_the_loss_changes_no_bit_of_the_trajectory(settings, more):
    plain, a, *_ = fit(settings, 12, **more)
    scaled, b, *_ = fit(settings, 12, scale=2.0**10, **more)
    assert same_bits(bits(plain), bits(scaled))
    assert b.last.loss == a.last.loss * 2**10
    assert b.last.lr == a.last.lr
    assert b.last.smoothing == a.last.smoothing


@pytest.mark.parametrize("name", ["low_rank", "rademacher, sign"])
def test_random_signs_do_not_train(name, monkeypatch):
    ends = []
    for seed in range(5):
        signs = torch.Generator().manual_seed(seed)
        monkeypatch.setattr(
            LMO, "coefficient", lambda self, slope, signs=signs: float(torch.randint(0, 2, (), generator=signs)) * 2 - 1
        )
        *_, start, end = fit(FAMILIES[name])
        ends.append(end)
    assert statistics.fmean(ends) > 0.9 * min(start, math.log(2)), "no better than chance"


def test_steps_of_length_zero_do_not_train(monkeypatch):
    monkeypatch.setattr(ParameterFree, "_decay", lambda self: 0.0)
    module, optimizer, start, end = fit(FAMILIES["low_rank"], 20)
    assert end == start
    assert same_bits(bits(module), bits(problem()[0]))
    assert optimizer.last.lr == 0


def test_a_quadratic_is_minimised():
    module = Bowl(constant=0.0)
    optimizer = ZerothOrder(
        module.named_parameters(),
        directions="sphere",
        geometry={"vector": {"name": "euclidean", "radius": 1}},
        step_rule=ParameterFree(200),
        seed=0,
    ).attach(module)
    start = float(module().detach())
    for _ in range(200):
        optimizer.step(module)
    assert float(module().detach()) < 0.3 * start


def test_flat_and_broken_models_are_told_at_the_first_step():
    module, x, y = problem()
    weights = bits(module)

    def optimizer():
        return ZerothOrder(module.named_parameters(), step_rule=ParameterFree(10)).attach(module)

    with pytest.raises(CalibrationError, match="does the closure use the optimizer's parameters"):
        optimizer().step(lambda: module(x).sum() * 0 + 1)
    assert same_bits(bits(module), weights)
    with pytest.raises(CalibrationError, match="the loss of the first batch is nan"):
        optimizer().step(lambda: F.cross_entropy(module(x * float("nan")), y))
    assert same_bits(bits(module), weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer().step(lambda: F.cross_entropy(module(x), y))
