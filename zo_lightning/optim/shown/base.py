"""Weights as a forward pass is to see them: displaced, while the weight itself is only read.

A :class:`Shown` stands in a module's parameter slot for the duration of an evaluation. It is a tensor with the weight's own
storage, shape and dtype, and intercepts the functions that use it (``__torch_function__``, which ``torch.compile`` traces
too). A function that has no form of its own for its kind of weight is given the displaced weight as a tensor.

With several ``parts`` the leading dimension of the activations holds that many copies of the batch one after the other, and
each part sees a displacement of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["METADATA", "NotStackableError", "Shown", "as_they_are", "divided", "meetings", "replaced", "unrepeated"]

_PROPERTIES = """
    device dtype grad grad_dtype is_cpu is_cuda is_leaf is_meta is_mkldnn
    is_mps is_nested is_quantized is_sparse is_xpu itemsize layout names nbytes
    ndim requires_grad shape
"""
_METHODS = """
    __hash__ __len__ _is_view dim element_size get_device is_complex is_conj is_contiguous
    is_floating_point is_neg nelement numel size storage_offset stride untyped_storage
"""
METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES.split() if hasattr(getattr(Tensor, name, None), "__get__")}
METADATA |= {getattr(Tensor, name) for name in _METHODS.split()}
"""Functions that read no values."""


class NotStackableError(RuntimeError):
    """A function cannot give each part of a stacked batch its own displacement."""


class Shown(Tensor):
    """A displaced weight.

    Attributes:
        plain: The weight itself, which is only read.
        label: Its name, for messages.
        parts: In how many parts the batch comes, each with a displacement of its own.
        flat: Whether the weight has two dimensions; asking the stand-in itself would go through its handlers.
    """

    plain: Tensor
    label: str
    parts: int
    flat: bool
    met: ClassVar[list[tuple[str, list[torch.Size]]] | None] = None
    """Where it is a list, every use adds the weight's name and the shapes of what it meets there."""
    handlers: ClassVar[dict[Any, Callable[..., Any]]] = {}
    """What a kind of shown weight does in a function; anything else forms the displaced weight."""

    @classmethod
    def stand_in(cls, name: str, plain: Tensor, parts: int) -> Any:
        """A tensor of ``plain``'s storage that stands for it."""
        # as nn.Parameter is made: no view, whose base torch.compile would look at
        shown = torch.Tensor._make_subclass(cls, plain.data, plain.requires_grad)
        shown.plain, shown.label, shown.parts, shown.flat = plain, name, parts, plain.dim() == 2
        return shown

    def value(self, part: int = 0) -> Tensor:
        """The displaced weight of one part, a new tensor of the weight's shape and dtype."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the kind of weight answer for ``func``, or form the weight."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if Shown.met is not None:
            Shown.met.append(_met(args, kwargs))
        handler = cls.handlers.get(func)
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and not isinstance(x, Shown) and x.requires_grad for x in (*args, *kwargs.values())
        ):
            handler = None  # the closure differentiates with respect to its input: form the weight, as torch knows it
        if handler is not None:
            if torch.is_grad_enabled():  # by the closure: there is nothing to differentiate
                with torch.no_grad():
                    result = handler(*args, **kwargs)
            else:
                result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result

        def form(weight: Shown) -> Tensor:
            if weight.parts > 1:
                label = getattr(func, "__name__", str(func))
                raise NotStackableError(f"{weight.label} is used by {label}, which takes one weight for the whole batch")
            return weight.value()

        return func(*replaced(args, form), **{key: replaced(value, form) for key, value in kwargs.items()})


def replaced(value: Any, by: Callable[[Any], Tensor]) -> Any:
    """``value`` with what ``by`` gives in place of the stand-ins; lists and tuples are looked into."""
    if isinstance(value, Shown):
        return by(value)
    if type(value) in (list, tuple):
        return type(value)([replaced(item, by) for item in value])
    return value


def divided(x: Tensor, parts: int, what: str) -> Tensor:
    """``x`` of shape (parts · n, ...) as (parts, n, ...)."""
    if x.dim() == 0 or x.shape[0] % parts:
        raise NotStackableError(f"{what} meets activations of shape {tuple(x.shape)}, which do not hold {parts} batches")
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])


def as_they_are(x: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast from rounding what is computed in float32 here; a form that costs nothing without it."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _met(args: Any, kwargs: Any) -> tuple[str, list[torch.Size]]:
    values = [*args, *kwargs.values()]
    label = next((v.label for v in values if isinstance(v, Shown)), "a weight")
    return label, [v.shape for v in values if isinstance(v, Tensor) and not isinstance(v, Shown)]


@contextmanager
def meetings() -> Iterator[list[tuple[str, list[torch.Size]]]]:
    """Within this context the list holds what displaced weights have met."""
    Shown.met = []
    try:
        yield Shown.met
    finally:
        Shown.met = None


def unrepeated(one: list[tuple[str, list[torch.Size]]], many: list[tuple[str, list[torch.Size]]], copies: int) -> str | None:
    """The first weight that meets nothing whose first dimension (of those longer than 1) holds so many copies."""
    if len(one) != len(many):
        return "the forward of several copies of the batch takes another course"
    for (label, singles), (_, stacks) in zip(one, many, strict=True):
        if not any(_repeats(a, b, copies) for a, b in zip(singles, stacks, strict=False)):
            return f"{label} meets activations of shape {[tuple(b) for b in stacks]}, which do not hold {copies} batches"
    return None


def _repeats(one: torch.Size, many: torch.Size, copies: int) -> bool:
    if len(one) != len(many):
        return False
    for i, (a, b) in enumerate(zip(one, many, strict=True)):
        if a != b:
            return b == copies * a and all(d == 1 for d in one[:i]) and one[i + 1 :] == many[i + 1 :]
    return False
