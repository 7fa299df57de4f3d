"""Evaluate a model at displaced weights without touching the weights.

For the duration of its own forward a module sees a scratch tensor in place of each of its parameters; the parameter itself is
only read. Whatever happens in between (an exception, a NaN, Ctrl-C), every weight is bit for bit what it was. Parameters
that are used outside the forward of the module that owns them are found in one observed forward, and moved in place with a
saved copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from zo_lightning.optim.directions import Factors
from zo_lightning.optim.interrupts import deferred_interrupt
from zo_lightning.optim.precision import no_autocast
from zo_lightning.optim.scaling import Activity

__all__ = ["Displacement", "displaced"]

T = TypeVar("T")
Shift = Callable[[nn.Parameter], Tensor]

_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("device", "dtype", "is_cuda", "is_leaf", "is_meta", "layout", "ndim", "requires_grad", "shape", "grad")
} | {
    getattr(torch.Tensor, name)
    for name in (
        *("__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous"),
        *("is_floating_point", "nelement", "numel", "size", "stride"),
    )
}


class Displacement:
    """Shows displaced weights to a model's forward passes.

    Args:
        parameters: The parameters that may be moved, by name; a tied parameter once.
        module: The module whose forward uses them. Without it, and for parameters that are used outside their module's
            forward, the parameters are moved in place and put back from a saved copy.

    Raises:
        ValueError: If ``module`` does not own one of the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], module: nn.Module | None = None) -> None:
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._owners: list[tuple[nn.Module, dict[str, nn.Parameter]]] = []
        self._in_place = list(parameters.values())
        self._active: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self.observed = module is None
        self.activity: dict[nn.Parameter, Activity] = {}
        """Sizes of the inputs and outputs of each parameter's module, seen by :meth:`observe`."""
        if module is None:
            return
        owned: set[nn.Parameter] = set()
        for submodule in module.modules():
            own = {k: p for k, p in submodule._parameters.items() if p is not None and p in self._names}
            if own:
                self._owners.append((submodule, own))
                owned.update(own.values())
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

    def observe(self, evaluate: Callable[[], T]) -> T:
        """Evaluate at the weights as they are, and find out how each parameter is used.

        Args:
            evaluate: Runs the forward pass.

        Returns:
            What ``evaluate`` returned.
        """
        called: dict[nn.Module, Activity] = {}
        escapes = _Escapes(set(self._names))
        aliases = {parameter: parameter.detach() for parameter in self._names}  # made outside the observed region
        with self._swapped(aliases.__getitem__, called), escapes:
            result = evaluate()
        self.activity = {}
        for module, own in self._owners:
            for parameter in own.values() if module in called else ():
                self.activity.setdefault(parameter, called[module])
        seen = set(self.activity)
        unused = [p for p in self._names if p not in seen and p not in escapes.found]
        escaped = [p for p in self._names if p in escapes.found]
        self._in_place = escaped + unused
        self._owners = [
            (module, kept)
            for module, own in self._owners
            if (kept := {k: p for k, p in own.items() if p not in escapes.found and p in seen})
        ]
        self.observed = True
        self._warn(escaped, "used outside the forward of the module that owns them; each is moved in place, with a copy")
        self._warn(unused, "not used by the first forward pass; freeze them (requires_grad=False) if they never are")
        return result

    @contextmanager
    def at(self, shift: Shift | None = None) -> Iterator[None]:
        """Within this context forward passes see ``shift(parameter)`` in place of each parameter.

        Args:
            shift: Returns the displaced weight, of the parameter's shape, dtype and device, as a new tensor. It may be
                called several times for one parameter and must return the same. None: the weights as they are.
        """
        if shift is None:
            with self._swapped(lambda parameter: parameter.detach()):
                yield
            return
        with self._moved(shift), self._swapped(shift):
            yield

    # ---- mechanisms ----------------------------------------------------------------------------------------------------
    @contextmanager
    def _swapped(self, shift: Shift, called: dict[nn.Module, Activity] | None = None) -> Iterator[None]:
        """Scratch tensors in the modules' parameter slots, each from the start to the end of its module's forward."""
        depth: dict[nn.Module, int] = {}
        handles: list[RemovableHandle] = []

        def enter(module: nn.Module, own: dict[str, nn.Parameter]) -> None:
            depth[module] = depth.get(module, 0) + 1
            if called is not None:
                called.setdefault(module, Activity(module))
            if depth[module] == 1:  # a module may call itself
                for key, parameter in own.items():
                    self._active[module, key] = parameter
                    module._parameters[key] = shift(parameter)  # type: ignore[assignment]

        def leave(module: nn.Module, args: Any, output: Any, own: dict[str, nn.Parameter]) -> None:
            if called is not None:
                called[module].record(args, output)
            depth[module] = depth.get(module, 1) - 1
            if depth[module] == 0:
                for key, parameter in own.items():
                    module._parameters[key] = parameter
                    self._active.pop((module, key), None)

        try:
            for module, own in self._owners:
                handles.append(module.register_forward_pre_hook(lambda m, _, own=own: enter(m, own), prepend=True))
                handles.append(module.register_forward_hook(lambda m, x, y, own=own: leave(m, x, y, own), always_call=True))
            yield
        finally:
            with deferred_interrupt():
                for handle in handles:
                    handle.remove()
                # forward hooks do not run on KeyboardInterrupt
                for (module, key), parameter in self._active.items():
                    module._parameters[key] = parameter
                self._active.clear()

    @contextmanager
    def _moved(self, shift: Shift) -> Iterator[None]:
        """Parameters moved in place; a copy of each puts it back exactly."""
        if not self._in_place:
            yield
            return
        saved: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for parameter in self._in_place:
                displaced = shift(parameter)
                with deferred_interrupt():
                    saved.append((parameter, parameter.detach().clone()))
                    parameter.data.copy_(displaced)
            torch.clear_autocast_cache()
            yield
        finally:
            with deferred_interrupt():
                for parameter, copy in saved:
                    parameter.data.copy_(copy)
                torch.clear_autocast_cache()

    def _warn(self, parameters: list[nn.Parameter], what: str) -> None:
        if parameters:
            names = [self._names[parameter] for parameter in parameters]
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            warnings.warn(f"{len(names)} parameters are {what}: {shown}", UserWarning, stacklevel=3)


class _Escapes(TorchFunctionMode):
    """Records which of ``parameters`` take part in any operation other than reading their metadata."""

    def __init__(self, parameters: set[nn.Parameter]) -> None:
        super().__init__()
        self.parameters = parameters
        self.found: set[nn.Parameter] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _METADATA:
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


@no_autocast()
def displaced(parameter: nn.Parameter, u: Tensor | Factors, tau: float) -> Tensor:
    """``parameter + τ u`` as a new tensor of the parameter's dtype; the sum is taken in float32 or wider."""
    weight = parameter.detach()
    if isinstance(u, Factors):
        matrix = weight.reshape(u.left.shape[0], -1)
        dtype = weight.dtype
        return torch.addmm(matrix, u.left.to(dtype), u.right.to(dtype).T, alpha=tau).reshape(weight.shape)
    return (weight + tau * u).to(weight.dtype)
