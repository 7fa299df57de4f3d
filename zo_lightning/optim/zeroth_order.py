"""The zeroth-order optimizer: a ``torch.optim.Optimizer`` whose ``step(closure)`` needs forward passes only."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from zo_lightning.optim.attachable import AttachableOptimizer
from zo_lightning.optim.directions import Directions, make_directions
from zo_lightning.optim.evaluations import Evaluations, Gathered
from zo_lightning.optim.evaluator import Closure, Evaluator, Stacked
from zo_lightning.optim.groups import GeometryMap, GeometrySpec, named_groups
from zo_lightning.optim.interrupts import deferred_interrupt
from zo_lightning.optim.path import geometry_of
from zo_lightning.optim.probing import Prober
from zo_lightning.optim.ranks import Alone, Ranks
from zo_lightning.optim.sampling import Sampler
from zo_lightning.optim.scaling import output_units
from zo_lightning.optim.schemes import Plan, Scheme, make_scheme
from zo_lightning.optim.step_rules import StepReport, StepRule
from zo_lightning.optim.updates import Update, make_update

__all__ = ["NonFiniteLossError", "ZerothOrder"]


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had a loss that is NaN or infinite."""


class ZerothOrder(AttachableOptimizer):
    """Zeroth-order optimizer: directions × update rule × step rule.

    A step evaluates ``closure() -> loss`` (no backward) at ``x ± τu`` and moves the parameters along u. After the probes every
    weight is bit for bit what it was; the update is the only thing ever written. One call of :meth:`step` is one batch.

    Works on any PyTorch model::

        optimizer = ZerothOrder(model.named_parameters(), lr=1e-3, smoothing=1e-3).attach(model)
        loss = optimizer.step(lambda: criterion(model(x), y))

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either. Directions depend on the names; parameters without a
            name are numbered. Groups without a ``geometry`` are split by ``geometry``.
        lr: Step size γ: the length of a step in the group's norm (``update="lmo"``) or the learning rate η (``"sgd"``).
        smoothing: Smoothing radius τ of the probes, in the same norm.
        directions: ``"low_rank"``, ``"gaussian"``, ``"rademacher"``, ``"sphere"``, or a :class:`Directions`.
        rank: Rank of low-rank directions.
        interval: Steps ν for which the right factor of low-rank directions is held.
        geometry: Overrides of the default map from parameters to geometries, by kind (``matrix``, ``embedding``, ``vector``)
            or name pattern; see :class:`GeometryMap`.
        update: ``"lmo"`` (normalised steps), ``"sgd"``, ``"unit"``, ``"sign"``, ``"muon"``, ``"adamm"``, ``"standardised"``, or
            an :class:`Update`.
        scaling: ``"output"`` measures, in the first forward, how large a change of each parameter changes its module's output
            by the output's own size, and takes that for the unit of length; ``"none"`` takes the parameter's own units.
        num_directions: Directions q per step; each costs ``sides`` forwards. More than one, or momentum, use an estimate per
            parameter made when it is updated; only momentum is stored.
        sides: 2 for central differences, 1 for one-sided ones (one shared forward at x).
        momentum: β of the moving average of estimates, in [0, 1).
        weight_decay: Decoupled weight decay λ: ``x ← x - lr λ x``.
        seed: Seed of all directions; None takes ``torch.initial_seed()``, so that ``torch.manual_seed`` decides.
        step_rule: Sets ``lr`` and ``smoothing`` before each step, for example :class:`ParameterFree`.
        probes: ``"auto"`` runs the probes of a step as one forward of the stacked batch where the closure has such a form, the
            losses are independent, and memory allows, and one after the other otherwise; ``"sequential"`` always does the
            latter; ``"stacked"`` raises where the former is not possible.
        max_nonfinite: This many steps in a row with a NaN or infinite loss raise :class:`NonFiniteLossError`.
        scheme: ``"differences"`` (``num_directions`` and ``sides`` say which), ``"best_of"``, ``"conservative"``, or a
            :class:`Scheme`.
        sampler: Shapes the directions by what the losses have told, for example :class:`LearnedMean`.

    Attributes:
        last: What the last step measured, a :class:`StepReport`.
        forwards: Batch losses evaluated so far.
        probing: Whether a closure that is running now evaluates a point of the step, rather than for a calibration or to find
            out how the parameters are used.
        ranks: The processes that take each step together; :class:`Alone` until somebody sets others.
        geometry: The :class:`GeometryMap` made of the argument. With the module at hand, ``geometry.split`` tells embeddings
            and transposed weights; a second optimizer over those groups knows them.

    Raises:
        ValueError: If an argument is out of its range, or a geometry cannot be combined with the directions.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        smoothing: float = 1e-3,
        *,
        directions: str | Directions = "low_rank",
        rank: int = 1,
        interval: int = 50,
        geometry: Mapping[str, GeometrySpec] | None = None,
        update: str | Update = "lmo",
        scaling: Literal["output", "none"] = "none",
        num_directions: int = 1,
        sides: int = 2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        seed: int | None = None,
        step_rule: StepRule | None = None,
        probes: Literal["auto", "sequential", "stacked"] = "auto",
        max_nonfinite: int = 10,
        scheme: str | Scheme = "differences",
        sampler: Sampler | None = None,
    ) -> None:
        _check("lr", lr, lr >= 0 and math.isfinite(lr), "a finite number >= 0")
        _check("smoothing", smoothing, smoothing > 0 and math.isfinite(smoothing), "a finite number > 0")
        _check("num_directions", num_directions, num_directions >= 1, "at least 1")
        _check("sides", sides, sides in (1, 2), "1 or 2")
        _check("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
        _check("weight_decay", weight_decay, weight_decay >= 0, ">= 0")
        _check("scaling", scaling, scaling in ("output", "none"), "'output' or 'none'")
        _check("probes", probes, probes in ("auto", "sequential", "stacked"), "'auto', 'sequential' or 'stacked'")
        _check("max_nonfinite", max_nonfinite, max_nonfinite >= 1, "at least 1")
        self.directions = make_directions(directions, rank=rank, interval=interval)
        self.update = make_update(update)
        self.update.check(self.directions, num_directions)
        self.scheme = make_scheme(scheme)
        self.scheme.check(self.update, num_directions, sides, momentum, weight_decay)
        self.sampler = sampler
        if sampler is not None:
            _check_sampler(sampler, self.directions, self.update)
        if step_rule is not None and not self.update.normalised:
            raise ValueError(
                f"step_rule sets the length of a step, and the steps of update={self.update.name!r} are as long as the slope "
                "is steep; use an update whose steps are normalised, or, for a method that has it, normalised=True"
            )
        self.scaling = scaling
        self.step_rule = step_rule
        self.probes = probes
        self.max_nonfinite = max_nonfinite
        self.last: StepReport | None = None
        defaults = {
            "lr": lr,
            "smoothing": smoothing,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "num_directions": num_directions,
            "sides": sides,
            "seed": torch.initial_seed() if seed is None else seed,
            "step": 0,
            "forwards": 0,
            "nonfinite": 0,
            "directions": self.directions.signature(),
            "units": None,
            "stacking": "untried",
            "unresolved": 0,
        }
        self.ranks: Ranks = Alone()
        self.probing = False
        self.geometry = GeometryMap(geometry, directions=self.directions)
        super().__init__(named_groups(params, self.geometry), defaults)

    # ---- the step ------------------------------------------------------------------------------------------------------
    @torch.inference_mode(False)  # what is made here is written again by later steps
    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, stacked: Stacked | None = None) -> Tensor:  # type: ignore[override]
        """Probe, and move the parameters once.

        Args:
            closure: Evaluates the model on the step's batch and returns the loss, a scalar or the losses per example (any
                shape, mean taken in float32). No backward. After :meth:`accumulate` it may be left out.
            stacked: ``stacked(copies)`` returns the losses per example of that many copies of the batch, one copy after the
                other, from one forward whose activations hold the copies along their first dimension; or None if it cannot.
                See ``probes``.

        Returns:
            The mean of the losses seen at the probes, a scalar tensor.

        Raises:
            TypeError: If ``closure`` is missing or does not return a tensor.
            ValueError: If ``probes="stacked"`` and that is not possible.
            NonFiniteLossError: See ``max_nonfinite``.
        """
        if closure is None and self._gathered is None:
            raise TypeError("ZerothOrder.step needs a closure that evaluates the loss: optimizer.step(lambda: loss(batch))")
        head = self.param_groups[0]
        path = self._path
        fresh = self._nothing_gathered()
        self.probing = False
        evaluator = None
        if closure is None:
            self._hide()
        else:
            evaluator = self._begin(closure, stacked)
        try:
            if evaluator is None:
                path.begin()
            else:
                self._take_in(evaluator, fresh)
            assert self._gathered is not None
            # whatever happens from here on, the next step starts with a batch of its own
            gathered, self._gathered = self._gathered, None
            path.look_ahead()
            report = gathered.losses.report(self.step_index, head["smoothing"], head["sides"], self.ranks)
            report.rates = self._rates(gathered.multipliers)
            report.lr, report.smoothing = report.rates[0], head["smoothing"]
            report.began_written = not path.dirty  # now: it may have been written between two parts of the batch
            with deferred_interrupt():  # the step's index moves on with the weights
                self._move(report)
                self.last = report
        finally:
            path.end()
            self._show()
        self._count_nonfinite(report)
        report.forwards = head["forwards"] - gathered.forwards
        if self.sampler is not None and report.finite:
            self.sampler.end(report)
        if self.step_rule is not None:
            self.step_rule.after_step(report)
        loss = gathered.losses.loss()
        return loss if self.ranks.size == 1 else loss.new_tensor(report.loss)

    @torch.inference_mode(False)
    @torch.no_grad()
    def accumulate(self, closure: Closure, *, stacked: Stacked | None = None) -> Tensor:
        """Probe on a part of the coming step's batch, and keep its losses (a few numbers) for :meth:`step`.

        All parts are probed at the same points, so that the step is that of the joint batch. The first part decides what the
        step rule wants to know, and calibrates it.

        Args:
            closure: As for :meth:`step`.
            stacked: As for :meth:`step`.

        Returns:
            The mean of the losses seen at this part's probes, a scalar tensor.

        Raises:
            ValueError: If the scheme needs the whole batch at once.
        """
        path, fresh = self._path, self._nothing_gathered()
        self.probing = False
        evaluator = self._begin(closure, stacked)
        try:
            return self._take_in(evaluator, fresh).loss()
        finally:
            path.end()
            self._show()

    @property
    def progress(self) -> tuple[int, int]:
        """Steps taken, and the parts of the coming step's batch that have been probed."""
        return self.step_index, 0 if self._gathered is None else self._gathered.parts

    @torch.inference_mode(False)
    @torch.no_grad()
    def retake(self, report: StepReport) -> None:
        """Take the step that a report of another run describes, without a forward; bit for bit as it was taken there.

        Args:
            report: Of the step with the index of the coming one.

        Raises:
            ValueError: If it is of another step, or of another number of groups.
        """
        if report.step != self.step_index:
            raise ValueError(f"the report is of step {report.step}, the coming step is {self.step_index}")
        if len(report.rates) != len(self.param_groups):
            raise ValueError(
                f"the report is of {len(report.rates)} parameter groups, this optimizer has {len(self.param_groups)}"
            )
        if report.began_written:
            self.fold()
        self._hide()
        try:
            self._path.begin()
            with deferred_interrupt():
                self._move(report)
        finally:
            self._path.end()
            self._show()
        if report.ended_written:
            self.fold()

    def _nothing_gathered(self) -> Gathered:
        multipliers = [1.0] * len(self.param_groups)
        return Gathered(self.param_groups[0]["forwards"], multipliers=multipliers)

    def _take_in(self, evaluator: Evaluator, fresh: Gathered) -> Evaluations:
        """Probe on a batch or a part of it, and add its losses to what is gathered for the step, at first nothing."""
        gathered = self._gathered
        if gathered is not None and self.scheme.whole:
            self._gathered = None  # the next step starts with a batch of its own
            raise ValueError(
                f"scheme {self.scheme.name!r} probes where the losses before have told it to, so that the batch cannot come in "
                "parts: use accumulate_grad_batches=1 and a larger batch"
            )
        if gathered is None:
            gathered = fresh
            if self.step_rule is not None:
                prober = Prober(self._path, evaluator, self.ranks)
                gathered.want_curvature = self.step_rule.before_step(self.step_index, prober)
                gathered.multipliers = self._assign_sizes()
        seen = self._probe(evaluator, gathered)
        gathered.add(seen)
        self._gathered = gathered
        for group in self.param_groups:
            group["stacking"], group["unresolved"] = evaluator.state, evaluator.unresolved
        return seen

    def _move(self, report: StepReport) -> None:
        """Take the step; nothing of it if a loss was not finite."""
        if report.finite:
            self._path.apply(report)
            torch.clear_autocast_cache()
        for group in self.param_groups:
            group["step"] += 1
        report.ended_written = not self._path.dirty

    @torch.no_grad()
    def rehearse(self, closure: Closure, *, stacked: Stacked | None = None) -> float:
        """Run the forwards of a step twice, to see how long they take, and change nothing.

        Args:
            closure: As for :meth:`step`.
            stacked: As for :meth:`step`.

        Returns:
            Seconds of the second time, after which the device has finished.
        """
        kept = [dict(group) for group in self.param_groups]
        path = self._path
        observed = path.displacement.observed
        resumed = self._resumed
        gathered, self._gathered = self._gathered, None
        evaluator = self._begin(closure, stacked)
        devices = {parameter.device for parameter in self.named_parameters().values() if parameter.is_cuda}
        seconds = 0.0
        try:
            for _ in range(2):
                start = time.perf_counter()
                self._probe(evaluator, self._nothing_gathered())
                for device in devices:
                    torch.cuda.synchronize(device)
                seconds = time.perf_counter() - start
        finally:
            evaluator.rewind()
            path.end()
            self._gathered = gathered
            for group, before in zip(self.param_groups, kept, strict=True):
                group.update(before)
            if not observed:  # the first step does so, with its own batch
                path.displacement.forget()
                self._resumed = resumed
            self._show()
        return seconds

    def _begin(self, closure: Closure, stacked: Stacked | None) -> Evaluator:
        """Find out how the parameters are used, once, and get ready to draw the step's directions."""
        path = self._path
        self._hide()
        try:
            evaluator = self._evaluator(closure, stacked)
            if not path.displacement.observed:
                path.displacement.observe(evaluator.one)
                if self._resumed:  # it was counted when the run began
                    self._resumed = False
                    self._count(-1)
            self._measure_units()
            if self.sampler is not None:
                self.sampler.begin(self.param_groups, self.step_index)
            path.begin()
            if self.probes == "stacked" and not (path.stackable and evaluator.given):
                where = "a parameter is moved in place" if evaluator.given else "the closure has no stacked form"
                raise ValueError(f"probes='stacked' is not possible, because {where}; use 'auto'")
        except BaseException:
            self._show()
            raise
        return evaluator

    def _evaluator(self, closure: Closure, stacked: Stacked | None) -> Evaluator:
        displacement = self._path.displacement
        return Evaluator(
            closure,
            None if self.probes == "sequential" else stacked,
            self._module,
            displacement,
            {p.device for group in self.param_groups for p in group["params"]},
            self.param_groups[0]["stacking"],
            self.param_groups[0]["unresolved"],
            self.probes == "stacked",
            self._count,
        )

    def _count(self, forwards: int) -> None:
        for group in self.param_groups:
            group["forwards"] += forwards

    def _measure_units(self) -> None:
        """Each parameter's unit of length, measured once and kept in its group, so that a resumed run has the same."""
        for group in self.param_groups:
            if group["units"] is None:
                units = [1.0] * len(group["params"])
                if self.scaling == "output":
                    activity = self._path.displacement.activity
                    units = output_units(group["params"], activity, geometry_of(group), self.directions)
                    device = group["params"][0].device
                    units = self.ranks.mean(torch.tensor(units, dtype=torch.float64, device=device), 1).tolist()
                group["units"] = units

    def _rates(self, multipliers: list[float]) -> list[float]:
        """The step size of each group."""
        return [group["lr"] * by for group, by in zip(self.param_groups, multipliers, strict=True)]

    def _probe(self, evaluator: Evaluator, gathered: Gathered) -> Evaluations:
        head = self.param_groups[0]
        if self.ranks.split and (self.scheme.whole or self.sampler is not None):
            what = self.scheme.name if self.sampler is None else self.sampler.name
            raise ValueError(
                f"split_directions=True gives processes directions of their own, and {what!r} needs the same ones on all: use "
                "shared directions (split_directions=False)"
            )
        plan = Plan(
            smoothing=head["smoothing"],
            count=head["num_directions"],
            sides=head["sides"],
            first=self.ranks.rank * head["num_directions"] if self.ranks.split else 0,
            curvature=gathered.want_curvature or (self.sampler is not None and self.sampler.wants_base),
            curve_smoothing=self._curve_smoothing(),
            rates=tuple(self._rates(gathered.multipliers)),
        )
        self.probing = True
        seen = self.scheme.probe(Prober(self._path, evaluator, self.ranks), plan, self.update)
        self.probing = False
        return seen

    def _curve_smoothing(self) -> float | None:
        """τ of a rule that measures the curvature along directions of its own."""
        return None if self.step_rule is None or self.directions.whole() is None else self.step_rule.smoothing

    @property
    def forwards_per_step(self) -> float:
        """Batch losses of a step, without calibration and the rule's curvature."""
        head = self.param_groups[0]
        forwards = self.scheme.forwards(head["num_directions"], head["sides"])
        return float(forwards + (self.sampler is not None and self.sampler.wants_base and head["sides"] == 2))

    @property
    def forwards_for_curvature(self) -> int:
        """Batch losses more in a step that measures the curvature."""
        head = self.param_groups[0]
        based = head["sides"] == 1 or self.scheme.based or (self.sampler is not None and self.sampler.wants_base)
        if self.directions.whole() is not None:
            return 3 - based
        return 1 if head["sides"] == 1 or not based else 0

    def _assign_sizes(self) -> list[float]:
        """Write the rule's step size and smoothing into the groups.

        Returns:
            What to multiply each group's ``lr`` by. An LR scheduler (known by the ``initial_lr`` it leaves) owns ``lr``: it
            then holds the schedule, and the rule's step size is the multiplier.
        """
        assert self.step_rule is not None
        multipliers = []
        for group in self.param_groups:
            beta = group["momentum"]
            # averaged steps are correlated: this keeps the variance of their sum what it is without momentum
            length = self.step_rule.step_size * math.sqrt((1 - beta) / (1 + beta))
            # what is remembered of sparse directions stays the same for as many steps as it takes to probe it again
            length *= math.sqrt(self.directions.density) if beta else 1.0
            # a probe of few entries may go farther for the same rise of the loss
            group["smoothing"] = self.step_rule.smoothing / math.sqrt(self.directions.densest)
            count = group["num_directions"] * (self.ranks.size if self.ranks.split else 1)
            step_size = self.update.rate(length, group["smoothing"], count)
            if group.get("initial_lr"):
                multipliers.append(step_size / group["initial_lr"])
            else:
                group["lr"] = step_size
                multipliers.append(1.0)
        return multipliers

    def _count_nonfinite(self, report: StepReport) -> None:
        head = self.param_groups[0]
        count = 0 if report.finite else head["nonfinite"] + 1
        for group in self.param_groups:
            group["nonfinite"] = count
        if report.finite:
            return
        if count >= self.max_nonfinite:
            raise NonFiniteLossError(
                f"the loss was NaN or infinite in {count} steps in a row (last: {report.loss} at step {report.step}); "
                "the weights are those of the last good step. Check the data and the model's own loss, or use a wider "
                "precision"
            )
        warnings.warn(
            f"step {report.step}: the loss is {report.loss}; the update is skipped ({count} in a row)",
            UserWarning,
            stacklevel=4,
        )


def _check_sampler(sampler: Sampler, directions: Directions, update: Update) -> None:
    if update.oracle:
        raise ValueError(
            f"a learned distribution of directions ({sampler.name}) needs probes along the directions themselves, which "
            f"update={update.name!r} replaces by extreme points; use 'sgd' or 'unit'"
        )
    if directions.coupled or directions.factored or (sampler.dense and directions.low_rank):
        raise ValueError(f"a learned distribution of directions ({sampler.name}) does not work with {directions.signature()}")


def _check(name: str, value: Any, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
