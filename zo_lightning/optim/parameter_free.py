"""The parameter-free step rule: step size and smoothing from the loss gap and the measured curvature.

Where it comes from. The publication of AdaNAGED (arXiv 2606.14970) names the ingredients in its abstract: zeroth-order
estimates, LMO updates, parameter-free step size *and* smoothing. The form ``step = √(gap / Σ local smoothness)`` is ALIAS's
(Medyakov et al., arXiv 2506.03725). Its zeroth-order form below, the smoothing, the calibration, the running and the
attainable gap, and the decay are this project's own construction.
"""

from __future__ import annotations

import logging
import math
import statistics
import warnings
from typing import Any, Literal

from zo_lightning.optim.step_rules import Probe, StepReport, StepRule

__all__ = ["CalibrationError", "ParameterFree"]

_log = logging.getLogger(__name__)

_FIRST_SMOOTHING = 2.0**-14  # far below any useful radius for steps of unit norm; only powers of two times it are tried
_LAST_SMOOTHING = 2.0**24
_CALIBRATION_DIRECTIONS = 3
_EXPLOSION = 3.0  # how many times the gap at the beginning
_EXPLODED_STEPS = 5  # in a row
_BATCHES_AT_A_BOUND = 100  # in a row, after which nothing can be hoped for
_AT_A_BOUND = 1e-6  # of the range of losses that count decisions: in float32 these need not meet a bound exactly
_FORGETTING = 0.02  # weight of the newest loss in the running mean: some fifty steps


class CalibrationError(RuntimeError):
    """The loss does not respond to the parameters, so no smoothing radius can be found."""


class ParameterFree(StepRule):
    """Step size and smoothing without tuning, for updates of unit norm along the probed direction u.

    With the losses ``f± = f(x ± τu; ξ)`` of one batch ξ::

        c = max(0, (f₊ - 2 f(x; ξ) + f₋) / τ²)    every `interval` steps
        c̄ = mean of all c so far                  Δ = moving average of (f₊ + f₋)/2, minus f_low
        D = min(Δ, max(φ Δ, 2 (Δ₀ - Δ - s)))       Δ₀ = Δ after the first 50 steps, s = standard error of Δ₀ - Δ
        γ = √(2 D / (N c̄))                         τ = √(2 η Δ / c̄)

    and with the schedule ``"linear"`` γ is multiplied by ``√3 (1 - t/N)``, which leaves Σγ² unchanged. Multiplying the loss by
    a constant changes nothing. The first step calibrates: τ grows from far below the dtype's resolution until the median
    rise ``(f₊ + f₋)/2 - f`` over three fresh directions reaches ηΔ, which gives the first c̄.

    D is the decrease that the run is expected to reach. ALIAS bounds it by the whole gap Δ, which fine-tuning never closes:
    steps of that size are about three times too large. Here it is the share φ of the gap, until the loss has fallen by more
    than half of that; then it is twice the fall so far (ALIAS's option I, with the fall read off the running loss, which is
    far less noisy than a sum of directional derivatives). φ = 1 is the loss gap alone.

    **Safeguard.** A loss that explodes (in five steps running more than three times as far above ``f_low`` as the run began)
    tells that the curvature has been underestimated: the next step calibrates anew, and γ is halved from then on.

    **Losses that count decisions** (one less an accuracy, or an F1) lie between two bounds, and are constant between jumps.
    With ``f_high`` given, Δ is the distance to the nearer bound: a score that is hardly above nothing can hardly fall. The
    second difference and the rise, of either sign with equal right there, count by their size: else τ grows until the model
    decides nothing any more. A batch at a bound, of decisions all right or all wrong, is passed over by the calibration.

    Args:
        total_steps: N, the number of optimizer steps of the run; None if it is unknown, then ``N = t + t₀``.
        f_low: Lower bound of the loss; 0 for cross-entropy.
        f_high: Upper bound of a loss that counts decisions; None for any other.
        attainable: φ, the share of the gap that the run is expected to close until it has shown more; in (0, 1].
        probe_rise: η, the share of the gap by which a probe may raise the loss.
        interval: K, steps between measurements of the curvature.
        schedule: ``"linear"`` or ``"constant"``; without a known N, constant.
        unknown_horizon: t₀.

    Attributes:
        curvature: c̄.
        gap: Δ.
        calibrated: Whether the first step has been.
        recalibrations: How often the loss has exploded.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        *,
        f_low: float = 0.0,
        f_high: float | None = None,
        attainable: float = 0.1,
        probe_rise: float = 0.01,
        interval: int = 10,
        schedule: Literal["linear", "constant"] = "linear",
        unknown_horizon: int = 1000,
    ) -> None:
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, or None if unknown, got {total_steps}")
        if not 0 < attainable <= 1:
            raise ValueError(f"attainable must be a share in (0, 1], got {attainable}")
        if not probe_rise > 0:
            raise ValueError(f"probe_rise must be positive, got {probe_rise}")
        if interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {interval}")
        if schedule not in ("linear", "constant"):
            raise ValueError(f"schedule must be 'linear' or 'constant', got {schedule!r}")
        if unknown_horizon < 1:
            raise ValueError(f"unknown_horizon must be at least 1 step, got {unknown_horizon}")
        if not math.isfinite(f_low):
            raise ValueError(f"f_low must be finite, got {f_low}")
        if f_high is not None and not f_low < f_high < math.inf:
            raise ValueError(f"f_high must be finite and above f_low={f_low}, or None, got {f_high}")
        self.total_steps = total_steps
        self.f_low = f_low
        self.f_high = f_high
        self.attainable = attainable
        self.probe_rise = probe_rise
        self.interval = interval
        self.schedule = schedule
        self.unknown_horizon = unknown_horizon
        self.step_size = 0.0
        self.smoothing = _FIRST_SMOOTHING
        self.calibrated = False
        self.recalibrations = 0
        self._explosions = 0  # steps in a row
        self._at_bound = 0  # batches in a row that nothing could be measured on
        self._first_gap = 0.0  # Δ at the beginning
        self._ceiling = 0.0  # the gap that an explosion is measured by
        self._step = 0
        # sums rather than means: the state is exact whatever the number of resumes
        self._curvature_sum = 0.0
        self._curvature_count = 0
        self._loss_average = 0.0
        self._loss_count = 0
        self._loss_variance = 0.0
        self._reference: float | None = None  # the running loss once it has settled, from which progress is counted

    @property
    def curvature(self) -> float:
        """c̄, the mean clipped second difference so far."""
        return self._curvature_sum / self._curvature_count if self._curvature_count else 0.0

    @property
    def gap(self) -> float:
        """Δ, the running loss minus ``f_low``, or its distance to ``f_high`` if that is nearer."""
        return self._gap(self._loss_average)

    def _gap(self, loss: float) -> float:
        return loss - self.f_low if self.f_high is None else min(loss - self.f_low, self.f_high - loss)

    def _bend(self, difference: float) -> float:
        """What of a second difference, or of a rise, counts."""
        return max(0.0, difference) if self.f_high is None else abs(difference)

    def before_step(self, step: int, probe: Probe) -> bool:
        """See :meth:`StepRule.before_step`; calibrates if need be.

        Raises:
            CalibrationError: If the loss is not finite at the start, does not respond to any smoothing, or overflows.
        """
        self._step = step
        if not self.calibrated and not self._calibrate(probe):
            self.step_size = 0.0
            return False
        self._update_sizes()
        return step % self.interval == 0

    def after_step(self, report: StepReport) -> None:
        """See :meth:`StepRule.after_step`."""
        if not report.finite or not self.calibrated:
            return
        if report.curvature is not None:
            self._curvature_sum += self._bend(report.curvature)
            self._curvature_count += 1
        self._watch(report.loss)
        self._observe_loss(report.loss)

    def _watch(self, loss: float) -> None:
        """Calibrate anew after an explosion."""
        if self.f_high is not None:
            return
        exploded = loss - self.f_low > _EXPLOSION * self._ceiling
        self._explosions = self._explosions + 1 if exploded else 0
        if self._explosions < _EXPLODED_STEPS:
            return
        self.recalibrations += 1
        self._explosions = 0
        self.calibrated = False
        _log.warning(
            "step %d: the loss has exploded to %.4g; the step size is halved and calibrated anew (%d so far)",
            self._step,
            loss,
            self.recalibrations,
        )

    @property
    def attainable_gap(self) -> float:
        """D, the decrease of the loss that the run is expected to reach."""
        expected = self.attainable * self.gap
        if self._reference is not None:
            # two running means, each over some fifty losses
            deviation = math.sqrt(self._loss_variance * _FORGETTING)
            expected = max(expected, 2 * (self._reference - self._loss_average - deviation))
        return min(self.gap, expected)

    def _observe_loss(self, loss: float) -> None:
        self._loss_count += 1
        # a plain mean at first, then an exponential one over some fifty steps
        weight = max(1 / self._loss_count, _FORGETTING)
        deviation = loss - self._loss_average
        self._loss_average += deviation * weight
        self._loss_variance = (1 - weight) * (self._loss_variance + weight * deviation**2)
        if self._loss_count == round(1 / _FORGETTING):
            self._reference = self._loss_average
        # the first batch alone may be an easy one; later on what explodes does not tell where the run began
        if not self.recalibrations and self._reference is None and (self._loss_count <= 10 or not self._explosions):
            self._first_gap = max(self._first_gap, self.gap)
        # an explosion that has been answered is not another one, and one that is over is forgotten
        self._ceiling = max(self._first_gap, min(self._ceiling, self.gap))

    def _update_sizes(self) -> None:
        """γ and τ from the gap and the curvature; the last ones stay where these say nothing."""
        gap, curvature = self.gap, self.curvature
        if gap <= 0 or curvature <= 0:
            warnings.warn(
                f"step {self._step}: the loss gap is {gap:.3g} and the mean curvature {curvature:.3g}, so that the last step "
                f"size stays; is f_low={self.f_low} a lower bound of the loss?",
                UserWarning,
                stacklevel=5,
            )
            return
        self.smoothing = math.sqrt(2 * self.probe_rise * gap / curvature)
        horizon = self.total_steps if self.total_steps is not None else self._step + self.unknown_horizon
        self.step_size = math.sqrt(2 * self.attainable_gap / (horizon * curvature)) * self._decay() * 0.5**self.recalibrations

    def _decay(self) -> float:
        if self.schedule == "constant" or self.total_steps is None:
            return 1.0
        return math.sqrt(3) * max(0.0, 1 - self._step / self.total_steps)

    # ---- calibration ---------------------------------------------------------------------------------------------------
    def _calibrate(self, probe: Probe) -> bool:
        """Find the τ at which the median rise reaches ηΔ: ×4 from far below, then one bisection.

        Where no τ raises the loss so far, that at which it first changes by as much is taken, and c̄ from the change's size.

        Returns:
            Whether it was found: not on a batch whose loss is at a bound, as that of decisions may be.
        """
        base = probe.loss()
        if not math.isfinite(base):
            raise CalibrationError(
                f"the loss of the first batch is {base}; check the weights and the data for NaN or infinite values"
            )
        near = 0.0 if self.f_high is None else _AT_A_BOUND * (self.f_high - self.f_low)
        if abs(self._gap(base)) <= near and self._at_bound < _BATCHES_AT_A_BOUND:
            self._at_bound += 1
            _log.info("calibration: the loss of the batch is at its bound, %.4g; the next batch is tried", base)
            return False
        if base <= self.f_low + near:
            raise CalibrationError(
                f"the loss of the first batch is {base:.6g}, not above f_low={self.f_low:.6g}; pass a lower bound of the loss"
            )
        if self.f_high is not None and base >= self.f_high - near:
            raise CalibrationError(
                f"the loss of the first batch is {base:.6g}, not below f_high={self.f_high:.6g}: no decision is right; begin "
                "with a model that has learned something of the task by likelihood"
            )
        tau, rises, forwards = self._search(probe, base)
        usable = [2 * rise / tau**2 for rise in rises if math.isfinite(rise)]
        if not usable:
            raise CalibrationError(
                f"the loss ({base:.6g}) jumps from a rise of less than {self.probe_rise:.0%} to infinity at a smoothing of "
                f"{tau:.3g}; use a wider precision"
            )
        self._curvature_sum = sum(map(self._bend, usable))
        self._curvature_count = len(usable)
        self._loss_average, self._loss_count = base, 1
        self._ceiling = self.gap
        if not self.recalibrations:
            self._first_gap = self.gap
        self._loss_variance, self._reference = 0.0, None
        self.smoothing = tau
        self.calibrated = True
        self._at_bound = 0
        _log.info("calibration: loss %.4g, smoothing %.3g, curvature %.3g, %d forwards", base, tau, self.curvature, forwards)
        return True

    def _search(self, probe: Probe, base: float) -> tuple[float, list[float], int]:
        """The smoothing, the rises there, and the number of forwards."""
        target = self.probe_rise * self._gap(base)
        tau, forwards = _FIRST_SMOOTHING, 1
        changed: tuple[float, list[float]] | None = None  # where the loss first changes by as much, up or down
        while tau <= _LAST_SMOOTHING:
            rises = self._rises(probe, tau, base)
            forwards += 2 * _CALIBRATION_DIRECTIONS
            if changed is not None and not any(map(math.isfinite, rises)):
                break  # it has never risen so far, only overflowed
            if statistics.median(rises) >= target:
                half = self._rises(probe, tau / 2, base)
                forwards += 2 * _CALIBRATION_DIRECTIONS
                return (tau / 2, half, forwards) if statistics.median(half) >= target else (tau, rises, forwards)
            if changed is None and statistics.median(map(abs, rises)) >= target:
                changed = tau, [abs(rise) for rise in rises]
            tau *= 4
        if changed is None:
            hint = "does the closure use the optimizer's parameters?"
            if self.f_high is not None:
                hint = "take larger batches, in which not as many decisions are right whatever the weights"
            raise CalibrationError(
                f"the loss ({base:.6g}) does not rise by {self.probe_rise:.0%} along any of {_CALIBRATION_DIRECTIONS} "
                f"directions up to a smoothing of {tau / 4:.3g}; {hint}"
            )
        # any large change of these parameters lowers it: it began above what a constant answer gives
        return *changed, forwards

    def _rises(self, probe: Probe, tau: float, base: float) -> list[float]:
        """(f₊ + f₋)/2 - f along three fresh directions; an overflow counts as a rise."""
        rises = []
        for direction in range(_CALIBRATION_DIRECTIONS):
            plus, minus = probe.pair(direction, tau)
            rise = (plus + minus) / 2 - base
            rises.append(math.inf if math.isnan(rise) else rise if self.f_high is None else abs(rise))
        return rises

    # ---- state ---------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """See :meth:`StepRule.state_dict`."""
        return {
            "calibrated": self.calibrated,
            "recalibrations": self.recalibrations,
            "explosions": self._explosions,
            "first_gap": self._first_gap,
            "ceiling": self._ceiling,
            "curvature_sum": self._curvature_sum,
            "curvature_count": self._curvature_count,
            "loss_average": self._loss_average,
            "loss_count": self._loss_count,
            "loss_variance": self._loss_variance,
            "reference": self._reference,
            "step_size": self.step_size,
            "smoothing": self.smoothing,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`StepRule.load_state_dict`."""
        self.calibrated = bool(state["calibrated"])
        self.recalibrations = int(state["recalibrations"])
        self._explosions = int(state["explosions"])
        self._first_gap = float(state["first_gap"])
        self._ceiling = float(state["ceiling"])
        self._curvature_sum = float(state["curvature_sum"])
        self._curvature_count = int(state["curvature_count"])
        self._loss_average = float(state["loss_average"])
        self._loss_count = int(state["loss_count"])
        self._loss_variance = float(state["loss_variance"])
        self._reference = None if state["reference"] is None else float(state["reference"])
        self.step_size = float(state["step_size"])
        self.smoothing = float(state["smoothing"])
