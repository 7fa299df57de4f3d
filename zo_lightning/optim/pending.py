"""Between two writes of the weights: whoever else runs or saves the model sees it with the pending update.

While an update is pending, forward passes outside of a step (validation, generation) see it: the modules' ``forward`` is
wrapped. ``state_dict`` holds folded copies, and in the middle of a step's evaluation the weights rather than their stand-ins.
Before ``load_state_dict``, a forward with gradients, or one on another device the update is written. Hooks and wrappers belong
to the modules, so that the update outlives its optimizer; a deep copy of a module has it written, and is free of them.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zo_lightning.optim.path import Path, Point

__all__ = ["Pending"]


class Pending:
    """What an attached module has of its optimizer.

    Args:
        path: Whose update is pending.
        module: The attached module.
    """

    def __init__(self, path: Path, module: nn.Module) -> None:
        self.path = path
        self.settle_others()
        _ALIVE.add(self)
        self.showing = False
        self._wrappers = [(m, _Forward(self, m)) for m in module.modules()]
        self._copies: weakref.WeakValueDictionary[nn.Parameter, Tensor] = weakref.WeakValueDictionary()
        self._owned: dict[nn.Module, dict[str, nn.Parameter]] = {}
        for owner, key, parameter in path.displacement.slots:
            self._owned.setdefault(owner, {})[key] = parameter
        self._hooks: list[RemovableHandle] = []
        for owner in self._owned:
            self._hooks.append(owner.register_state_dict_pre_hook(_Hook(self.before_saving)))
            self._hooks.append(owner.register_state_dict_post_hook(_Hook(self.after_saving)))
            self._hooks.append(owner.register_load_state_dict_pre_hook(_Hook(self.before_loading)))

    def __getstate__(self) -> dict[str, Any]:
        """A pickled module takes the update along."""
        return {**self.__dict__, "_copies": None, "showing": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _copies=weakref.WeakValueDictionary())
        _ALIVE.add(self)

    # ---- forward passes ------------------------------------------------------------------------------------------------
    def show(self) -> None:
        """From now on forward passes see the pending update, if there is one."""
        if self.path.dirty:
            for module, wrapper in self._wrappers:
                wrapper.put_on(module)

    def hide(self) -> None:
        """A step begins, which shows the weights itself."""
        for module, wrapper in self._wrappers:
            wrapper.take_off(module)

    def remove(self) -> None:
        """Leave the module as it was."""
        self.hide()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _ALIVE.discard(self)

    def settle_others(self) -> None:
        """Write what other optimizers, alive or not, have pending of the same parameters."""
        if len(_ALIVE) == 1 and self in _ALIVE:
            return
        mine = {parameter for _, _, parameter in self.path.displacement.slots}
        for other in list(_ALIVE):
            theirs = {parameter for _, _, parameter in other.path.displacement.slots}
            if other is not self and not mine.isdisjoint(theirs):
                other.path.fold()
                other.hide()

    # ---- state dictionaries --------------------------------------------------------------------------------------------
    def before_saving(self, module: nn.Module, *rest: Any) -> None:
        """Parameters in place of their stand-ins, and reading them is not a use."""
        self.path.displacement.pause(module)

    def after_saving(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Folded copies in place of the weights."""
        self.path.displacement.resume(module)
        for key, parameter in self._owned[module].items():
            if self.path.dirty and prefix + key in state_dict:
                state_dict[prefix + key] = self._copy(parameter)

    def _copy(self, parameter: nn.Parameter) -> Tensor:
        """Tied weights stay one tensor, while the dictionary that holds it lives."""
        copy = self._copies.get(parameter)
        if copy is None or getattr(copy, "_folded_at", None) != self.path.version:
            copy = self.path.folded(parameter, torch.device("cpu") if parameter.is_cuda else None)
            copy._folded_at = self.path.version  # type: ignore[attr-defined]
            self._copies[parameter] = copy
        return copy

    def before_loading(self, *args: Any) -> None:
        """The weights that are not loaded keep their update."""
        self.path.fold()


_ALIVE: weakref.WeakSet[Pending] = weakref.WeakSet()
"""Kept alive by the modules whose update they hold."""


class _Hook:
    """A bound method as an object that torch can put its mark on. A copy of its module has nothing pending."""

    def __init__(self, method: Callable[..., None] | None) -> None:
        self._method = method

    def __call__(self, *args: Any) -> None:
        if self._method is not None:
            self._method(*args)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None)


class _Forward:
    """A module's ``forward`` that sees the pending update; the outermost call shows it to all modules at once.

    Unlike hooks it puts the weights back on any exception, Ctrl-C included.
    """

    def __init__(self, pending: Pending, module: nn.Module) -> None:
        self._pending = pending
        self._inner: Callable[..., Any] | None = None  # one that an instance had already
        self._module = module
        functools.update_wrapper(self, type(module).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pending, path = self._pending, self._pending.path
        forward = self._inner or functools.partial(type(self._module).forward, self._module)
        if pending.showing or not path.dirty:
            return forward(*args, **kwargs)
        if torch.is_grad_enabled() or path.moved_away:  # autograd wants the parameters themselves
            path.fold()
            return forward(*args, **kwargs)
        pending.showing = True
        try:
            path.refresh()
            with path.show([Point()]):
                return forward(*args, **kwargs)
        finally:
            pending.showing = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Write the update into the copy of the module, whose weights have been copied already."""
        for parameter in self._module._parameters.values():
            copied = memo.get(id(parameter))
            if parameter is not None and copied is not None and self._pending.path.holds(parameter):
                copied.data.copy_(self._pending.path.folded(parameter))
        if self._inner is not None:
            return copy.deepcopy(self._inner, memo)
        return types.MethodType(type(self._module).forward, memo[id(self._module)])

    def put_on(self, module: nn.Module) -> None:
        """Take the place of ``module.forward``; past the module's own ``__setattr__``, as it is done at every step."""
        if module.__dict__.get("forward") is not self:
            self._inner = module.__dict__.get("forward")
            module.__dict__["forward"] = self

    def take_off(self, module: nn.Module) -> None:
        """Give it back, unless somebody else has wrapped it since: then it stays, and shows nothing without an update."""
        if module.__dict__.get("forward") is self:
            if self._inner is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = self._inner
