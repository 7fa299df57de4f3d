"""What a zeroth-order optimizer is before it steps: parameters in groups, the module they are shown in, and its state."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from zo_lightning.optim.dense_path import DensePath
from zo_lightning.optim.directions import Directions
from zo_lightning.optim.displacement import Displacement
from zo_lightning.optim.evaluations import Gathered
from zo_lightning.optim.geometry import GEOMETRIES
from zo_lightning.optim.interrupts import deferred_interrupt
from zo_lightning.optim.low_rank_path import LowRankPath
from zo_lightning.optim.path import Path, Setting, geometry_of
from zo_lightning.optim.pending import Pending
from zo_lightning.optim.sampling import Sampler
from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.updates import Update

__all__ = ["AttachableOptimizer"]

Self = TypeVar("Self", bound="AttachableOptimizer")


class AttachableOptimizer(torch.optim.Optimizer):
    """Keeps the parameter groups, the attached module and the state; a subclass sets the attributes and takes the steps.

    Attributes:
        directions: The family of directions.
        update: The update rule.
        sampler: Shapes the directions, if there is one.
        step_rule: Sets the sizes of the steps, if there is one.
    """

    directions: Directions
    update: Update
    sampler: Sampler | None
    step_rule: StepRule | None
    _module: nn.Module | None = None
    _made_path: Path | None = None
    _pending: Pending | None = None
    _gathered: Gathered | None = None
    _resumed: bool = False

    # ---- set-up --------------------------------------------------------------------------------------------------------
    def attach(self: Self, module: nn.Module) -> Self:
        """Show displaced weights to ``module``'s forwards instead of moving the parameters in place.

        With low-rank directions the update is then written into the weights only every ``interval`` steps. In between, forwards
        of the module and its ``state_dict`` hold it all the same; :meth:`fold` writes it at once.

        Args:
            module: Contains all parameters; the closure must run its submodules' forwards.

        Returns:
            The optimizer itself.

        Raises:
            ValueError: If ``module`` lacks one of the parameters.
        """
        displacement = Displacement(self.named_parameters(), module)
        self._drop_path()
        self._module = module
        self._made_path = self._path_over(displacement)
        self._pending = Pending(self._made_path, module)
        return self

    def detach(self) -> None:
        """Write the pending update, and leave the module as it was before :meth:`attach`."""
        self.fold()
        self._drop_path()
        self._module = None

    def fold(self) -> None:
        """Write the pending update into the weights now, for example before they are read directly.

        A run goes on from there as it would have, but for rounding.
        """
        if self._made_path is not None:
            with deferred_interrupt():  # half of it written would be written twice
                self._made_path.fold()
                if self._pending is not None:
                    self._pending.hide()

    def _drop_path(self) -> None:
        if self._pending is not None:
            self._pending.remove()
        self._made_path = self._pending = None

    def _path_over(self, displacement: Displacement) -> Path:
        setting = Setting(self.param_groups, self.directions, self.update, self.state, self.sampler)
        low_rank = self.directions.low_rank and displacement.module is not None
        return LowRankPath(setting, displacement) if low_rank else DensePath(setting, displacement)

    @property
    def _path(self) -> Path:
        if self._made_path is None:
            self._made_path = self._path_over(Displacement(self.named_parameters()))
        # torch replaces both when a state is loaded
        self._made_path.setting.groups, self._made_path.setting.state = self.param_groups, self.state
        return self._made_path

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
        geometry = geometry_of(group)
        taken = set(self.named_parameters())
        super().add_param_group(group)
        added = self.param_groups[-1]
        for name, parameter in zip(added["param_names"], added["params"], strict=True):
            if name in taken:
                raise ValueError(f"two parameters have the name {name!r}; directions are told apart by the names")
            taken.add(name)
            reason = geometry.accepts(self.directions, parameter.shape)
            if reason is not None and self.update.oracle:
                raise ValueError(f"geometry {geometry.name!r} of {name!r} with {self.directions.signature()}: {reason}")
        self.directions.prepare({name: parameter.shape for name, parameter in self.named_parameters().items()})
        if self._module is None:
            self._made_path = None
        else:
            self.fold()
            self.attach(self._module)

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
            ValueError: If the state was made with other directions, or of other parameters, under which the run could not go on
                as it was.
        """
        state = dict(state_dict)
        rule, path, gathered = state.pop("step_rule", None), state.pop("path", {}), state.pop("gathered", None)
        learned = state.pop("sampler", None)
        theirs, ours = state["param_groups"][0].get("directions"), self.directions.signature()
        if theirs != ours:
            raise ValueError(f"the checkpoint was made with directions {theirs}, this run has {ours}; use the same ones")
        self._check_names(state["param_groups"])
        super().load_state_dict(state)
        self._resumed = self.step_index > 0 or gathered is not None
        # torch casts floating-point state to the parameter's dtype: that loses bits of the buffers of half-precision weights
        indices = [index for group in state["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key, value in state["state"].get(index, {}).items():
                self.state[parameter][key] = value.to(parameter.device)
        if rule is not None and self.step_rule is not None:
            self.step_rule.load_state_dict(rule)
        if learned is not None and self.sampler is not None:
            self.sampler.load_state_dict(learned)
        self._path.load_state_dict(path)
        device = self.param_groups[0]["params"][0].device
        self._gathered = None if gathered is None else Gathered.from_state_dict(gathered, device)
        if self._pending is not None:
            self._pending.hide()
            self._pending.show()

    def _check_names(self, groups: list[dict[str, Any]]) -> None:
        """Torch would take the state by position, and the names from the checkpoint."""
        ours, theirs = ([group.get("param_names", []) for group in gs] for gs in (self.param_groups, groups))
        if ours != theirs:
            odd = sorted({name for group in ours for name in group} ^ {name for group in theirs for name in group})
            what = f"is of other parameters: {', '.join(odd[:3])}" if odd else "has the parameters in another order or grouping"
            raise ValueError(f"the checkpoint {what}; make the optimizer as the checkpoint's was")

    def state_dict(self) -> dict[str, Any]:
        """The state of ``torch.optim.Optimizer`` plus the step rule's and the pending update's."""
        state = super().state_dict()
        if self._made_path is not None and (path := self._made_path.state_dict()):
            state["path"] = path
        if self.step_rule is not None:
            state["step_rule"] = self.step_rule.state_dict()
        if self.sampler is not None and (learned := self.sampler.state_dict()):
            state["sampler"] = learned
        if self._gathered is not None:
            state["gathered"] = self._gathered.state_dict()
        return state

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that their directions depend on."""
        return {
            name: parameter
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    def _hide(self) -> None:
        if self._pending is not None:
            self._pending.settle_others()
            self._pending.hide()

    def _show(self) -> None:
        if self._pending is not None:
            self._pending.show()
