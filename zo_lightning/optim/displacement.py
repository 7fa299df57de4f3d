"""Evaluate a model at displaced weights without touching the weights.

For the duration of an evaluation the modules' parameter slots hold stand-ins (:mod:`zo_lightning.optim.shown`); the parameters
themselves are only read. Whatever happens in between (an exception, a NaN, Ctrl-C), every weight is bit for bit what it was.
How each parameter is used is found out in one observed evaluation. One that is read by other ways than its slot is moved in
place, with a saved copy.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from zo_lightning.optim.interrupts import deferred_interrupt
from zo_lightning.optim.scaling import Activity
from zo_lightning.optim.shown import METADATA, Shown
from zo_lightning.optim.shown.base import replaced
from zo_lightning.optim.world import generators_of

__all__ = ["Displacement", "eager"]

T = TypeVar("T")


class Displacement:
    """Shows displaced weights to a model's forward passes.

    Args:
        parameters: The parameters that may be moved, by name; a tied parameter once.
        module: The module whose forward uses them. Without it the parameters are moved in place and put back from a copy.

    Attributes:
        observed: Whether :meth:`observe` has found out how the parameters are used (without a module there is no need).
        uses: For each parameter the functions that used it in the observed evaluation.
        activity: Sizes of the inputs and outputs of each parameter's module, seen there.
        slots: Modules, the names of their parameters there, and these parameters.
        batch_norms: The layers that may take statistics over the batch.
        generators: Random number generators that the modules own.

    Raises:
        ValueError: If ``module`` does not own one of the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], module: nn.Module | None = None) -> None:
        self._names = {parameter: name for name, parameter in parameters.items()}
        self.slots: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._in_place = list(parameters.values())
        self._out: dict[tuple[nn.Module, str], Tensor] = {}  # stand-ins that are in a slot now
        self._paused = 0
        self.module = module
        self.observed = module is None
        self.uses: dict[nn.Parameter, list[Any]] = {}
        self.activity: dict[nn.Parameter, Activity] = {}
        self.batch_norms = [m for m in module.modules() if isinstance(m, _BatchNorm)] if module is not None else []
        self.generators = [] if module is None else generators_of(module)
        if module is None:
            return
        self.slots = [
            (submodule, key, parameter)
            for submodule in module.modules()
            for key, parameter in submodule._parameters.items()
            if parameter is not None and parameter in self._names
        ]
        owned = {parameter for _, _, parameter in self.slots}
        foreign = [name for name, parameter in parameters.items() if parameter not in owned]
        if foreign:
            raise ValueError(
                f"the optimizer holds parameters that the attached module does not own: {', '.join(foreign[:3])}"
                f"{' ...' if len(foreign) > 3 else ''}; attach the module that contains them all"
            )
        self._in_place = []

    @property
    def in_place(self) -> list[str]:
        """Names of the parameters that are moved in place, with a copy kept."""
        return [self._names[parameter] for parameter in self._in_place]

    def forget(self) -> None:
        """Be ready to :meth:`observe` another batch."""
        self.observed = self.module is None

    def observe(self, evaluate: Callable[[], T]) -> T:
        """Evaluate at the weights as they are, eagerly, and find out how each parameter is used.

        Args:
            evaluate: Runs the forward pass.

        Returns:
            What ``evaluate`` returned.
        """
        uses: dict[nn.Parameter, list[Any]] = {}
        escapes = _Escapes(set(self._names), lambda: self._paused > 0)
        stand_ins: dict[nn.Parameter, Tensor] = {}
        for parameter, name in self._names.items():
            stand_ins[parameter] = observed = _Observed.stand_in(name, parameter, 1)
            observed.plain = parameter.detach()
            observed.noted = uses.setdefault(parameter, [])
        with self._measured(), self._swapped(stand_ins), eager(), escapes:
            result = evaluate()
        self.uses = uses
        if self.module is not None:
            self.generators = generators_of(self.module)  # some are made in a first forward
        escaped = [p for p in self._names if p in escapes.found]
        unused = [p for p in self._names if not uses[p] and p not in escapes.found]
        self._in_place = escaped + unused
        self.observed = True
        self._warn(escaped, "used otherwise than as their module's attribute; each is moved in place, with a copy")
        self._warn(unused, "not used by the first forward pass; freeze them (requires_grad=False) if they never are")
        return result

    @contextmanager
    def at(self, stand_ins: Mapping[nn.Parameter, Shown]) -> Iterator[None]:
        """Within this context every use of a parameter sees its stand-in.

        Args:
            stand_ins: For the parameters that are displaced; the others are seen as they are.
        """
        with self._moved(stand_ins), self._swapped(stand_ins):
            yield

    @contextmanager
    def _swapped(self, stand_ins: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
        hidden = set(self._in_place)
        before = self._out
        self._out = out = {}
        swapped: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        try:
            for module, key, parameter in self.slots:
                shown, owned = stand_ins.get(parameter), module._parameters
                # a slot that holds something else is somebody's doing, as torch.func.functional_call's
                if shown is None or owned.get(key) is not parameter or (hidden and parameter in hidden):
                    continue
                swapped.append((owned, key, parameter))
                out[module, key] = owned[key] = shown  # type: ignore[assignment]
            yield
        finally:
            with deferred_interrupt():
                for owned, key, parameter in swapped:
                    owned[key] = parameter
                self._out, self._paused = before, 0

    def pause(self, module: nn.Module) -> None:
        """Put the parameters of a module itself into its slots for a while: it is saved in the middle of an evaluation."""
        self._paused += 1
        for owner, key, parameter in self.slots:
            if owner is module and (owner, key) in self._out:
                owner._parameters[key] = parameter

    def resume(self, module: nn.Module) -> None:
        """Go on after :meth:`pause`."""
        self._paused -= 1
        for owner, key, _ in self.slots:
            if owner is module and (owner, key) in self._out:
                owner._parameters[key] = self._out[owner, key]  # type: ignore[assignment]

    @contextmanager
    def _moved(self, stand_ins: Mapping[nn.Parameter, Shown]) -> Iterator[None]:
        """Parameters moved in place; a copy of each puts it back exactly."""
        moving = [parameter for parameter in self._in_place if parameter in stand_ins]
        if not moving:
            yield
            return
        saved: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for parameter in moving:
                value = stand_ins[parameter].value()
                with deferred_interrupt():
                    saved.append((parameter, parameter.detach().clone()))
                    parameter.data.copy_(value)
            torch.clear_autocast_cache()
            yield
        finally:
            with deferred_interrupt():
                for parameter, copy in saved:
                    parameter.data.copy_(copy)
                torch.clear_autocast_cache()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Record the sizes of what goes into and comes out of the modules that own parameters."""
        seen: dict[nn.Module, Activity] = {}
        handles = []
        for module in {module for module, _, _ in self.slots}:
            activity = Activity(module)
            seen[module] = activity
            handles.append(
                module.register_forward_hook(lambda m, args, output, activity=activity: activity.record(args, output))
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.activity = {}
        for module, _, parameter in self.slots:
            if seen[module].outputs is not None:
                self.activity.setdefault(parameter, seen[module])

    def _warn(self, parameters: list[nn.Parameter], what: str) -> None:
        warn_of([self._names[parameter] for parameter in parameters], what)


def warn_of(names: list[str], what: str) -> None:
    """Warn that the parameters called ``names``, if any, are ``what``."""
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(f"{len(names)} parameters are {what}: {shown}", UserWarning, stacklevel=4)


def eager() -> contextlib.AbstractContextManager[Any]:
    """Compiled modules run uncompiled: a graph would hide which functions use a weight."""
    # importing torch's compiler takes seconds: nothing is compiled where nobody has
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


class _Observed(Shown):
    """A weight as it is, which notes the functions that use it."""

    noted: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)

        def note(weight: Any) -> Tensor:
            weight.noted.append(func)
            plain: Tensor = weight.plain
            return plain

        return func(*replaced(args, note), **{key: replaced(value, note) for key, value in kwargs.items()})


class _Escapes(TorchFunctionMode):
    """Records which of ``parameters`` take part in any operation other than reading their metadata."""

    def __init__(self, parameters: set[nn.Parameter], paused: Callable[[], bool]) -> None:
        super().__init__()
        self.parameters = parameters
        self.paused = paused
        self.found: set[nn.Parameter] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in METADATA and not self.paused():
            self._scan(args)
            self._scan(kwargs.values())
        return func(*args, **kwargs)

    def _scan(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                if value in self.parameters:
                    self.found.add(value)  # type: ignore[arg-type]
            elif isinstance(value, (list, tuple)):
                self._scan(value)
