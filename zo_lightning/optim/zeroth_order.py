"""The zeroth-order optimizer: a ``torch.optim.Optimizer`` whose ``step(closure)`` needs forward passes only."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zo_lightning.optim.directions import Address, Directions, Factors, make_directions
from zo_lightning.optim.displacement import Displacement, displaced
from zo_lightning.optim.evaluations import Evaluations
from zo_lightning.optim.geometry import GEOMETRIES, Geometry, make_geometry
from zo_lightning.optim.groups import GeometryMap, GeometrySpec, named_groups
from zo_lightning.optim.interrupts import deferred_interrupt
from zo_lightning.optim.precision import no_autocast
from zo_lightning.optim.randomness import generator
from zo_lightning.optim.rounding import round_stochastically
from zo_lightning.optim.scaling import output_units
from zo_lightning.optim.step_rules import Probe, StepReport, StepRule
from zo_lightning.optim.updates import Update, make_update
from zo_lightning.optim.world import World

__all__ = ["NonFiniteLossError", "ZerothOrder"]

Closure = Callable[[], Any]


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had a loss that is NaN or infinite."""


class ZerothOrder(torch.optim.Optimizer):
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
        update: ``"lmo"`` (normalised steps) or ``"sgd"``.
        scaling: ``"output"`` measures, in the first forward, how large a change of each parameter changes its module's output
            by the output's own size, and takes that for the unit of length; ``"none"`` takes the parameter's own units.
        num_directions: Directions q per step; each costs ``sides`` forwards. More than one, or momentum, use an estimate per
            parameter made when it is updated; only momentum is stored.
        sides: 2 for central differences, 1 for one-sided ones (one shared forward at x).
        momentum: β of the moving average of estimates, in [0, 1).
        weight_decay: Decoupled weight decay λ: ``x ← x - lr λ x``.
        seed: Seed of all directions; None takes ``torch.initial_seed()``, so that ``torch.manual_seed`` decides.
        step_rule: Sets ``lr`` and ``smoothing`` before each step, for example :class:`ParameterFree`.
        max_nonfinite: This many steps in a row with a NaN or infinite loss raise :class:`NonFiniteLossError`.

    Attributes:
        last: What the last step measured, a :class:`StepReport`.
        forwards: Batch losses evaluated so far.
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
        max_nonfinite: int = 10,
    ) -> None:
        _check("lr", lr, lr >= 0 and math.isfinite(lr), "a finite number >= 0")
        _check("smoothing", smoothing, smoothing > 0 and math.isfinite(smoothing), "a finite number > 0")
        _check("num_directions", num_directions, num_directions >= 1, "at least 1")
        _check("sides", sides, sides in (1, 2), "1 or 2")
        _check("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
        _check("weight_decay", weight_decay, weight_decay >= 0, ">= 0")
        _check("scaling", scaling, scaling in ("output", "none"), "'output' or 'none'")
        _check("max_nonfinite", max_nonfinite, max_nonfinite >= 1, "at least 1")
        self.directions = make_directions(directions, rank=rank, interval=interval)
        self.update = make_update(update)
        self.scaling = scaling
        self.step_rule = step_rule
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
        }
        self._module: nn.Module | None = None
        self._displacement: Displacement | None = None
        self._unit: dict[nn.Parameter, float] = {}
        self._resumed = False
        self._drawn: dict[tuple[int, nn.Parameter], Tensor | Factors] = {}
        self.geometry = GeometryMap(geometry, directions=self.directions)
        super().__init__(named_groups(params, self.geometry), defaults)

    # ---- set-up --------------------------------------------------------------------------------------------------------
    def attach(self, module: nn.Module) -> ZerothOrder:
        """Show displaced weights to ``module``'s forwards instead of moving the parameters in place.

        Args:
            module: Contains all parameters; the closure must run its submodules' forwards.

        Returns:
            The optimizer itself.

        Raises:
            ValueError: If ``module`` lacks one of the parameters.
        """
        self._displacement = Displacement(self._named_parameters(), module)
        self._module = module
        return self

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of (name, parameter) pairs of one ``geometry``.

        Raises:
            ValueError: If the group has no geometry, one that does not exist or that cannot be combined with the directions,
                or a name that another parameter has.
        """
        if "geometry" not in param_group:
            raise ValueError(f"a parameter group needs a geometry, one of {', '.join(sorted(GEOMETRIES))}")
        group = {"radius": 1.0, "transposed": False, **param_group}
        for key in ("smoothing", "num_directions", "sides", "seed"):
            if group.get(key, self.defaults[key]) != self.defaults[key]:
                raise ValueError(f"{key} is one for all parameters, got {group[key]!r} in a group and {self.defaults[key]!r}")
        geometry = _geometry(group)
        taken = set(self._named_parameters())
        super().add_param_group(group)
        added = self.param_groups[-1]
        for name, parameter in zip(added["param_names"], added["params"], strict=True):
            if name in taken:
                raise ValueError(f"two parameters have the name {name!r}; directions are told apart by the names")
            taken.add(name)
            reason = geometry.accepts(self.directions, parameter.shape)
            if reason is not None:
                raise ValueError(f"geometry {geometry.name!r} of {name!r} with {self.directions.signature()}: {reason}")
        self._displacement = None if self._module is None else Displacement(self._named_parameters(), self._module)

    @property
    def forwards(self) -> int:
        """Batch losses evaluated so far, calibration and curvature included."""
        return int(self.param_groups[0]["forwards"])

    @property
    def step_index(self) -> int:
        """Steps taken so far; the next step's directions are a function of it."""
        return int(self.param_groups[0]["step"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; a step rule given to the constructor is loaded too.

        Raises:
            ValueError: If the state was made with other directions, under which the run could not go on as it was.
        """
        state = dict(state_dict)
        rule = state.pop("step_rule", None)
        theirs, ours = state["param_groups"][0].get("directions"), self.directions.signature()
        if theirs != ours:
            raise ValueError(f"the checkpoint was made with directions {theirs}, this run has {ours}; use the same ones")
        super().load_state_dict(state)
        self._resumed = self.step_index > 0
        # torch casts floating-point state to the parameter's dtype: that loses bits of the buffers of half-precision weights
        indices = [index for group in state["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key, value in state["state"].get(index, {}).items():
                self.state[parameter][key] = value.to(parameter.device)
        if rule is not None and self.step_rule is not None:
            self.step_rule.load_state_dict(rule)

    def state_dict(self) -> dict[str, Any]:
        """The state of ``torch.optim.Optimizer`` plus the step rule's."""
        state = super().state_dict()
        if self.step_rule is not None:
            state["step_rule"] = self.step_rule.state_dict()
        return state

    # ---- the step ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Probe, and move the parameters once.

        Args:
            closure: Evaluates the model on the step's batch and returns the loss, a scalar or the losses per example (any
                shape, mean taken in float32). No backward.

        Returns:
            The mean of the losses seen at the probes, a scalar tensor.

        Raises:
            TypeError: If ``closure`` is missing or does not return a tensor.
            NonFiniteLossError: See ``max_nonfinite``.
        """
        if closure is None:
            raise TypeError("ZerothOrder.step needs a closure that evaluates the loss: optimizer.step(lambda: loss(batch))")
        evaluate = self._evaluator(closure)
        self._drawn.clear()
        self._locate()
        head = self.param_groups[0]
        before = head["forwards"]
        if not self._mechanism.observed:
            self._mechanism.observe(evaluate)
            if self._resumed:  # it was counted when the run began
                self._resumed = False
                for group in self.param_groups:
                    group["forwards"] -= 1
        self._measure_units()
        want_curvature = False
        multipliers = [1.0] * len(self.param_groups)
        if self.step_rule is not None:
            want_curvature = self.step_rule.before_step(self.step_index, _Prober(self, evaluate))
            multipliers = self._assign_sizes()
        seen = self._probe(evaluate, want_curvature)
        report = seen.report(self.step_index, head["smoothing"], head["sides"])
        report.lr = head["lr"] * multipliers[0]
        report.smoothing = head["smoothing"]
        with deferred_interrupt():  # the step's index moves on with the weights
            if report.finite:
                self._apply(report, multipliers)
                torch.clear_autocast_cache()
            for group in self.param_groups:
                group["step"] += 1
        self._drawn.clear()
        self._count_nonfinite(report)
        report.forwards = head["forwards"] - before
        if self.step_rule is not None:
            self.step_rule.after_step(report)
        self.last = report
        return torch.stack([*seen.plus, *seen.minus]).mean()

    def _measure_units(self) -> None:
        """Each parameter's unit of length, measured once and kept in its group, so that a resumed run has the same."""
        for geometry, group in zip(self._geometries, self.param_groups, strict=True):
            if group["units"] is None:
                units = [1.0] * len(group["params"])
                if self.scaling == "output":
                    units = output_units(group["params"], self._mechanism.activity, geometry, self.directions)
                group["units"] = units
            self._unit.update(zip(group["params"], group["units"], strict=True))

    @property
    def _mechanism(self) -> Displacement:
        if self._displacement is None:
            self._displacement = Displacement(self._named_parameters())
        return self._displacement

    def _evaluator(self, closure: Closure) -> Callable[[], Tensor]:
        """Wrap the closure: same random numbers and buffers each time, losses counted and in float32 or wider."""
        devices = {p.device for group in self.param_groups for p in group["params"]}
        world = World(self._module, devices)
        calls = 0

        def evaluate() -> Tensor:
            nonlocal calls
            if calls:
                world.rewind()
            calls += 1
            try:
                loss = closure()
            finally:
                world.restore_buffers()
            if not isinstance(loss, Tensor):
                raise TypeError(f"the closure must return the loss as a tensor, got {type(loss).__name__}")
            for group in self.param_groups:
                group["forwards"] += 1
            return loss.detach().to(torch.promote_types(loss.dtype, torch.float32)).reshape(-1)

        return evaluate

    def _probe(self, evaluate: Callable[[], Tensor], want_curvature: bool) -> Evaluations:
        head = self.param_groups[0]
        tau = head["smoothing"]
        seen = Evaluations()
        if head["sides"] == 1 or want_curvature:
            with self._mechanism.at():
                seen.base = evaluate()
        for query in range(head["num_directions"]):
            seen.plus.append(self._losses_at(evaluate, query, tau))
            if head["sides"] == 2 or (want_curvature and query == 0):
                seen.minus.append(self._losses_at(evaluate, query, -tau))
        return seen

    def _losses_at(self, evaluate: Callable[[], Tensor], query: int, tau: float) -> Tensor:
        """Losses at x + τ u, with the weights only read."""
        scales = self._scales(query)

        def shift(parameter: nn.Parameter) -> Tensor:
            return displaced(parameter, self._direction(parameter, query, scales), tau * self._unit[parameter])

        with self._mechanism.at(shift):
            return evaluate()

    @no_autocast()
    def _apply(self, report: StepReport, multipliers: list[float]) -> None:
        """Write the update, the only time in a step that the weights are written."""
        head = self.param_groups[0]
        q = head["num_directions"]
        scales = [self._scales(query) for query in range(q)]
        for group, multiplier in zip(self.param_groups, multipliers, strict=True):
            geometry = _geometry(group)
            lr = group["lr"] * multiplier
            simple = q == 1 and not group["momentum"]
            scale = None
            if not simple and geometry.coupled and self.update.normalised:
                # the oracle needs the norm of the whole group's estimate: a pre-pass
                squares = [self._estimate(p, group, report.slopes, scales, store=False).square().sum() for p in group["params"]]
                scale = geometry.coupling(torch.stack(squares).sum())
            for parameter in group["params"]:
                if simple:
                    u = self._direction(parameter, 0, scales[0])
                    delta = u if isinstance(u, Tensor) else u.dense()
                    delta = delta * (-lr * self._unit[parameter] * self.update.coefficient(report.slopes[0]))
                else:
                    estimate = self._estimate(parameter, group, report.slopes, scales, store=True)
                    delta = self.update.step(estimate, geometry, scale) * (lr * self._unit[parameter])
                self._write(parameter, delta, 1 - lr * group["weight_decay"])

    def _estimate(
        self,
        parameter: nn.Parameter,
        group: dict[str, Any],
        slopes: list[float],
        scales: list[dict[int, Tensor]],
        *,
        store: bool,
    ) -> Tensor:
        """The averaged estimate ``mean_i ρ_i u_i`` in the parameter's unit, through its momentum if it has one (float32)."""
        total = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        for query, slope in enumerate(slopes):
            u = self._direction(parameter, query, scales[query])
            dense = u if isinstance(u, Tensor) else u.dense().reshape(parameter.shape)
            total.add_(dense, alpha=slope / len(slopes))
        beta = group["momentum"]
        if not beta:
            return total
        old = self.state[parameter].get("momentum_buffer")
        average = total.mul_(1 - beta) if old is None else total.mul_(1 - beta).add_(old, alpha=beta)
        if store:
            self.state[parameter]["momentum_buffer"] = average
        return average

    def _write(self, parameter: nn.Parameter, delta: Tensor, decay: float) -> None:
        wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        wide = wide * decay + delta.reshape(parameter.shape) if decay != 1 else wide + delta.reshape(parameter.shape)
        if parameter.dtype in (torch.bfloat16, torch.float16):
            name, head = self._place[parameter][0], self.param_groups[0]
            source = generator(head["seed"], head["step"], name, "rounding", device=parameter.device)
            wide = round_stochastically(wide, parameter.dtype, source)
        parameter.data.copy_(wide)

    # ---- directions -------------------------------------------------------------------------------------------------
    @no_autocast()
    def _direction(self, parameter: nn.Parameter, query: int, scales: dict[int, Tensor]) -> Tensor | Factors:
        """The direction u to probe ``parameter`` along: drawn anew at each use, unless it is small enough to keep."""
        small = self.directions.low_rank  # factors and vectors
        if small and (query, parameter) in self._drawn:
            return self._drawn[query, parameter]
        name, index = self._place[parameter]
        head = self.param_groups[0]
        z = self.directions.draw(Address(head["seed"], head["step"], name, query), parameter.shape, parameter.device)
        u = self.update.probe(z, self._geometries[index], scales.get(index))
        if small:
            self._drawn[query, parameter] = u
        return u

    @no_autocast()
    def _scales(self, query: int) -> dict[int, Tensor]:
        """One over the Euclidean norm of z, for each group whose directions or geometry are coupled (a pre-pass)."""
        head = self.param_groups[0]
        scales = {}
        for index, group in enumerate(self.param_groups):
            if self._needs_scale(index):
                squares = []
                for parameter in group["params"]:
                    address = Address(head["seed"], head["step"], self._place[parameter][0], query)
                    z = self.directions.draw(address, parameter.shape, parameter.device)
                    squares.append((z.left if isinstance(z, Factors) else z).square().sum())
                scales[index] = torch.stack([s.to(squares[0].device) for s in squares]).sum().rsqrt()
        return scales

    def _needs_scale(self, index: int) -> bool:
        if self.update.normalised:
            return self._geometries[index].coupled
        return self.directions.coupled

    def _locate(self) -> None:
        """Refresh the names and geometries by parameter: param groups are plain data that others may change."""
        self._geometries = [_geometry(group) for group in self.param_groups]
        self._place = {
            parameter: (name, index)
            for index, group in enumerate(self.param_groups)
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

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
            step_size = self.step_rule.step_size * math.sqrt((1 - beta) / (1 + beta))
            group["smoothing"] = self.step_rule.smoothing
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


class _Prober(Probe):
    """Losses at and around the current point for a step rule."""

    def __init__(self, optimizer: ZerothOrder, evaluate: Callable[[], Tensor]) -> None:
        self._optimizer, self._evaluate = optimizer, evaluate

    def loss(self) -> float:
        with self._optimizer._mechanism.at():
            return float(self._evaluate().mean().double())

    def pair(self, direction: int, smoothing: float) -> tuple[float, float]:
        # negative queries: directions that no step uses
        plus, minus = (
            self._optimizer._losses_at(self._evaluate, -1 - direction, tau).mean().double() for tau in (smoothing, -smoothing)
        )
        values = torch.stack([plus, minus]).tolist()
        return values[0], values[1]


def _geometry(group: dict[str, Any]) -> Geometry:
    return make_geometry(group["geometry"], group["radius"], group["transposed"])


def _check(name: str, value: Any, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
